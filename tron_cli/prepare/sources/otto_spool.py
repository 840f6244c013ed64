"""Sessions of OTTO on disk between the two passes over its training file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tron_cli.data.dataset import Sessions
from tron_cli.prepare.sessions import first_times

SPOOL_SESSIONS = 1 << 16  # read back at a time


class Spool:
    """Sessions on disk in the order of the file; memory holds their lengths, starts and ids."""

    def __init__(self, folder: Path) -> None:
        self._aids = (folder / "aids.bin").open("w+b")
        self._times = (folder / "times.bin").open("w+b")
        self._lengths: list[np.ndarray] = []
        self._starts: list[np.ndarray] = []
        self._session_ids: list[np.ndarray] = []
        self.events = 0

    def __enter__(self) -> Spool:
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

    def blocks(self, wanted: np.ndarray | None = None) -> Iterator[SpoolBlock]:
        """Yield all blocks, or only those with a `wanted` row (bool [S])."""
        self._aids.flush()
        self._times.flush()
        lengths, ids = self.lengths, np.concatenate(self._session_ids)
        events_before = 0
        for start in range(0, len(lengths), SPOOL_SESSIONS):
            rows = slice(start, start + SPOOL_SESSIONS)
            offsets = np.append(0, np.cumsum(lengths[rows]))
            if wanted is None or wanted[rows].any():
                yield SpoolBlock(
                    rows, offsets, ids[rows], self._aids.name, self._times.name, events_before
                )
            events_before += int(offsets[-1])


@dataclass(frozen=True)
class SpoolBlock:
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
