"""OTTO: clicks of an online shop, one session a line of JSON (Kaggle data set otto/recsys-dataset).

TRON's protocol: clicks only, no filter by support, the data set's own training and test file; the
catalogue is every item that is clicked in the training file. Two passes keep 11 GB out of memory:
worker processes read the training file block by block and its clicks go to a spool on disk; then,
the catalogue and the end of the period being known, they are split, indexed and written in the
order of the file.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tron_cli.dataset import Dataset, DatasetWriter, Sessions
from tron_cli.errors import InputError, RunError
from tron_cli.prepare.columns import MAX_LINE_BYTES, BadLines, text_blocks
from tron_cli.prepare.events import drop_events, first_times, take_where
from tron_cli.prepare.filters import Steps, drop_short
from tron_cli.prepare.otto_lines import Block, Clicks, read_clicks
from tron_cli.prepare.raw import SOURCES, describe, is_gzip, locate
from tron_cli.prepare.split import DAY, sample_rows
from tron_cli.prepare.write import dataset_path

BLOCK_BYTES = 1 << 24
SPOOL_SESSIONS = 1 << 17  # read back at a time
MAX_WORKERS = 8  # with more, the process that collects is the limit
MIN_CLICKS = 2


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
) -> Dataset:
    """Prepare OTTO's clicks; items are numbered in the order of their ids.

    Sessions with fewer than two clicks are dropped. Validation: of the sessions whose first click
    is at most `val_days` before the last click of the training file, a seeded sample of at most
    `max_val_sessions`; the other training sessions keep only the clicks from before that stretch.
    Test: clicks on items that the training file lacks are dropped, then sessions with fewer than
    two. An event that is no click, cart or order is a broken line: InputError, or with
    `skip_bad_lines` the line is left out and counted.
    """
    with DatasetWriter(dataset_path(data_dir, name, raw), force=force) as writer:
        files = locate("otto", raw, data_dir)
        train_file, test_file = (files[file] for file in SOURCES["otto"].files)
        bad = BadLines(skip=skip_bad_lines)
        with (
            tempfile.TemporaryDirectory(prefix=f".{name}.spool-", dir=data_dir) as folder,
            _Spool(Path(folder)) as spool,
            ThreadPoolExecutor(1) as beside,
        ):
            steps, test_steps = Steps(), Steps()
            catalogue, end = _read_training(train_file, bad, spool, steps)
            index = np.zeros(catalogue[-1] + 2, np.int32)  # the last entry: aids beyond
            index[catalogue] = np.arange(1, len(catalogue) + 1)
            test, test_counts = _read_test(test_file, bad, index, test_steps)
            # Checksums keep one core busy for some seconds, writing the other.
            sources = beside.submit(lambda: [describe(file) for file in files.values()])
            writer.write_items(catalogue)
            boundary = end - val_days * DAY if val_days > 0 else np.inf
            left_out, unseen_in_train = _write_training(
                writer, spool, index, boundary, max_val_sessions, seed
            )
            writer.write_split("test", test, **test_counts)
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
                },
                sources=sources.result(),
                bad_lines={"count": bad.count, "first": bad.first},
                filters=steps.entries,
                test_filters=test_steps.entries,
                # TRON's figures count every session and every click of the files.
                published_counts={
                    "train sessions": steps.entries[0]["sessions"],
                    "train events": steps.entries[1]["events"],
                    "test sessions": test_steps.entries[0]["sessions"],
                    "test events": test_steps.entries[1]["events"],
                    "items": len(catalogue),
                },
                training_period={"sessions": len(spool.lengths), "events": spool.events},
                left_out=left_out,
                items_unseen_in_train=unseen_in_train,
            )


class _Spool:
    """Sessions on disk in the order they came; in memory only the length and start of each."""

    def __init__(self, folder: Path) -> None:
        self._aids = (folder / "aids.bin").open("w+b")
        self._times = (folder / "times.bin").open("w+b")
        self._lengths: list[np.ndarray] = []
        self._starts: list[np.ndarray] = []
        self.events = 0

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self._aids.close()
        self._times.close()

    def append(self, sessions: Sessions) -> None:
        """Sessions of aids (int32), none empty, with times."""
        assert sessions.times is not None
        self._aids.write(sessions.items.data)
        self._times.write(sessions.times.data)
        self._lengths.append(sessions.lengths)
        self._starts.append(first_times(sessions))
        self.events += len(sessions.items)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [S], events of each session."""
        return np.concatenate(self._lengths)

    @property
    def starts(self) -> np.ndarray:
        """int64 [S] ms, the first event of each session."""
        return np.concatenate(self._starts)

    def blocks(self, wanted: np.ndarray | None = None) -> Iterator[tuple[slice, Sessions]]:
        """(which rows, their sessions) by blocks; only blocks with a `wanted` row (bool [S])."""
        self._aids.flush()
        self._times.flush()
        lengths = self.lengths
        events_before = 0
        for start in range(0, len(lengths), SPOOL_SESSIONS):
            rows = slice(start, start + SPOOL_SESSIONS)
            offsets = np.append(0, np.cumsum(lengths[rows]))
            if wanted is None or wanted[rows].any():
                aids, times = (
                    np.fromfile(
                        file.name, dtype, offsets[-1], offset=events_before * dtype.itemsize
                    )
                    for file, dtype in (
                        (self._aids, np.dtype(np.int32)),
                        (self._times, np.dtype(np.int64)),
                    )
                )
                yield rows, Sessions(aids, offsets, times)
            events_before += int(offsets[-1])


class _Tally:
    """Sessions, events and distinct items of what is added."""

    def __init__(self) -> None:
        self.sessions = 0
        self.events = 0
        self._seen = np.zeros(1 << 20, bool)

    def add(self, sessions: int, *aids: np.ndarray) -> None:
        self.sessions += sessions
        for part in aids:
            self.events += len(part)
            largest = int(part.max(initial=0))
            if largest >= len(self._seen):
                self._seen = np.concatenate((self._seen, np.zeros(largest + 1, bool)))
            self._seen[part] = True

    @property
    def items(self) -> np.ndarray:
        """int64: the distinct aids, ascending."""
        return np.flatnonzero(self._seen)


def _record(steps: Steps, tallies: dict[str, tuple[_Tally, str]]) -> None:
    for step, (tally, why) in tallies.items():
        steps.count(step, tally.sessions, tally.events, len(tally.items), why)


def _read_training(
    file: Path, bad: BadLines, spool: _Spool, steps: Steps
) -> tuple[np.ndarray, int]:
    """Spool the sessions of at least two clicks; (all clicked aids ascending, last click in ms)."""
    read, clicked, kept = _Tally(), _Tally(), _Tally()
    end = 0
    for clicks in _clicks(file, bad):
        sessions = _sessions(clicks)
        long_enough = drop_short(sessions, MIN_CLICKS)
        read.add(len(sessions), clicks.aids, clicks.other_aids)
        clicked.add(_count(clicks.lengths > 0), clicks.aids)
        kept.add(len(long_enough), long_enough.items)
        spool.append(long_enough)
        end = max(end, int(clicks.times.max(initial=0)))
    if not kept.sessions:
        raise InputError(
            f"{file} has no session with {MIN_CLICKS} clicks among its {read.sessions:,} sessions"
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


def _read_test(
    file: Path, bad: BadLines, index: np.ndarray, steps: Steps
) -> tuple[list[Sessions], dict[str, int]]:
    """(test sessions, indexed, block by block; how much of test the catalogue does not cover)."""
    read, clicked, known, kept = _Tally(), _Tally(), _Tally(), _Tally()
    test = []
    predictions = 0
    for clicks in _clicks(file, bad):
        sessions = _sessions(clicks)
        covered = drop_events(sessions, _positions(sessions, index) > 0)
        long_enough = drop_short(covered, MIN_CLICKS)
        read.add(len(sessions), clicks.aids, clicks.other_aids)
        clicked.add(_count(sessions.lengths > 0), sessions.items)
        known.add(_count(covered.lengths > 0), covered.items)
        kept.add(len(long_enough), long_enough.items)
        predictions += int(np.maximum(sessions.lengths - 1, 0).sum())
        test.append(_indexed(long_enough, index))
    if not kept.sessions:
        raise InputError(
            f"{file} has no session with {MIN_CLICKS} clicks on items of the training file among "
            f"its {read.sessions:,} sessions: do the two files belong together?"
        )
    _record(
        steps,
        {
            "read": (read, ""),
            "clicks": (clicked, "carts and orders are not used"),
            "unknown items": (known, "clicks on items that the training file lacks"),
            "short sessions": (kept, f"sessions of fewer than {MIN_CLICKS} clicks"),
        },
    )
    return test, {
        "unseen_events": clicked.events - known.events,
        "lost_predictions": predictions - (kept.events - kept.sessions),
        "short_sessions": read.sessions - kept.sessions,
    }


def _write_training(
    writer: DatasetWriter,
    spool: _Spool,
    index: np.ndarray,
    boundary: float,
    max_val_sessions: int,
    seed: int,
) -> tuple[dict[str, int], int]:
    """Write train and val, parted at `boundary` (ms); (what neither has, items train lacks)."""
    lengths = spool.lengths
    held_out = spool.starts >= boundary
    candidates = np.flatnonzero(held_out)
    in_val = np.zeros(len(held_out), bool)
    in_val[candidates[sample_rows(len(candidates), max_val_sessions, seed)]] = True
    in_train = np.zeros(int(index.max()) + 1, bool)
    left_out = {
        "val_sessions_beyond_sample": _count(held_out & ~in_val),
        "val_events_beyond_sample": int(lengths[held_out & ~in_val].sum()),
        "late_sessions": 0,
        "late_events": 0,
    }

    def train() -> Iterator[Sessions]:
        with tqdm(total=len(lengths), desc="train", unit=" sessions", disable=None) as bar:
            for rows, sessions in spool.blocks():
                before = take_where(sessions, ~held_out[rows])
                assert before.times is not None
                cut = drop_short(drop_events(before, before.times < boundary), MIN_CLICKS)
                left_out["late_sessions"] += len(before) - len(cut)
                left_out["late_events"] += len(before.items) - len(cut.items)
                indexed = _indexed(cut, index)
                in_train[indexed.items] = True
                bar.update(len(sessions))
                yield indexed

    writer.write_split("train", train())
    if _count(~held_out) == left_out["late_sessions"]:
        raise InputError(
            "no session is left for the train split: all lie in the last days, which validation "
            "takes; pass a smaller --val-days"
        )
    val = [
        _indexed(take_where(sessions, in_val[rows]), index)
        for rows, sessions in spool.blocks(wanted=in_val)
    ]
    writer.write_split(
        "val",
        val,
        unseen_events=0,
        lost_predictions=0,
        events_unseen_in_train=sum(_count(~in_train[v.items]) for v in val),
    )
    return left_out, _count(~in_train[1:])


def _count(flags: np.ndarray) -> int:
    return int(np.count_nonzero(flags))


def _sessions(clicks: Clicks) -> Sessions:
    return Sessions(clicks.aids, np.append(0, np.cumsum(clicks.lengths)), clicks.times)


def _indexed(sessions: Sessions, index: np.ndarray) -> Sessions:
    return Sessions(_positions(sessions, index), sessions.offsets, sessions.times)


def _positions(sessions: Sessions, index: np.ndarray) -> np.ndarray:
    """int32 [E]: the item of each event, 0 where the catalogue lacks it."""
    return index.take(sessions.items, mode="clip")


def _clicks(file: Path, bad: BadLines) -> Iterator[Clicks]:
    """The clicks of a file, block by block in its order."""
    line = 0
    for clicks in _read_blocks(_blocks(file)):
        for line_of_block, problem in clicks.bad:
            bad.reject(file, line + line_of_block, problem)
        line += clicks.lines
        yield clicks


def _read_blocks(blocks: Iterator[Block]) -> Iterator[Clicks]:
    """Read blocks on all cores; the results come in order."""
    head = list(islice(blocks, 2))
    if len(head) < 2:  # starting processes would take longer
        yield from map(read_clicks, head)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(cores or 1, MAX_WORKERS)
    pending: deque[Future[Clicks]] = deque()
    try:
        # Not forked: polars and tqdm have threads, which a fork does not survive.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            for block in chain(head, blocks):
                pending.append(pool.submit(read_clicks, block))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise RunError("a reading process was killed, perhaps for want of memory") from error


def _blocks(file: Path) -> Iterator[Block]:
    """A file in blocks of whole lines; readers fetch those of a plain file themselves."""
    if is_gzip(file):
        for text, _ in text_blocks(file):
            yield Block(file, 0, len(text), text)
        return
    size = file.stat().st_size
    if not size:
        raise InputError(f"{file} is empty")
    start = 0
    with (
        file.open("rb") as content,
        tqdm(total=size, desc=file.name, unit="B", unit_scale=True, disable=None) as bar,
    ):
        while start < size:
            content.seek(start + BLOCK_BYTES - 1)
            if len(content.readline(MAX_LINE_BYTES)) == MAX_LINE_BYTES:
                raise InputError(
                    f"{file} has no line end for {MAX_LINE_BYTES:,} bytes: is it jsonl?"
                )
            stop = min(content.tell(), size)
            yield Block(file, start, stop)
            bar.update(stop - start)
            start = stop
