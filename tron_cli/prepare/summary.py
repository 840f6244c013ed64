"""Tables that `tron prepare` prints when it is done, from dataset.json alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from tron_cli.data.dataset import SPLITS, Dataset
from tron_cli.errors import counted
from tron_cli.prepare.reading.bad_lines import skipped_lines
from tron_cli.prepare.split import DAY, moment
from tron_cli.text_table import format_table

# Sizes after preparation as their authors give them: TRON's paper (train is the whole training
# period), and for ML-1M gSASRec's repository.
PUBLISHED: dict[str, dict[str, str]] = {
    "otto": {
        "train sessions": "12.9M",
        "train events": "194.7M",
        "test sessions": "1.67M",
        "test events": "12.34M",
        "items": "1,855,603",
    },
    "yoochoose": {
        "train sessions": "7.9M",
        "train events": "31.6M",
        "test sessions": "15k",
        "test events": "71k",
        "items": "37k",
    },
    "diginetica": {
        "train sessions": "187k",
        "train events": "906k",
        "test sessions": "18k",
        "test events": "87k",
        "items": "43k",
    },
    "ml1m": {"test sessions": "6,040", "test events": "999,611", "items": "3,416"},
}
LONG_GAP_DAYS = 7  # without any event before a held-out split: a wrong time, perhaps
MANY_REPEATS = 0.5
_SCALE = {"k": 1_000, "M": 1_000_000}


def print_summary(dataset: Dataset) -> None:
    """Print what was read, what was dropped and why, the splits, and the published sizes."""
    print(summary_text(dataset))


def summary_text(dataset: Dataset) -> str:
    """Return the tables of `print_summary`."""
    info = dataset.info
    parts = [f"{dataset.path}: {info['protocol']}, {info['num_items']:,} items"]
    # A source with a separate test file has separate filters for it.
    for title, key in (("step", "filters"), ("step of the test file", "test_filters")):
        if info.get(key):
            parts.append(_steps_table(title, info[key]))
    parts.append(_splits_table(info["splits"]))
    notes = _notes(info)
    if notes:
        parts.append("\n".join(notes))
    if info["source"] in PUBLISHED:
        parts.append(_published_table(info))
    return "\n\n".join(parts)


def agrees(value: int, published: str) -> bool:
    """Return whether a published figure (such as 12.9M) is the value, rounded or cut off."""
    number = published.replace(",", "")
    scale = _SCALE.get(number[-1], 1)
    digits = number.rstrip("kM")
    unit = scale / 10 ** len(digits.partition(".")[2])
    low = float(digits) * scale
    return low - unit / 2 <= value < low + unit if unit > 1 else value == low


def _steps_table(title: str, steps: list[dict[str, Any]]) -> str:
    header = [title, "sessions", "events", "items", "dropped sessions", "dropped events"]
    keys = ["sessions", "events", "items", "dropped_sessions", "dropped_events"]
    rows = [
        [f"{step['step']} ({step['why']})" if step.get("why") else step["step"]]
        + [_count(step.get(key)) for key in keys]
        for step in steps
    ]
    return format_table(header, rows)


def _splits_table(splits: dict[str, dict[str, Any]]) -> str:
    header = ["split", "sessions", "events", "mean length", "median", "longest", "repeats"]
    rows = [
        [
            name,
            _count(splits[name]["sessions"]),
            _count(splits[name]["events"]),
            _number(splits[name]["mean_length"], ".2f"),
            _number(splits[name]["median_length"], "g"),
            _count(splits[name]["max_length"]),
            _percent(_repeats(splits[name])),
        ]
        for name in SPLITS
    ]
    if any("first_time" in splits[name] for name in SPLITS):
        header += ["first event (UTC)", "last event (UTC)"]
        for name, row in zip(SPLITS, rows, strict=True):
            row += [_moment(splits[name].get(key)) for key in ("first_time", "last_time")]
    return format_table(header, rows)


def _repeats(split: dict[str, Any]) -> float | None:
    """Return the share of events, first ones left out, that repeat the item before them."""
    followers = split["events"] - split["sessions"]
    if "repeated_events" not in split or not followers:
        return None
    return split["repeated_events"] / followers


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}".replace("%", " %")


def _moment(ms: int | None) -> str:
    return "" if ms is None else moment(ms)


def _notes(info: dict[str, Any]) -> list[str]:
    """Return a sentence for each kind of skipped, lost or suspicious events."""
    notes = []
    bad = info.get("bad_lines") or {"count": 0}
    if bad["count"]:
        notes.append(f"{skipped_lines(bad)}.")
    share = _repeats(info["splits"]["train"])
    is_table = info["source"] == "table"
    if share is not None and share > MANY_REPEATS:
        notes.append(
            f"Warning: {_percent(share)} of the training events that follow another repeat its "
            "item. Predicting the last item again is right as often, so that figures of all "
            "models are high and differ little"
            + ("; --collapse-repeats keeps the first event of each run." if is_table else ".")
        )
    duplicates = info.get("duplicate_events")
    if duplicates and not info["options"]["drop_duplicates"]:
        notes.append(
            "Exact duplicates of another event (same session, item and time): "
            f"{duplicates:,}; --drop-duplicates drops them."
        )
    for split, shared in info.get("shared_sessions", {}).items():
        if shared:
            notes.append(
                f"Warning: the table for {split} shares the ids of "
                f"{counted(shared, 'session')} with earlier splits. If they are the same sessions, "
                "a model is scored on its training data: split whole sessions."
            )
    options = info.get("options", {})
    is_counted_back = not options.get("test_from") and options.get("split") != "given"
    timed = [info["splits"][split] for split in SPLITS if "first_time" in info["splits"][split]]
    for earlier, later in pairwise(timed):
        days = (later["first_time"] - earlier["last_time"]) / DAY
        if days > LONG_GAP_DAYS:
            begin = _moment(later["first_time"])
            notes.append(
                f"No event lies in the {days:,.0f} days before {begin}, where a held-out split "
                "begins: are the times from there on right?"
                + (" Splits are counted back from the latest start." if is_counted_back else "")
            )
    test = info["splits"]["test"]
    if test.get("lost_predictions"):
        notes.append(
            f"Test lost {counted(test['unseen_events'], 'event')} of items that "
            f"{options.get('catalogue') or 'training'} lacks, and with them "
            f"{counted(test['lost_predictions'], 'prediction')}; `tron evaluate` also gives the "
            "figures that count these as misses."
        )
    unseen = info.get("items_unseen_in_train")
    if unseen:
        events = info["splits"]["val"].get("events_unseen_in_train", 0)
        notes.append(
            f"Train lacks {counted(unseen, 'item')} of the catalogue, on which val has "
            f"{counted(events, 'event')}."
        )
    return notes


def _published_table(info: dict[str, Any]) -> str:
    period, test = info["training_period"], info["splits"]["test"]
    # Where a publication counts before the last step, the source gives the counts of that step.
    ours = info.get("published_counts") or {
        "train sessions": period["sessions"],
        "train events": period["events"],
        "test sessions": test["sessions"],
        "test events": test["events"],
        "items": info["num_items"],
    }
    rows = [
        [name, published, f"{ours[name]:,}", "yes" if agrees(ours[name], published) else "differs"]
        for name, published in PUBLISHED[info["source"]].items()
    ]
    return format_table(
        ["size after preparation (train with val)", "published", "here", "agrees"], rows
    )


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
