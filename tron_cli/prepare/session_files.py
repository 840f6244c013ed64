"""Sessions on disk: files that grow, and buckets by start that are sorted one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tron_cli.data.dataset import Sessions
from tron_cli.errors import RunError
from tron_cli.prepare.sessions import first_keys, joined, order_by_first_event, take

CHUNK_SESSIONS = 1 << 18  # taken at a time, so that few are copied
_FIELDS = {"items": np.int32, "lengths": np.int64, "times": np.int64, "session_ids": np.int64,
           "user_ids": np.int64, "places": np.int64}  # fmt: skip


def changed(files: Path | str) -> RunError:
    """Return the error of temporary files that hold something else than was written."""
    return RunError(f"temporary files {files} were changed while they were in use; prepare again")


class SessionFile:
    """Sessions in a file for each of their arrays, whose names begin with a path."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, sessions: Sessions) -> None:
        """Append sessions, all with the same kinds of arrays, and ids that are numbers."""
        for name in _FIELDS:
            array = getattr(sessions, name)
            if array is not None:
                with self._file(name).open("ab") as file:
                    file.write(np.ascontiguousarray(array).data)

    def read(self, *, remove: bool = False) -> Sessions:
        """Return all sessions, and perhaps remove them from disk."""
        arrays = {}
        for name, dtype in _FIELDS.items():
            file = self._file(name)
            if file.exists():
                arrays[name] = np.fromfile(file, dtype)
                if remove:
                    file.unlink()
        is_whole = {"items", "lengths"} <= arrays.keys()
        offsets = np.append(0, np.cumsum(arrays.pop("lengths", np.zeros(0, np.int64))))
        counts = {"items": int(offsets[-1]), "times": int(offsets[-1])}
        if not is_whole or any(
            len(each) != counts.get(name, len(offsets) - 1) for name, each in arrays.items()
        ):
            raise changed(f"{self._path}.*")
        return Sessions(arrays.pop("items"), offsets, **arrays)

    def _file(self, name: str) -> Path:
        return self._path.with_name(f"{self._path.name}.{name}")


@dataclass(frozen=True)
class Bounds:
    """First sessions of all buckets but the first: start (ms) and place, int64 [B - 1] each."""

    starts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    places: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def of(cls, parts: list[tuple[np.ndarray, np.ndarray]], buckets: int) -> Bounds:
        """Return bounds of about equal buckets for sessions like those of the given keys."""
        starts, places = (np.concatenate([part[at] for part in parts]) for at in range(2))
        order = np.lexsort((places, starts))
        buckets = min(buckets, len(order) + 1)
        order = order[np.arange(1, buckets) * len(order) // buckets]
        return cls(starts[order], places[order])

    def buckets(self, sessions: Sessions) -> np.ndarray:
        """Return the bucket of each session: int64 [S]."""
        starts, places = first_keys(sessions)
        bounds = len(self.starts)
        # Bounds come first among equals.
        keys = np.append(self.places, places), np.append(self.starts, starts)
        order = np.lexsort(keys)
        found = np.empty(len(order), np.int64)
        found[order] = np.cumsum(order < bounds)
        return found[bounds:]


class SortedSessions:
    """Sessions by start, then place in the log, in buckets; without bounds one, in memory."""

    def __init__(self, folder: Path, bounds: Bounds) -> None:
        self._folder, self._bounds = folder, bounds
        self._held: list[Sessions] = []
        self._files: dict[int, SessionFile] = {}
        if len(bounds.starts):
            folder.mkdir()

    def add(self, sessions: Sessions) -> None:
        """Add sessions, none empty."""
        if not len(self._bounds.starts):
            self._held.append(sessions)
        if not len(self._bounds.starts) or not len(sessions):
            return
        buckets = self._bounds.buckets(sessions)
        order = np.argsort(buckets, kind="stable")
        found, starts = np.unique(buckets[order], return_index=True)
        for bucket, rows in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
            file = self._files.setdefault(bucket, SessionFile(self._folder / str(bucket)))
            file.append(take(sessions, rows))

    def __iter__(self) -> Iterator[Sessions]:
        """Yield the sessions in order, some at a time, and remove them from disk."""
        if self._held:
            yield from by_first_event(joined(self._held) if self._held[1:] else self._held[0])
        for bucket in sorted(self._files):
            yield from by_first_event(self._files[bucket].read(remove=True))


def by_first_event(sessions: Sessions) -> Iterator[Sessions]:
    """Yield the sessions by their first event, some at a time, so that few are copied."""
    order = order_by_first_event(sessions)
    for start in range(0, len(order), CHUNK_SESSIONS):
        yield take(sessions, order[start : start + CHUNK_SESSIONS])
