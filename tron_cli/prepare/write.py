"""Splits -> prepared dataset: the catalogue, what test loses to it, the arrays and dataset.json."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tron_cli.data.dataset import DATASET_NAME, SPLITS, Dataset, DatasetWriter, Sessions
from tron_cli.errors import InputError, RunError, counted
from tron_cli.prepare.earlier import Earlier
from tron_cli.prepare.fetching.raw import describe
from tron_cli.prepare.filters import Steps, drop_short, grown
from tron_cli.prepare.reading.bad_lines import BadLines
from tron_cli.prepare.session_files import Bounds, SortedSessions, by_first_event
from tron_cli.prepare.sessions import (
    IdKeys,
    drop_events,
    first_keys,
    take_where,
)
from tron_cli.prepare.split import Splits

_NEVER = np.iinfo(np.int64).max


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


def in_order_of_appearance(parts: Iterable[Sessions]) -> np.ndarray:
    """Return the distinct items in order of appearance, sessions sorted by first event: int64.

    parts: all sessions, in one part or several with places.
    """
    # Start and place of the first session of each item, and the position in it.
    first = np.full((3, 0), _NEVER)
    for sessions in parts:
        # Places of one part alone too: those of a chunk begin anew.
        placed = replace(sessions, places=first_keys(sessions)[1])
        for chunk in by_first_event(placed):
            items, at = np.unique(chunk.items, return_index=True)
            row = np.searchsorted(chunk.offsets, at, side="right") - 1
            found = np.stack([*(key[row] for key in first_keys(chunk)), at - chunk.offsets[row]])
            missing = int(items.max(initial=-1)) + 1 - first.shape[1]
            first = np.pad(first, ((0, 0), (0, max(missing, 0))), constant_values=_NEVER)
            known = first[:, items]
            differs = found != known
            at = np.argmax(differs, axis=0)  # the first key that differs decides
            columns = np.arange(len(items))
            is_first = found[at, columns] < known[at, columns]
            first[:, items[is_first]] = found[:, is_first]
    order = np.lexsort(first[::-1])
    return order[: np.count_nonzero(first[0] < _NEVER)]


@dataclass
class Content:
    """Content of a table whatever the order of its sessions, which may come in parts."""

    sessions: int = 0
    events: int = 0
    digest: int = 0

    def add(self, sessions: Sessions) -> Content:
        """Add the sessions of a part."""
        place = np.arange(len(sessions.items)) - np.repeat(sessions.offsets[:-1], sessions.lengths)
        events = pl.Series(sessions.items.astype(np.int64) << 32 | place).hash().to_numpy()
        sums = np.append(np.uint64(0), np.cumsum(events))[sessions.offsets]  # modulo 2^64
        self.sessions += len(sessions)
        self.events += len(events)
        self.digest += int(pl.Series(np.diff(sums)).hash().to_numpy().sum())
        self.digest %= 1 << 64
        return self


def refuse_copies(files: list[Path], contents: list[Content]) -> None:
    """Raise InputError where two splits, each of its own file, hold the same sessions."""
    for (one, first), (other, second) in combinations(zip(files, contents, strict=True), 2):
        if first == second:
            raise InputError(
                f"{one} and {other} hold the same sessions: a model would be scored on its own "
                "training sessions; give different files"
            )


def refuse_empty_val(sessions: int, file: Path, min_length: int) -> None:
    """Raise InputError where the filters left no session of the given validation file."""
    if not sessions:
        raise InputError(
            f"no session is left for the val split: {file} has none of {min_length} events or more "
            "after the filters; leave --val out, or give more"
        )


class _Split:
    """Sessions of one split, in parts, and what is counted of them."""

    def __init__(self, folder: Path, bounds: Bounds, num_items: int) -> None:
        self.sorted = SortedSessions(folder, bounds)
        self.sessions = self.unseen_events = self.short_sessions = 0
        self.items = np.zeros(num_items + 1, np.int64)  # events of each item
        self.wanted = np.zeros(0, bool)  # distinct positions before unknown items were dropped
        self._lost: list[tuple[np.ndarray, ...]] = []

    def add(self, kept: _Kept, index: np.ndarray) -> None:
        """Add what is left of a part."""
        sessions = kept.sessions
        self.sessions += len(sessions)
        self.unseen_events += kept.unseen_events
        self.short_sessions += kept.before - len(sessions)
        self.items += np.bincount(index[sessions.items], minlength=len(self.items))
        self.wanted = grown(self.wanted, int(kept.wanted.max(initial=-1)) + 1)
        self.wanted[kept.wanted] = True
        # Of train nothing is lost, and its keys are many.
        keys = first_keys(sessions) if len(kept.lost) else (kept.lost, kept.lost)
        self._lost.append((*keys, kept.lost, kept.places_of_others, kept.lost_of_others))
        self.sorted.add(sessions)

    @property
    def counts(self) -> dict[str, Any]:
        """Arguments of `DatasetWriter.write_split`."""
        starts, places, lost, places_of_others, others = (
            np.concatenate(arrays) for arrays in zip(*self._lost, strict=True)
        )
        lost = lost[np.lexsort((places, starts))]
        others = others[np.argsort(places_of_others, kind="stable")]
        return {"unseen_events": self.unseen_events, "lost_predictions": np.append(lost, others)}


def write_splits(
    writer: DatasetWriter,
    splits: Iterable[Splits],
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
    bounds: Bounds | None = None,
    earlier: Earlier | None = None,
    session_keys: IdKeys | None = None,
    user_keys: IdKeys | None = None,
    **info: Any,
) -> Dataset:
    """Index the items, drop what the catalogue lacks, write and open the dataset.

    splits: of all sessions, in one part or several with places. item_ids: original id of each
    position; catalogue: int64 [I], the position of item i in entry i - 1, made of the items of the
    periods; earlier: the catalogue to take instead. bounds: of the buckets on disk in which several
    parts are sorted. session_keys, user_keys: give the ids of the keys that the sessions hold;
    without them the keys are the ids. info: more for dataset.json.
    """
    index, kept_ids = _catalogue_index(item_ids, catalogue, earlier)
    known = index > 0
    drop = _drop_unknown_targets if protocol == "last-item" else _drop_unknown_items
    found = {
        split: _Split(writer.scratch / split, bounds or Bounds(), len(kept_ids)) for split in SPLITS
    }
    period_sessions = period_events = 0
    for part in splits:
        period_sessions += len(part.period)
        period_events += len(part.period.items)
        for split, kept in drop(part, known, steps, earlier).items():
            found[split].add(kept, index)
    for split in ("train", "test"):
        if not found[split].sessions:
            raise _nothing_left(split, found[split], known, protocol, earlier, steps)
    chunks = partial(_chunks, index=index, session_keys=session_keys, user_keys=user_keys)
    writer.write_items(kept_ids)
    in_train = found["train"].items > 0
    more = {
        "train": {},
        "val": {"events_unseen_in_train": int(found["val"].items[~in_train].sum())},
        "test": {"short_sessions": found["test"].short_sessions},
    }
    written = [
        writer.write_split(split, chunks(found[split].sorted), **found[split].counts, **more[split])
        for split in SPLITS
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
        training_period={"sessions": period_sessions, "events": period_events},
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
    chunks: Iterable[Sessions],
    *,
    index: np.ndarray,
    session_keys: IdKeys | None,
    user_keys: IdKeys | None,
) -> Iterator[Sessions]:
    """Yield chunks of sessions with their items and original ids."""
    for chunk in chunks:
        yield Sessions(
            index[chunk.items],
            chunk.offsets,
            chunk.times,
            _ids(session_keys, chunk.session_ids),
            _ids(user_keys, chunk.user_ids),
        )


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
    found: _Split,
    known: np.ndarray,
    protocol: str,
    earlier: Earlier | None,
    steps: Steps,
) -> InputError:
    """Return the error of an empty split."""
    if not found.short_sessions:
        return InputError(
            f"no session is left for the {split} split ({_story(steps)}): "
            "give more data, shorter test and validation stretches, or weaker filters"
        )
    of_what, cure = "items", "sessions of the same catalogue, with the same item ids"
    if protocol == "last-item":
        of_what, cure = "last items", "longer histories, or weaker filters"
    items = np.flatnonzero(found.wanted)
    return InputError(
        f"no session is left for the {split} split: of the {len(items):,} different {of_what} of "
        f"its {counted(found.short_sessions, 'session')}, "
        f"{earlier.given if earlier else 'training'} has {np.count_nonzero(known[items]):,}; "
        f"give {cure}"
    )


@dataclass(frozen=True)
class _Kept:
    """Sessions of a split that are left without unknown items, of `before` sessions.

    wanted: items of all events, or of all targets, before. lost: predictions that each session
    lost, and lost_of_others, if any, each other one, at these places: int64.
    """

    sessions: Sessions
    before: int
    wanted: np.ndarray
    unseen_events: int
    lost: np.ndarray
    places_of_others: np.ndarray
    lost_of_others: np.ndarray


def _drop_unknown_items(
    splits: Splits, known: np.ndarray, steps: Steps, earlier: Earlier | None
) -> dict[str, _Kept]:
    """Drop unknown items, then short sessions; train and val have some with `earlier` only."""
    found: dict[str, _Kept] = {}
    short_sessions = short_events = 0
    for split in SPLITS:
        before: Sessions = getattr(splits, split)
        seen = drop_events(before, known[before.items])
        kept = drop_short(seen, 2)
        short_sessions += len(before) - len(kept)
        short_events += len(seen.items) - len(kept.items)
        unseen = len(before.items) - len(seen.items)
        lost, places, others = (np.zeros(0, np.int64) for _ in range(3))
        if split != "train":
            lost, others = lost_predictions(before.lengths, seen.lengths)
            places = first_keys(before)[1][(seen.lengths < 2) & (before.lengths >= 2)]
        found[split] = _Kept(kept, len(before), before.items, unseen, lost, places, others)
    unseen = sum(kept.unseen_events for kept in found.values())
    why = earlier.lacks if earlier else "of test: the training period lacks them"
    steps.drop("unknown items", 0, unseen, why)
    steps.drop("short sessions left", short_sessions, short_events, "fewer than 2 events left")
    return found


def _drop_unknown_targets(
    splits: Splits, known: np.ndarray, steps: Steps, earlier: Earlier | None
) -> dict[str, _Kept]:
    """Drop histories whose last item is unknown; their other items are all known."""
    test, nothing = splits.test, np.zeros(0, np.int64)
    targets = test.items[test.offsets[1:] - 1]
    is_known = known[targets]
    kept = take_where(test, is_known)
    lost = len(test) - len(kept)
    assert splits.in_others is not None
    gone = int(np.count_nonzero(~is_known & ~splits.in_others))
    why = earlier.lacks if earlier else "of test: the training period lacks them"
    steps.drop("unknown targets", gone, lost, why)
    others = np.zeros(len(kept), np.int64), np.zeros(lost, np.int64), np.ones(lost, np.int64)
    return {
        "train": _Kept(splits.train, len(splits.train), nothing, 0, nothing, nothing, nothing),
        "val": _Kept(splits.val, len(splits.val), nothing, 0, nothing, nothing, nothing),
        "test": _Kept(kept, len(test), targets, lost, *others),
    }


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
