"""OTTO: clicks of an online shop, one session per line of JSON (Kaggle: otto/recsys-dataset).

TRON's protocol: clicks only, no filter by support, the data set's own training and test file; the
catalogue is every item that is clicked in the training file. Two passes keep 11 GB out of memory:
the first reads the training file block by block and writes its clicks to a spool on disk; the
second, which knows the catalogue and the end of the period, splits, indexes and writes them in the
order of the file. In both, threads do the work per event, and the results are collected in order.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from tron_cli.data.dataset import Dataset, DatasetWriter, Sessions
from tron_cli.errors import InputError
from tron_cli.prepare.earlier import Earlier, earlier_catalogue
from tron_cli.prepare.fetching.raw import SOURCES, describe, is_compressed, locate, open_raw
from tron_cli.prepare.filters import Steps, drop_short
from tron_cli.prepare.reading.columns import MAX_LINE_BYTES, BadLines, text_blocks
from tron_cli.prepare.reading.otto_lines import MAX_AID, Clicks, read_clicks
from tron_cli.prepare.sessions import drop_events, first_times, take_where
from tron_cli.prepare.split import DAY, WHY_LATE, check_latest, sample_rows
from tron_cli.prepare.write import check_books, dataset_path, lost_predictions

BLOCK_BYTES = 1 << 22
SPOOL_SESSIONS = 1 << 16  # read back at a time
MAX_THREADS = 8  # with more, the collecting thread is the bottleneck
MIN_CLICKS = 2
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def prepare_otto(
    raw: Path | None,
    data_dir: Path,
    name: str = "otto",
    *,
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
    """
    with DatasetWriter(dataset_path(data_dir, name, raw), force=force) as writer:
        earlier = earlier_catalogue(catalogue, data_dir)
        files = locate("otto", raw, data_dir)
        train_file, test_file = (_RawFile(files[file]) for file in SOURCES["otto"].files)
        bad = BadLines(skip=skip_bad_lines)
        with (
            _Spool(writer.scratch) as spool,
            _Threads() as threads,
        ):
            steps, test_steps = Steps(), Steps()
            item_ids, end = _read_training(train_file, bad, spool, steps, threads)
            index = _index(item_ids)
            if earlier is not None:
                index = _index(earlier.item_ids)
                earlier.checked(index.take(item_ids, mode="clip"), item_ids)
                item_ids = earlier.item_ids
            test, test_counts = _read_test(test_file, bad, index, test_steps, threads, earlier)
            writer.write_items(item_ids)
            boundary = end - val_days * DAY if val_days > 0 else np.inf
            if val_days > 0:
                check_latest(spool.starts, spool.starts >= boundary, end, str(train_file.path))
            written, seen_in_train = _write_training(
                writer, spool, index, boundary, max_val_sessions, seed, steps, threads, earlier
            )
            sources = [train_file.description(), test_file.description()]
            if sources[0]["sha256"] == sources[1]["sha256"]:
                raise InputError(
                    f"{train_file.path} and {test_file.path} hold the same sessions: a model would "
                    "be scored on what it has seen; give different files"
                )
            check_books(steps, written, "every-step")
            check_books(test_steps, [writer.write_split("test", test, **test_counts)], "every-step")
            return writer.finish(
                name=name,
                protocol="every-step",
                source="otto",
                options={
                    "raw": str(raw) if raw else None,
                    "val_days": val_days,
                    "max_val_sessions": max_val_sessions,
                    "seed": seed,
                    "skip_bad_lines": skip_bad_lines,
                    "catalogue": catalogue,
                },
                sources=sources,
                bad_lines={"count": bad.count, "first": bad.first},
                filters=steps.entries,
                test_filters=test_steps.entries,
                # TRON's figures count every session and every click of the files.
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


def _index(item_ids: np.ndarray) -> np.ndarray:
    """Return the item of each aid, 0 if there is none: int32; the last entry is for larger aids."""
    if item_ids.dtype == object:  # aids are integers
        return np.zeros(1, np.int32)
    is_aid = (item_ids >= 0) & (item_ids <= MAX_AID)
    aids = item_ids[is_aid]
    index = np.zeros(int(aids.max(initial=-1)) + 2, np.int32)
    index[aids] = np.flatnonzero(is_aid) + 1
    return index


class _Spool:
    """Sessions on disk in the order of the file; memory holds their lengths, starts and ids."""

    def __init__(self, folder: Path) -> None:
        self._aids = (folder / "aids.bin").open("w+b")
        self._times = (folder / "times.bin").open("w+b")
        self._lengths: list[np.ndarray] = []
        self._starts: list[np.ndarray] = []
        self._session_ids: list[np.ndarray] = []
        self.events = 0

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self._aids.close()
        self._times.close()

    def append(self, sessions: Sessions) -> None:
        """Append sessions of aids (int32), none empty, with times and ids."""
        assert sessions.times is not None
        assert sessions.session_ids is not None
        self._aids.write(sessions.items.data)
        self._times.write(sessions.times.data)
        self._lengths.append(sessions.lengths)
        self._starts.append(first_times(sessions))
        self._session_ids.append(sessions.session_ids)
        self.events += len(sessions.items)

    @property
    def lengths(self) -> np.ndarray:
        """Number of events of each session: int64 [S]."""
        return np.concatenate(self._lengths)

    @property
    def starts(self) -> np.ndarray:
        """Time of the first event of each session: int64 [S], ms."""
        return np.concatenate(self._starts)

    def blocks(self, wanted: np.ndarray | None = None) -> Iterator[_SpoolBlock]:
        """Yield all blocks, or only those with a `wanted` row (bool [S])."""
        self._aids.flush()
        self._times.flush()
        lengths, ids = self.lengths, np.concatenate(self._session_ids)
        events_before = 0
        for start in range(0, len(lengths), SPOOL_SESSIONS):
            rows = slice(start, start + SPOOL_SESSIONS)
            offsets = np.append(0, np.cumsum(lengths[rows]))
            if wanted is None or wanted[rows].any():
                yield _SpoolBlock(
                    rows, offsets, ids[rows], self._aids.name, self._times.name, events_before
                )
            events_before += int(offsets[-1])


@dataclass(frozen=True)
class _SpoolBlock:
    """Rows of a spool, which `read` reads from disk."""

    rows: slice
    offsets: np.ndarray
    session_ids: np.ndarray
    aids_file: str
    times_file: str
    events_before: int

    def read(self) -> Sessions:
        aids, times = (
            np.fromfile(file, dtype, self.offsets[-1], offset=self.events_before * dtype.itemsize)
            for file, dtype in (
                (self.aids_file, np.dtype(np.int32)),
                (self.times_file, np.dtype(np.int64)),
            )
        )
        return Sessions(aids, self.offsets, times, self.session_ids)


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
    file: _RawFile, bad: BadLines, spool: _Spool, steps: Steps, threads: _Threads
) -> tuple[np.ndarray, int]:
    """Spool the sessions of at least two clicks; return (all aids ascending, last click in ms)."""
    kept, short, others = _Tally(), _Tally(), _Tally()
    end = 0
    for clicks, (long_enough, short_aids) in _clicks(file, bad, _without_short, threads):
        kept.add(len(long_enough), long_enough.items)
        short.add(_count(clicks.lengths > 0) - len(long_enough), short_aids)
        others.add(_count(clicks.lengths == 0), clicks.other_aids)
        spool.append(long_enough)
        end = max(end, int(clicks.times.max(initial=0)))
    clicked = kept + short
    read = clicked + others
    if not kept.sessions:
        raise InputError(
            f"{file.path} has no session with {MIN_CLICKS} clicks among its {read.sessions:,} "
            "sessions"
        )
    _record(
        steps,
        {
            "read": (read, ""),
            "clicks": (clicked, "carts and orders are not used"),
            "short sessions": (kept, f"sessions of fewer than {MIN_CLICKS} clicks"),
        },
    )
    return clicked.items, end


def _without_short(clicks: Clicks) -> tuple[Sessions, np.ndarray]:
    """Return (sessions of at least two clicks, the aids of the others)."""
    is_short = np.repeat(clicks.lengths < MIN_CLICKS, clicks.lengths)
    return drop_short(_sessions(clicks), MIN_CLICKS), clicks.aids[is_short]


def _read_test(
    file: _RawFile,
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
    for clicks, covered in _clicks(file, bad, partial(_covered, index=index), threads):
        long_enough = drop_short(covered, MIN_CLICKS)
        clicked.add(_count(clicks.lengths > 0), clicks.aids)
        others.add(_count(clicks.lengths == 0), clicks.other_aids)
        known.add(_count(covered.lengths > 0), covered.items)
        kept.add(len(long_enough), long_enough.items)
        lost.append(lost_predictions(clicks.lengths, covered.lengths))
        test.append(_indexed(long_enough, index))
    read = clicked + others
    if not kept.sessions:
        raise InputError(
            f"{file.path} has no session with {MIN_CLICKS} clicks on items of the training file "
            f"among its {read.sessions:,} sessions: do the two files belong together?"
        )
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
    """Join predictions lost by the kept sessions of all blocks, then by the others."""
    nothing = np.zeros(0, np.int64)
    return np.concatenate([nothing, *(kept for kept, _ in lost), *(others for _, others in lost)])


def _covered(clicks: Clicks, index: np.ndarray) -> Sessions:
    """Return the clicks on items of the catalogue."""
    sessions = _sessions(clicks)
    return drop_events(sessions, _positions(sessions, index) > 0)


def _write_training(
    writer: DatasetWriter,
    spool: _Spool,
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

    def early(block: _SpoolBlock) -> tuple[int, Sessions, Sessions, Sessions, Sessions]:
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
    val: list[Sessions] = []
    lost: list[tuple[np.ndarray, np.ndarray]] = []
    unseen_in_val = 0
    for block in spool.blocks(wanted=in_val):
        whole = take_where(block.read(), in_val[block.rows])
        seen = _seen(whole, index)
        val.append(drop_short(seen, MIN_CLICKS))
        lost.append(lost_predictions(whole.lengths, seen.lengths))
        unseen_in_val += len(whole.items) - len(seen.items)
        unknown += _size(whole) - _size(seen)
        short += _size(seen) - _size(val[-1])
    written.append(
        writer.write_split(
            "val",
            val,
            unseen_events=unseen_in_val,
            lost_predictions=_in_order(lost),
            events_unseen_in_train=sum(_count(~in_train[v.items]) for v in val),
        )
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
    file: _RawFile, bad: BadLines, further: Callable[[Clicks], _Out], threads: _Threads
) -> Iterator[tuple[Clicks, _Out]]:
    """Yield the clicks of a file with the result of `further`, block by block, in order."""

    def read(text: bytearray) -> tuple[Clicks, _Out]:
        clicks = read_clicks(text)
        file.free.append(text)
        return clicks, further(clicks)

    line = 0
    for clicks, result in threads.in_order(read, file.blocks()):
        for line_of_block, problem in clicks.bad:
            bad.reject(file.path, line + line_of_block, problem)
        line += clicks.lines
        yield clicks, result


class _Threads(ThreadPoolExecutor):
    """Thread pool with a thread per core."""

    def __init__(self) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._count = min(cores or 1, MAX_THREADS)
        super().__init__(self._count)
        # glibc returns freed memory to the system and gets it back page by page for the next array,
        # unless it is less than twice the largest block freed so far.
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


class _RawFile:
    """A file of JSON lines, plain or compressed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.free: list[bytearray] = []
        self._digest = hashlib.sha256()

    def blocks(self) -> Iterator[bytearray]:
        """Yield the file in blocks of whole lines, as `read_clicks` takes them.

        Getting fresh memory from the system takes longer than filling it: put used blocks into
        `free`.
        """
        if is_compressed(self.path):
            for text, _ in text_blocks(self.path):
                block = self._block()
                block[:] = text
                yield block
            return
        size = self.path.stat().st_size
        if not size:
            raise InputError(f"{self.path} is empty")
        is_first = True
        with (
            open_raw(self.path) as content,
            tqdm(total=size, desc=self.path.name, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while True:
                block = self._block()
                del block[BLOCK_BYTES:]
                block += bytes(BLOCK_BYTES - len(block))
                del block[content.readinto(block) :]
                if not block:
                    return
                line_end = content.readline(MAX_LINE_BYTES)
                if len(line_end) == MAX_LINE_BYTES:
                    raise InputError(
                        f"{self.path} has no line end for {MAX_LINE_BYTES:,} bytes: is it jsonl?"
                    )
                block += line_end
                self._digest.update(block)  # while its bytes are in the cache
                bar.update(len(block))
                if is_first and block.startswith(BYTE_ORDER_MARK):
                    del block[: len(BYTE_ORDER_MARK)]
                is_first = False
                yield block

    def _block(self) -> bytearray:
        return self.free.pop() if self.free else bytearray()

    def description(self) -> dict[str, Any]:
        """Describe the file for dataset.json, after all blocks were read."""
        if is_compressed(self.path):
            return describe(self.path)
        return {
            "file": self.path.name,
            "bytes": self.path.stat().st_size,
            "sha256": self._digest.hexdigest(),
        }
