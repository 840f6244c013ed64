"""OTTO: clicks of an online shop, one session per line of JSON (Kaggle: otto/recsys-dataset).

TRON's protocol: clicks only, no filter by support, the data set's own training and test file; the
catalogue is every item that is clicked in the training file. Two passes keep 11 GB out of memory:
the first reads the training file block by block and writes its clicks to a spool on disk; the
second, which knows the catalogue and the end of the period, splits, indexes and writes them in the
order of the file. In both, threads do the work per event, and the results are collected in order.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from tron_cli.data.dataset import Dataset, DatasetWriter, Sessions
from tron_cli.errors import InputError, counted
from tron_cli.prepare.earlier import Earlier, earlier_catalogue
from tron_cli.prepare.fetching.raw import SOURCES, locate
from tron_cli.prepare.filters import Steps, drop_short
from tron_cli.prepare.reading.bad_lines import BadLines
from tron_cli.prepare.reading.inputs import check_distinct, input_files
from tron_cli.prepare.reading.otto_lines import MAX_AID, Clicks, read_clicks
from tron_cli.prepare.sessions import drop_events, take_where
from tron_cli.prepare.sources.otto_files import RawFile, by_first_session
from tron_cli.prepare.sources.otto_spool import Spool, SpoolBlock
from tron_cli.prepare.split import DAY, WHY_LATE, check_latest, sample_rows
from tron_cli.prepare.write import check_books, dataset_path, lost_predictions

MAX_THREADS = 8  # with more, the collecting thread is the bottleneck
MIN_CLICKS = 2

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def prepare_otto(
    raw: Path | None,
    data_dir: Path,
    name: str = "otto",
    *,
    train: Sequence[Path] = (),
    test: Sequence[Path] = (),
    force: bool = False,
    val_days: float = 2,
    max_val_sessions: int = 100_000,
    seed: int = 42,
    skip_bad_lines: bool = False,
    catalogue: str | None = None,
) -> Dataset:
    """Prepare OTTO's clicks; items are numbered in the order of their ids.

    Sessions with fewer than two clicks are dropped. Validation: of the sessions whose first click
    is at most `val_days` before the last click of the training file, a seeded sample of at most
    `max_val_sessions`; the other training sessions keep only the clicks from before that stretch.
    Test: clicks on items that the training file lacks are dropped, then sessions with fewer than
    two. With an earlier `catalogue` all parts lose the clicks on items that it lacks, and the
    sessions that this leaves with fewer than two. A line with an event that is not a click,
    cart or order is broken: InputError, or with `skip_bad_lines` it is skipped and counted.

    train, test: instead of `raw`, files, folders of parts or patterns, in any order: files are read
    in the order of their first sessions.
    """
    given = _given(raw, train, test)
    inputs = [raw, *(path for found in given.values() for path in found)]
    with DatasetWriter(dataset_path(data_dir, name, *inputs), force=force) as writer:
        earlier = earlier_catalogue(catalogue, data_dir)
        files = {} if given else locate("otto", raw, data_dir)
        paths = given or {file: [files[file]] for file in SOURCES["otto"].files}
        train_files, test_files = (by_first_session(found) for found in paths.values())
        bad = BadLines(skip=skip_bad_lines)
        with (
            Spool(writer.scratch) as spool,
            _Threads() as threads,
        ):
            steps, test_steps = Steps(), Steps()
            item_ids, end, last = _read_training(train_files, bad, spool, steps, threads)
            index = _index(item_ids)
            if earlier is not None:
                index = _index(earlier.item_ids)
                earlier.checked(index.take(item_ids, mode="clip"), item_ids)
                item_ids = earlier.item_ids
            tested, test_counts = _read_test(test_files, bad, index, test_steps, threads, earlier)
            writer.write_items(item_ids)
            boundary = end - val_days * DAY if val_days > 0 else np.inf
            if val_days > 0:
                check_latest(spool.starts, spool.starts >= boundary, end, last)
            written, seen_in_train = _write_training(
                writer, spool, index, boundary, max_val_sessions, seed, steps, threads, earlier
            )
            sources = _described([*train_files, *test_files])
            check_books(steps, written, "every-step")
            check_books(
                test_steps, [writer.write_split("test", tested, **test_counts)], "every-step"
            )
            return writer.finish(
                name=name,
                protocol="every-step",
                source="otto",
                options={
                    "raw": str(raw) if raw else None,
                    **_recorded(train, test),
                    "val_days": val_days,
                    "max_val_sessions": max_val_sessions,
                    "seed": seed,
                    "skip_bad_lines": skip_bad_lines,
                    "catalogue": catalogue,
                },
                sources=sources,
                bad_lines=bad.info(),
                filters=steps.entries,
                test_filters=test_steps.entries,
                # TRON's published counts are of all sessions and clicks of the files.
                published_counts={
                    "train sessions": steps.entries[0]["sessions"],
                    "train events": steps.entries[1]["events"],
                    "test sessions": test_steps.entries[0]["sessions"],
                    "test events": test_steps.entries[1]["events"],
                    "items": len(item_ids),
                },
                training_period={"sessions": len(spool.lengths), "events": spool.events},
                items_unseen_in_train=len(item_ids) - seen_in_train,
            )


def _given(raw: Path | None, train: Sequence[Path], test: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the files of --train and --test, if these are given."""
    if bool(train) != bool(test) or (train and raw):
        raise InputError("expected --train and --test for files of your own, without --raw")
    if not train:
        return {}
    found = {"train": input_files(train, "--train"), "test": input_files(test, "--test")}
    check_distinct([*found["train"], *found["test"]])
    return found


def _recorded(train: Sequence[Path], test: Sequence[Path]) -> dict[str, list[str]]:
    return {"train": list(map(str, train)), "test": list(map(str, test))} if train else {}


def _described(files: list[RawFile]) -> list[dict[str, Any]]:
    """Describe the files for dataset.json; raise InputError where two of them are the same."""
    sources = [file.description() for file in files]
    for (one, first), (other, second) in combinations(zip(files, sources, strict=True), 2):
        if first["sha256"] == second["sha256"]:
            raise InputError(
                f"{one.path} and {other.path} hold the same sessions, which would count double, or "
                "be in training and test; give different files"
            )
    return sources


def _index(item_ids: np.ndarray) -> np.ndarray:
    """Return the item of each aid, 0 if there is none: int32; the last entry is for larger aids."""
    if item_ids.dtype == object:  # aids are integers
        return np.zeros(1, np.int32)
    is_aid = (item_ids >= 0) & (item_ids <= MAX_AID)
    aids = item_ids[is_aid]
    index = np.zeros(int(aids.max(initial=-1)) + 2, np.int32)
    index[aids] = np.flatnonzero(is_aid) + 1
    return index


class _Tally:
    """Counts of sessions, events and distinct items."""

    def __init__(self, sessions: int = 0, events: int = 0, seen: np.ndarray | None = None) -> None:
        self.sessions = sessions
        self.events = events
        self._seen = np.zeros(1 << 20, bool) if seen is None else seen

    def add(self, sessions: int, aids: np.ndarray) -> None:
        self.sessions += sessions
        self.events += len(aids)
        largest = int(aids.max(initial=0))
        if largest >= len(self._seen):
            self._seen = np.concatenate((self._seen, np.zeros(largest + 1, bool)))
        self._seen[aids] = True

    def __add__(self, other: _Tally) -> _Tally:
        shorter, longer = sorted((self._seen, other._seen), key=len)
        seen = longer.copy()
        seen[: len(shorter)] |= shorter
        return _Tally(self.sessions + other.sessions, self.events + other.events, seen)

    @property
    def items(self) -> np.ndarray:
        """Distinct aids, ascending: int64."""
        return np.flatnonzero(self._seen)


def _record(steps: Steps, tallies: dict[str, tuple[_Tally, str]]) -> None:
    for step, (tally, why) in tallies.items():
        steps.count(step, tally.sessions, tally.events, len(tally.items), why)


def _read_training(
    files: list[RawFile], bad: BadLines, spool: Spool, steps: Steps, threads: _Threads
) -> tuple[np.ndarray, int, str]:
    """Spool the sessions of at least two clicks.

    Returns all aids, ascending; the last click in ms; the file of it.
    """
    kept, short, others = _Tally(), _Tally(), _Tally()
    end, last = 0, ""
    for file, clicks, (long_enough, short_aids) in _clicks(files, bad, _without_short, threads):
        kept.add(len(long_enough), long_enough.items)
        short.add(_count(clicks.lengths > 0) - len(long_enough), short_aids)
        others.add(_count(clicks.lengths == 0), clicks.other_aids)
        spool.append(long_enough)
        end, last = max((end, last), (int(clicks.times.max(initial=0)), str(file.path)))
    clicked = kept + short
    read = clicked + others
    if not kept.sessions:
        raise InputError(_too_short(files, "", read.sessions))
    _record(
        steps,
        {
            "read": (read, ""),
            "clicks": (clicked, "carts and orders are not used"),
            "short sessions": (kept, f"sessions of fewer than {MIN_CLICKS} clicks"),
        },
    )
    return clicked.items, end, last


def _too_short(files: list[RawFile], which: str, sessions: int) -> str:
    """Say that no session of the files has enough clicks."""
    others = f" and {counted(len(files) - 1, 'other file')}" if files[1:] else ""
    have, their = ("have", "their") if others else ("has", "its")
    return (
        f"{files[0].path}{others} {have} no session with {MIN_CLICKS} clicks{which} among {their} "
        f"{counted(sessions, 'session')}"
    )


def _without_short(clicks: Clicks) -> tuple[Sessions, np.ndarray]:
    """Return (sessions of at least two clicks, the aids of the others)."""
    is_short = np.repeat(clicks.lengths < MIN_CLICKS, clicks.lengths)
    return drop_short(_sessions(clicks), MIN_CLICKS), clicks.aids[is_short]


def _read_test(
    files: list[RawFile],
    bad: BadLines,
    index: np.ndarray,
    steps: Steps,
    threads: _Threads,
    earlier: Earlier | None,
) -> tuple[list[Sessions], dict[str, Any]]:
    """Read (test sessions, indexed, block by block; counts of what the catalogue lacks)."""
    clicked, others, known, kept = _Tally(), _Tally(), _Tally(), _Tally()
    test: list[Sessions] = []
    lost: list[tuple[np.ndarray, np.ndarray]] = []
    for _, clicks, covered in _clicks(files, bad, partial(_covered, index=index), threads):
        long_enough = drop_short(covered, MIN_CLICKS)
        clicked.add(_count(clicks.lengths > 0), clicks.aids)
        others.add(_count(clicks.lengths == 0), clicks.other_aids)
        known.add(_count(covered.lengths > 0), covered.items)
        kept.add(len(long_enough), long_enough.items)
        lost.append(lost_predictions(clicks.lengths, covered.lengths))
        test.append(_indexed(long_enough, index))
    read = clicked + others
    if not kept.sessions:
        why = _too_short(files, " on items of the training file", read.sessions)
        raise InputError(f"{why}: do the two files belong together?")
    _record(
        steps,
        {
            "read": (read, ""),
            "clicks": (clicked, "carts and orders are not used"),
            "unknown items": (
                known,
                earlier.lacks if earlier else "clicks on items that the training file lacks",
            ),
            "short sessions": (kept, f"sessions of fewer than {MIN_CLICKS} clicks"),
        },
    )
    return test, {
        "unseen_events": clicked.events - known.events,
        "lost_predictions": _in_order(lost),
        "short_sessions": read.sessions - kept.sessions,
    }


def _in_order(lost: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Join the predictions lost by kept sessions of all blocks, then those lost by the others."""
    nothing = np.zeros(0, np.int64)
    return np.concatenate([nothing, *(kept for kept, _ in lost), *(others for _, others in lost)])


def _covered(clicks: Clicks, index: np.ndarray) -> Sessions:
    """Return the clicks on items of the catalogue."""
    sessions = _sessions(clicks)
    return drop_events(sessions, _positions(sessions, index) > 0)


def _write_training(
    writer: DatasetWriter,
    spool: Spool,
    index: np.ndarray,
    boundary: float,
    max_val_sessions: int,
    seed: int,
    steps: Steps,
    threads: _Threads,
    earlier: Earlier | None,
) -> tuple[list[dict[str, Any]], int]:
    """Write train and val, split at `boundary` (ms); return (their counts, items of train)."""
    lengths = spool.lengths
    held_out = spool.starts >= boundary
    candidates = np.flatnonzero(held_out)
    in_val = np.zeros(len(held_out), bool)
    in_val[candidates[sample_rows(len(candidates), max_val_sessions, seed)]] = True
    in_train = np.zeros(int(index.max()) + 1, bool)
    # Dropped (sessions, events).
    late, unknown, short = np.zeros((3, 2), np.int64)

    def early(block: SpoolBlock) -> tuple[int, Sessions, Sessions, Sessions, Sessions]:
        sessions = block.read()
        before = take_where(sessions, ~held_out[block.rows])
        assert before.times is not None
        cut = drop_short(drop_events(before, before.times < boundary), MIN_CLICKS)
        seen = _seen(cut, index)
        kept = drop_short(seen, MIN_CLICKS)
        in_train[kept.items] = True  # all threads write the same value
        return len(sessions), before, cut, seen, kept

    def train() -> Iterator[Sessions]:
        nonlocal late, unknown, short
        with tqdm(total=len(lengths), desc="train", unit=" sessions", disable=None) as bar:
            for read, before, cut, seen, kept in threads.in_order(early, spool.blocks()):
                late += _size(before) - _size(cut)
                unknown += _size(cut) - _size(seen)
                short += _size(seen) - _size(kept)
                bar.update(read)
                yield kept

    written = [writer.write_split("train", train())]
    written[0]["unseen_events"] = int(unknown[1])  # not known before
    if not written[0]["sessions"]:
        strange = f", or on items that {earlier.given} lacks" if earlier else ""
        raise InputError(
            "no session is left for the train split: all lie in the last days, which validation "
            f"takes{strange}; pass a smaller --val-days"
        )
    val, val_counts, val_unknown, val_short = _read_val(spool, in_val, index)
    unknown += val_unknown
    short += val_short
    unseen_in_train = sum(_count(~in_train[v.items]) for v in val)
    written.append(
        writer.write_split("val", val, **val_counts, events_unseen_in_train=unseen_in_train)
    )
    steps.drop("late events", int(late[0]), int(late[1]), WHY_LATE)
    beyond = held_out & ~in_val
    why = f"validation sessions beyond {max_val_sessions:,}"
    steps.drop("validation sample", _count(beyond), int(lengths[beyond].sum()), why)
    if earlier is not None:
        steps.drop("unknown items", 0, int(unknown[1]), earlier.lacks)
        why = f"fewer than {MIN_CLICKS} clicks left"
        steps.drop("short sessions left", int(short[0]), int(short[1]), why)
    return written, _count(in_train)


def _read_val(
    spool: Spool, in_val: np.ndarray, index: np.ndarray
) -> tuple[list[Sessions], dict[str, Any], np.ndarray, np.ndarray]:
    """Return the sessions of val, block by block, and counts of what the catalogue lacks.

    Behind them: dropped (sessions, events) by unknown items, and by what these left short.
    """
    val: list[Sessions] = []
    lost: list[tuple[np.ndarray, np.ndarray]] = []
    unknown, short = np.zeros((2, 2), np.int64)
    for block in spool.blocks(wanted=in_val):
        whole = take_where(block.read(), in_val[block.rows])
        seen = _seen(whole, index)
        val.append(drop_short(seen, MIN_CLICKS))
        lost.append(lost_predictions(whole.lengths, seen.lengths))
        unknown += _size(whole) - _size(seen)
        short += _size(seen) - _size(val[-1])
    counts = {"unseen_events": int(unknown[1]), "lost_predictions": _in_order(lost)}
    return val, counts, unknown, short


def _size(sessions: Sessions) -> np.ndarray:
    return np.array([len(sessions), len(sessions.items)])


def _count(flags: np.ndarray) -> int:
    return int(np.count_nonzero(flags))


def _sessions(clicks: Clicks) -> Sessions:
    offsets = np.append(0, np.cumsum(clicks.lengths))
    return Sessions(clicks.aids, offsets, clicks.times, clicks.sessions)


def _seen(sessions: Sessions, index: np.ndarray) -> Sessions:
    """Return sessions of items, without the clicks that the catalogue lacks."""
    indexed = _indexed(sessions, index)
    return drop_events(indexed, indexed.items > 0)


def _indexed(sessions: Sessions, index: np.ndarray) -> Sessions:
    return replace(sessions, items=_positions(sessions, index))


def _positions(sessions: Sessions, index: np.ndarray) -> np.ndarray:
    """Return the item of each event, 0 where the catalogue lacks it: int32 [E]."""
    return index.take(sessions.items, mode="clip")


def _clicks(
    files: list[RawFile], bad: BadLines, further: Callable[[Clicks], _Out], threads: _Threads
) -> Iterator[tuple[RawFile, Clicks, _Out]]:
    """Yield the clicks of files with the result of `further`, block by block, in order."""
    for file in files:

        def read(text: bytearray, free: list[bytearray] = file.free) -> tuple[Clicks, _Out]:
            clicks = read_clicks(text)
            free.append(text)
            return clicks, further(clicks)

        line = 0
        for clicks, result in threads.in_order(read, file.blocks()):
            for line_of_block, problem in clicks.bad:
                bad.reject(file.path, line + line_of_block, problem)
            line += clicks.lines
            yield file, clicks, result


class _Threads(ThreadPoolExecutor):
    """Thread pool with a thread per core."""

    def __init__(self) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._count = min(cores or 1, MAX_THREADS)
        super().__init__(self._count)
        # glibc returns freed memory to the system and gets it back page by page for the next array,
        # unless the memory is less than twice the largest block freed so far.
        bytearray(24 << 20)

    def in_order(self, function: Callable[[_In], _Out], inputs: Iterable[_In]) -> Iterator[_Out]:
        """Yield function(input) of each input, in order; some are computed ahead."""
        pending: deque[Future[_Out]] = deque()
        for each in inputs:
            pending.append(self.submit(function, each))
            if len(pending) > 2 * self._count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
