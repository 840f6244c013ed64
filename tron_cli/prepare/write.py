"""Splits -> prepared dataset: the catalogue, what test loses to it, the arrays and dataset.json."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from tron_cli.data.dataset import DATASET_NAME, SPLITS, Dataset, DatasetWriter, Sessions
from tron_cli.errors import InputError, RunError, counted
from tron_cli.prepare.earlier import Earlier
from tron_cli.prepare.fetching.raw import describe
from tron_cli.prepare.filters import Steps, drop_short
from tron_cli.prepare.reading.bad_lines import BadLines
from tron_cli.prepare.sessions import (
    IdKeys,
    drop_events,
    order_by_first_event,
    take,
    take_where,
)
from tron_cli.prepare.split import Splits

CHUNK_SESSIONS = 1 << 18  # written at a time, since text ids are Python objects until then


def dataset_path(data_dir: Path, name: str, *inputs: Path | None) -> Path:
    """Return DATA_DIR/NAME; raise InputError unless NAME is a plain folder name other than raw.

    inputs: the files that are read, which may not lie in the folder, since --force replaces it.
    """
    if name == "raw" or len(name.encode()) > 100 or not re.fullmatch(DATASET_NAME, name):
        raise InputError(
            f"--name {name!r} is not a folder name to use: take up to 100 letters, digits, _ . + "
            "and -"
        )
    path = data_dir / name
    for file in inputs:
        if file is not None and file.resolve().is_relative_to(path.resolve()):
            raise InputError(f"{file} lies in {path}, which is to be replaced; move it elsewhere")
    return path


def in_order_of_appearance(sessions: Sessions) -> np.ndarray:
    """Return the distinct items in order of appearance, sessions sorted by first event: int64."""
    events = len(sessions.items)
    first = np.full(int(sessions.items.max(initial=-1)) + 1, events)
    done = 0
    for chunk in _by_first_event(sessions):
        items, places = np.unique(chunk.items, return_index=True)
        first[items] = np.minimum(first[items], done + places)
        done += len(chunk.items)
    order = np.argsort(first, kind="stable")
    return order[: np.count_nonzero(first < events)]


def refuse_copies(files: list[Path], parts: list[Sessions]) -> None:
    """Raise InputError where two splits, each of its own file, hold the same sessions.

    They need not be in the same order.
    """
    for (one, first), (other, second) in combinations(zip(files, parts, strict=True), 2):
        if (
            len(first) == len(second)
            and len(first.items) == len(second.items)
            and _sorted(first) == _sorted(second)
        ):
            raise InputError(
                f"{one} and {other} hold the same sessions: a model would be scored on its own "
                "training sessions; give different files"
            )


def refuse_empty_val(sessions: Sessions, file: Path, min_length: int) -> None:
    """Raise InputError where the filters left no session of the given validation file."""
    if not len(sessions):
        raise InputError(
            f"no session is left for the val split: {file} has none of {min_length} events or more "
            "after the filters; leave --val out, or give more"
        )


def _sorted(sessions: Sessions) -> list[bytes]:
    return sorted(part.tobytes() for part in np.split(sessions.items, sessions.offsets[1:-1]))


def write_splits(
    writer: DatasetWriter,
    splits: Splits,
    *,
    item_ids: np.ndarray,
    catalogue: np.ndarray,
    name: str,
    protocol: str,
    source: str,
    options: dict[str, Any],
    files: list[Path],
    steps: Steps,
    bad: BadLines,
    earlier: Earlier | None = None,
    session_keys: IdKeys | None = None,
    user_keys: IdKeys | None = None,
    **info: Any,
) -> Dataset:
    """Index the items, drop what the catalogue lacks, write and open the dataset.

    item_ids: original id of each position; catalogue: int64 [I], the position of item i in entry
    i - 1, made of the items of splits.period; earlier: the catalogue to take instead. session_keys,
    user_keys: give the ids of the keys that the sessions hold; without them the keys are the ids.
    info: more for dataset.json.
    """
    index, kept_ids = _catalogue_index(item_ids, catalogue, earlier)
    known = index > 0
    drop = _drop_unknown_targets if protocol == "last-item" else _drop_unknown_items
    kept, counts = drop(splits, known, steps, earlier)
    for split in ("train", "test"):
        if not len(getattr(kept, split)):
            raise _nothing_left(split, getattr(splits, split), known, protocol, earlier, steps)
    chunks = partial(_chunks, index=index, session_keys=session_keys, user_keys=user_keys)
    in_train = np.zeros(len(kept_ids) + 1, bool)
    in_train[index[kept.train.items]] = True
    writer.write_items(kept_ids)
    unseen_in_train = int(np.count_nonzero(~in_train[index[kept.val.items]]))
    written = [
        writer.write_split("train", chunks(kept.train), **counts["train"]),
        writer.write_split(
            "val", chunks(kept.val), **counts["val"], events_unseen_in_train=unseen_in_train
        ),
        writer.write_split(
            "test",
            chunks(kept.test),
            **counts["test"],
            short_sessions=len(splits.test) - len(kept.test),
        ),
    ]
    check_books(steps, written, protocol)
    return writer.finish(
        name=name,
        protocol=protocol,
        source=source,
        options=options,
        sources=[describe(file) for file in files],
        bad_lines=bad.info(),
        filters=steps.entries,
        training_period={
            "sessions": len(splits.period),
            "events": len(splits.period.items),
        },
        items_unseen_in_train=int(np.count_nonzero(~in_train[1:])),
        **info,
    )


def _catalogue_index(
    item_ids: np.ndarray, catalogue: np.ndarray, earlier: Earlier | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the item of each position, int32, 0 where there is none; and the ids of the items."""
    if earlier is not None:
        return earlier.numbers(item_ids), earlier.item_ids
    index = np.zeros(len(item_ids), np.int32)
    index[catalogue] = np.arange(1, len(catalogue) + 1)
    return index, item_ids[catalogue]


def _chunks(
    sessions: Sessions,
    *,
    index: np.ndarray,
    session_keys: IdKeys | None,
    user_keys: IdKeys | None,
) -> Iterator[Sessions]:
    """Yield the sessions by their first event, with items and original ids, some at a time."""
    # Only now: dropped events may have been the first ones of their sessions.
    for chunk in _by_first_event(sessions):
        yield Sessions(
            index[chunk.items],
            chunk.offsets,
            chunk.times,
            _ids(session_keys, chunk.session_ids),
            _ids(user_keys, chunk.user_ids),
        )


def _by_first_event(sessions: Sessions) -> Iterator[Sessions]:
    """Yield the sessions by their first event, some at a time, so that few are copied."""
    order = order_by_first_event(sessions)
    for start in range(0, len(order), CHUNK_SESSIONS):
        yield take(sessions, order[start : start + CHUNK_SESSIONS])


def check_books(steps: Steps, written: list[dict[str, Any]], protocol: str) -> None:
    """Raise RunError unless the counts of the last step are those of the written splits.

    Where each row of val and test is a whole history, only its last event is kept by them; how
    many histories any split holds is not known from the splits alone.
    """
    last_item = protocol == "last-item"
    events = sum(
        split["sessions" if last_item and at else "events"] for at, split in enumerate(written)
    )
    sessions = None if last_item else sum(split["sessions"] for split in written)
    end = steps.entries[-1]
    if end["events"] != events or sessions not in (None, end["sessions"]):
        of_sessions = "" if sessions is None else f"{sessions:,} sessions and "
        raise RunError(
            f"internal error: the steps of preparation end with {end['sessions']:,} sessions and "
            f"{end['events']:,} events, but {of_sessions}{events:,} events were written; report it"
        )


def lost_predictions(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count predictions lost by kept sessions, and, if any, by each that became too short.

    int64 each; before, after: int64 [S], lengths with and without the unknown items.
    """
    is_kept = after >= 2
    lost = np.maximum(before - 1, 0) - np.where(is_kept, after - 1, 0)
    return lost[is_kept], lost[~is_kept & (lost > 0)]


def _nothing_left(
    split: str,
    sessions: Sessions,
    known: np.ndarray,
    protocol: str,
    earlier: Earlier | None,
    steps: Steps,
) -> InputError:
    """Return the error of an empty split; sessions: those before unknown items were dropped."""
    if not len(sessions):
        return InputError(
            f"no session is left for the {split} split ({_story(steps)}): "
            "give more data, shorter test and validation stretches, or weaker filters"
        )
    of_what, items = "items", np.unique(sessions.items)
    cure = "sessions of the same catalogue, with the same item ids"
    if protocol == "last-item":
        of_what, items = "last items", np.unique(sessions.items[sessions.offsets[1:] - 1])
        cure = "longer histories, or weaker filters"
    return InputError(
        f"no session is left for the {split} split: of the {len(items):,} different {of_what} of "
        f"its {counted(len(sessions), 'session')}, {earlier.given if earlier else 'training'} has "
        f"{np.count_nonzero(known[items]):,}; give {cure}"
    )


Counts = dict[str, dict[str, Any]]  # of each split, for DatasetWriter.write_split


def _drop_unknown_items(
    splits: Splits, known: np.ndarray, steps: Steps, earlier: Earlier | None
) -> tuple[Splits, Counts]:
    """Drop unknown items, then short sessions; train and val have some with `earlier` only."""
    counts: Counts = {}
    kept: dict[str, Sessions] = {}
    short_sessions = short_events = 0
    for split in SPLITS:
        before: Sessions = getattr(splits, split)
        seen = drop_events(before, known[before.items])
        kept[split] = drop_short(seen, 2)
        short_sessions += len(before) - len(kept[split])
        short_events += len(seen.items) - len(kept[split].items)
        counts[split] = {"unseen_events": len(before.items) - len(seen.items)}
        if split != "train":
            lost, of_others = lost_predictions(before.lengths, seen.lengths)
            lost = np.append(lost[order_by_first_event(kept[split])], of_others)
            counts[split]["lost_predictions"] = lost
    unseen = sum(count["unseen_events"] for count in counts.values())
    why = earlier.lacks if earlier else "of test: the training period lacks them"
    steps.drop("unknown items", 0, unseen, why)
    steps.drop("short sessions left", short_sessions, short_events, "fewer than 2 events left")
    return replace(splits, train=kept["train"], val=kept["val"], test=kept["test"]), counts


def _drop_unknown_targets(
    splits: Splits, known: np.ndarray, steps: Steps, earlier: Earlier | None
) -> tuple[Splits, Counts]:
    """Drop histories whose last item is unknown; their other items are all known."""
    test = splits.test
    is_known = known[test.items[test.offsets[1:] - 1]]
    kept = take_where(test, is_known)
    lost = len(test) - len(kept)
    assert splits.in_others is not None
    gone = int(np.count_nonzero(~is_known & ~splits.in_others))
    why = earlier.lacks if earlier else "of test: the training period lacks them"
    steps.drop("unknown targets", gone, lost, why)
    lost_of_sessions = np.repeat([0, 1], [len(kept), lost])
    counts: Counts = {"train": {}, "val": {}, "test": {}}
    counts["test"] = {"unseen_events": lost, "lost_predictions": lost_of_sessions}
    return replace(splits, test=kept), counts


def _ids(keys: IdKeys | None, of_sessions: np.ndarray | None) -> np.ndarray | None:
    return of_sessions if keys is None or of_sessions is None else keys.ids(of_sessions)


def _story(steps: Steps) -> str:
    """Describe the number of sessions read, and the steps that dropped some of them."""
    # Before the kinds of events are chosen, sessions are not known.
    known = [step for step in steps.entries if step["sessions"] is not None]
    drops = [
        f"{step['step']} dropped {step['dropped_sessions']:,}"
        for step in known
        if step["dropped_sessions"]
    ]
    return "; ".join([f"read {counted(known[0]['sessions'], 'session')}", *drops])
