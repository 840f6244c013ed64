"""A prepared dataset on disk: memory-mapped session arrays beside one `dataset.json`.

    DATA_DIR/NAME/
        dataset.json              name, protocol, options, counts, checksums, fingerprints
        item_ids.npy | .txt       original id of item i in entry i - 1 (int64, or one per line)
        train|val|test/items.npy      int32, the items of all sessions back to back
        train|val|test/offsets.npy    int64, session s is items[offsets[s]:offsets[s + 1]]
        train|val|test/times.npy      int64 milliseconds since 1970 UTC, where the source has times
        train|val|test/session_ids.npy    int64, original id of each session, where it has one; or
        train|val|test/session_ids.txt    UTF-8, one per line, where not all are integers, and
        train|val|test/session_ids_offsets.npy    int64: id s is txt[offsets[s]:offsets[s + 1] - 1]
        train|val|test/lost_predictions.npy    int32: predictions that each session lost because the
                                  catalogue lacks their item, then those of each session that was
                                  left out for this reason; only where there are any
        train|val|test/user_ids...        likewise the original id of each session's user

Item ids are 1..num_items; 0 means padding. Opening maps the files and reads none of them, so that a
dataset of any size opens at once and several processes share its pages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from tron_cli.data.folder import SPLITS, DatasetFolder
from tron_cli.data.integrity import (
    PROTOCOLS,
    fingerprint,
    flaw_of_contents,
    flaw_of_description,
    flaw_of_ends,
    sha256_of_file,
)
from tron_cli.errors import InputError

FORMAT_VERSION = 1
FINGERPRINTED_BYTES = 1 << 28  # arrays up to this size take less than a second to check
_EVENTS_AT_ONCE = 1 << 24
DATASET_NAME = r"\w[\w.+-]*"  # a folder in --data-dir, and a part of checkpoints' names


@dataclass(frozen=True)
class Sessions:
    """The sessions of one split, back to back.

    items: int32 [E]; offsets: int64 [S + 1]; times: int64 [E] milliseconds since 1970 UTC, or None.
    session_ids, user_ids: [S], original ids, int64 or str objects, or None. They are set only while
    a dataset is prepared; `Dataset.session_ids` reads those of a prepared one. places: int64 [S],
    the place of each session's first event in a log that is prepared in parts, else None.
    """

    items: np.ndarray
    offsets: np.ndarray
    times: np.ndarray | None = None
    session_ids: np.ndarray | None = None
    user_ids: np.ndarray | None = None
    places: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, session: int) -> np.ndarray:
        return self.items[self.offsets[session] : self.offsets[session + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Number of events of each session: int64 [S]."""
        return np.diff(self.offsets)


def are_repeats(sessions: Sessions) -> np.ndarray:
    """Mark the events that repeat the item of the event before them in their session: bool [E]."""
    items = sessions.items
    repeats = np.zeros(len(items), bool)
    repeats[1:] = items[1:] == items[:-1]
    starts = sessions.offsets[:-1]
    repeats[starts[starts < len(items)]] = False  # an empty session may stand at the end
    return repeats


def count_events(sessions: Sessions, num_items: int) -> np.ndarray:
    """Return the number of events of each item: int64 [I + 1], entry 0 is no item."""
    count_I = np.zeros(num_items + 1, np.int64)
    # `items` may hold more events than these sessions, if they are the first of a split. Events are
    # counted some at a time, because np.bincount copies them as int64.
    for low in range(0, int(sessions.offsets[-1]), _EVENTS_AT_ONCE):
        part = sessions.items[low : min(low + _EVENTS_AT_ONCE, int(sessions.offsets[-1]))]
        count_I += np.bincount(part, minlength=num_items + 1)
    return count_I


class TextIds:
    """Text ids, mapped from disk: `ids[rows]` reads only the ids of those rows.

    text: uint8, UTF-8 with a line feed after each id; offsets: int64 [S + 1], where each begins.
    """

    def __init__(self, text: np.ndarray, offsets: np.ndarray) -> None:
        self._text = text
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Read the ids of some rows (int64 [n]): str objects [n]."""
        ids = np.empty(len(rows), object)
        starts, ends = self._offsets[rows], self._offsets[rows + 1] - 1
        for at, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            ids[at] = self._text[start:end].tobytes().decode()
        return ids


class Dataset:
    """A prepared dataset, opened for reading."""

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        self.path = path
        self.info = info
        self.name = path.name  # not info["name"]: a folder may be copied or renamed
        self.protocol: str = info["protocol"]
        self.num_items: int = info["num_items"]
        self.catalogue_fingerprint: str = info["catalogue_fingerprint"]

    @classmethod
    def open(cls, path: Path) -> Dataset:
        """Open DATA_DIR/NAME; raises InputError where there is no readable dataset."""
        file = path / "dataset.json"
        if not file.is_file():
            raise InputError(
                f"no prepared dataset at {path}: expected {file}; run `tron prepare` first, "
                "or name its folder with --data-dir"
            )
        try:
            info = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{file} is not readable JSON ({error}); delete its folder and prepare the dataset "
                "again"
            ) from error
        version = info.get("format_version") if isinstance(info, dict) else None
        if version != FORMAT_VERSION:
            raise InputError(
                f"{file} has format version {version}, this tron reads {FORMAT_VERSION}; "
                "prepare the dataset again"
            )
        flaw = flaw_of_description(info)
        if flaw is not None:
            raise InputError(f"{file} is damaged ({flaw}); prepare the dataset again")
        return cls(path, info)

    def split(self, name: str) -> Sessions:
        """Map the arrays of `train`, `val` or `test`; only their ends are read and checked."""
        folder = self.path / name
        times_file = folder / "times.npy"
        try:
            items = _map(folder / "items.npy", np.int32)
            offsets = _map(folder / "offsets.npy", np.int64)
            times = _map(times_file, np.int64) if times_file.exists() else None
        except Exception as error:  # NumPy raises almost anything for a damaged header
            raise self._damaged(f"the {name} split", error) from error
        flaw = flaw_of_ends(items, offsets, times, self.split_info(name))
        if flaw is not None:
            raise self._damaged(f"the {name} split", flaw)
        return Sessions(items, offsets, times)

    def checked_split(self, name: str, *, fully: bool = False) -> Sessions:
        """Map a split and read it once to check it, for callers that read all of it anyway.

        Its offsets and items must be possible, and it and the catalogue must have their
        fingerprints; where these would take more than a second, only if `fully`. Raises InputError.
        """
        sessions = self.split(name)
        flaw = flaw_of_contents(sessions.items, sessions.offsets, self.num_items)
        if flaw is not None:
            raise self._damaged(f"the {name} split", flaw)
        if fully or sessions.items.nbytes + sessions.offsets.nbytes <= FINGERPRINTED_BYTES:
            found = fingerprint(sessions.items, sessions.offsets)
            if found != self.split_info(name)["fingerprint"]:
                raise self._damaged(f"the {name} split", "it is not what was prepared")
        self.check_item_ids(fully=fully)
        return sessions

    def check_item_ids(self, *, fully: bool = False) -> None:
        """Compare the list of item ids with its fingerprint, as `checked_split` does."""
        ids = self.item_ids
        if ids.dtype == object:
            found = _sha256((self.path / "item_ids.txt").read_bytes())
        elif fully or ids.nbytes <= FINGERPRINTED_BYTES:
            found = fingerprint(ids)
        else:
            return
        if found != self.catalogue_fingerprint:
            raise self._damaged("the list of item ids", "it is not what was prepared")

    @cached_property
    def item_ids(self) -> np.ndarray:
        """Original ids, entry i - 1 for item i: int64 [I], or str [I]."""
        file = self.path / "item_ids.npy"
        try:
            if file.exists():
                ids = _map(file, np.int64)
            else:
                # Not read_text: it would end a line at a carriage return within an id.
                text = (self.path / "item_ids.txt").read_bytes().decode()
                ids = np.array(text.split("\n")[:-1], dtype=object)
        except Exception as error:
            raise self._damaged("the list of item ids", error) from error
        if len(ids) != self.num_items:
            raise self._damaged("the list of item ids", f"{len(ids):,} ids, not {self.num_items:,}")
        return ids

    def session_ids(self, split: str) -> np.ndarray | TextIds | None:
        """Map the original ids of a split's sessions, one each in their order.

        `ids[rows]` with int64 rows gives int64, or str objects where not all ids are integers.
        None where the source names no sessions: a user's log cut at pauses, a history per user.
        """
        return self._ids_of(split, "session_ids")

    def user_ids(self, split: str) -> np.ndarray | TextIds | None:
        """Map the original id of each session's user, as `session_ids`; None where unknown."""
        return self._ids_of(split, "user_ids")

    def check_files(self, split: str, kind: str = "", *, fully: bool = False) -> None:
        """Compare a split's files whose names begin with `kind` with their fingerprints.

        Large files are compared only if `fully`. Items and offsets are left to `checked_split`.
        A dataset that an earlier version prepared has no such fingerprints.
        """
        for name, expected in self.split_info(split).get("files", {}).items():
            if not name.startswith(kind):
                continue
            file = self.path / split / name
            try:
                is_read = fully or file.stat().st_size <= FINGERPRINTED_BYTES
                is_sound = not is_read or sha256_of_file(file) == expected
            except OSError as error:
                raise self._damaged(f"{name} of the {split} split", error) from error
            if not is_sound:
                raise self._damaged(f"{name} of the {split} split", "it is not what was prepared")

    def lost_of_sessions(self, split: str) -> np.ndarray | None:
        """Return how many predictions of the dataset's protocol each session lost in preparation.

        int32 [at least S]: those of the split's sessions, then those of sessions that were left out
        as a whole. None if an earlier version, which did not count them, prepared the dataset.
        """
        counts = self.split_info(split)
        file = self.path / split / "lost_predictions.npy"
        sessions, total = counts["sessions"], counts["lost_predictions"]
        self.check_files(split, file.name)
        if not file.exists():
            if self.protocol == "last-item":  # a history has one prediction
                return np.repeat(np.array([0, 1], np.int32), [sessions, total])
            return None if total else np.zeros(sessions, np.int32)
        try:
            lost = _map(file, np.int32)
        except Exception as error:
            raise self._damaged(f"{file.name} of the {split} split", error) from error
        if len(lost) < sessions or lost.min(initial=0) < 0 or lost.sum() != total:
            raise self._damaged(f"{file.name} of the {split} split", "it does not match")
        return lost

    def _ids_of(self, split: str, kind: str) -> np.ndarray | TextIds | None:
        folder = self.path / split
        numbers, offsets = folder / f"{kind}.npy", folder / f"{kind}_offsets.npy"
        what = f"the list of {kind.replace('_', ' ')} of the {split} split"
        ids: np.ndarray | TextIds
        self.check_files(split, kind)
        try:
            if numbers.exists():
                ids = _map(numbers, np.int64)
            elif offsets.exists():
                text = np.memmap(folder / f"{kind}.txt", np.uint8, "r")
                ids = TextIds(text, _map(offsets, np.int64))
            else:
                return None
        except Exception as error:
            raise self._damaged(what, error) from error
        sessions = self.split_info(split)["sessions"]
        if len(ids) != sessions:
            raise self._damaged(what, f"{len(ids):,} ids, not {sessions:,}")
        return ids

    def _damaged(self, what: str, reason: object) -> InputError:
        return InputError(f"{what} of {self.path} is damaged ({reason}); prepare it again")

    def split_info(self, name: str) -> dict[str, Any]:
        """Return the counts of a split: sessions, events, mean_length, fingerprint, ..."""
        return self.info["splits"][name]


def _map(file: Path, dtype: type[np.generic]) -> np.ndarray:
    array = np.load(file, mmap_mode="r")
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
        raise ValueError(f"{file.name} is not a list of {dtype.__name__} numbers")
    # An empty file cannot be mapped; its array has no pages to share anyway.
    return array if array.size else np.load(file)


class DatasetWriter:
    """Writer of a dataset into a temporary folder, which is renamed when complete.

        with DatasetWriter(data_dir / "shop", force=False) as writer:
            writer.write_items(original_ids)
            writer.write_split("train", chunks)      # likewise "val" and "test"
            writer.finish(name="shop", protocol="every-step", ...)

    Without `finish` (an exception, say) nothing is left behind.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        self.path = path
        self._place = DatasetFolder(path, replace=force)
        self._folder = self._place.new
        self.scratch = self._place.scratch  # a folder for temporary files of preparation
        self._splits: dict[str, dict[str, Any]] = {}
        self._catalogue: dict[str, Any] = {}

    def __enter__(self) -> DatasetWriter:
        self._place.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._place.__exit__(kind, error, trace)

    def write_items(self, ids: np.ndarray) -> None:
        """Write the original ids of items 1, 2, ...: integers, or strings without line feeds."""
        if np.issubdtype(ids.dtype, np.integer):
            ids = np.ascontiguousarray(ids, dtype=np.int64)
            np.save(self._folder / "item_ids.npy", ids)
            content = ids.tobytes()
        else:
            broken = next((item for item in ids if "\n" in item), None)
            if broken is not None:
                raise InputError(
                    f"item ids are kept one per line, but the id {broken!r} holds a line feed; "
                    "replace it in the source"
                )
            content = "".join(f"{item}\n" for item in ids).encode()
            (self._folder / "item_ids.txt").write_bytes(content)
        self._catalogue = {"num_items": len(ids), "catalogue_fingerprint": _sha256(content)}

    def write_split(
        self,
        name: str,
        chunks: Iterable[Sessions],
        *,
        unseen_events: int = 0,
        lost_predictions: int | np.ndarray = 0,
        **counts: Any,
    ) -> dict[str, Any]:
        """Append chunks of sessions (each with offsets from 0) to a split.

        All chunks have times, or none has; likewise session and user ids. unseen_events: events
        dropped earlier, because the training period lacks their item; lost_predictions: predictions
        of the dataset's protocol lost with them; an array is as in `Dataset.lost_of_sessions`.
        These and further counts go into dataset.json. Returns the split's entry in dataset.json.
        """
        folder = self._folder / name
        folder.mkdir()
        if isinstance(lost_predictions, np.ndarray) and lost_predictions.any():
            np.save(folder / "lost_predictions.npy", lost_predictions.astype(np.int32))
        with ExitStack() as open_files:
            arrays = _SplitArrays(folder, open_files)
            for chunk in chunks:
                arrays.append(chunk)
            found = arrays.finish()
        self._splits[name] = {
            **found,
            "unseen_events": unseen_events,
            "lost_predictions": int(np.sum(lost_predictions)),
            **counts,
        }
        return self._splits[name]

    def finish(self, *, name: str, protocol: str, **info: Any) -> Dataset:
        """Write dataset.json and move the folder to its place; returns the dataset, opened."""
        assert protocol in PROTOCOLS
        assert set(self._splits) == set(SPLITS)
        assert self._catalogue
        self._fingerprint_files()
        content = {
            "format_version": FORMAT_VERSION,
            "name": name,
            "protocol": protocol,
            **self._catalogue,
            "splits": {split: self._splits[split] for split in SPLITS},
            **info,
        }
        (self._folder / "dataset.json").write_text(json.dumps(content, indent=2) + "\n")
        self._place.put_in_place()
        return Dataset.open(self.path)

    def _fingerprint_files(self) -> None:
        """Record the SHA-256 of each file that the fingerprint of its split does not cover."""
        others = [
            file
            for split in SPLITS
            for file in sorted((self._folder / split).iterdir())
            if file.name not in ("items.npy", "offsets.npy")
        ]
        with ThreadPoolExecutor() as threads:  # hashing releases the interpreter's lock
            for file, digest in zip(others, threads.map(sha256_of_file, others), strict=True):
                self._splits[file.parent.name]["files"][file.name] = digest


class _SplitArrays:
    """Arrays of one split, which grow chunk by chunk, and counts of what they hold."""

    def __init__(self, folder: Path, open_files: ExitStack) -> None:
        self._folder = folder
        self._items = _ArrayFile(folder / "items.npy", np.int32, open_files)
        self._times: _ArrayFile | None = None
        self._ids = [_IdsFile(folder, kind, open_files) for kind in ("session_ids", "user_ids")]
        self._open_files = open_files
        self._digest = hashlib.sha256()
        self._lengths = [np.zeros(0, np.int64)]
        self._repeated_events = 0
        self._span: list[int] = []

    def append(self, chunk: Sessions) -> None:
        """Append the sessions of a chunk."""
        self._digest.update(self._items.append(chunk.items).data)
        if chunk.times is not None and len(chunk.times):
            if self._times is None:
                self._times = _ArrayFile(self._folder / "times.npy", np.int64, self._open_files)
            self._times.append(chunk.times)
            span = [*self._span, int(chunk.times.min()), int(chunk.times.max())]
            self._span = [min(span), max(span)]
        self._lengths.append(chunk.lengths)
        self._repeated_events += int(np.count_nonzero(are_repeats(chunk)))
        for file, ids in zip(self._ids, (chunk.session_ids, chunk.user_ids), strict=True):
            if ids is not None:
                assert len(ids) == len(chunk)
                file.append(ids)

    def finish(self) -> dict[str, Any]:
        """Write the offsets; return the entry of the arrays in dataset.json."""
        length = np.concatenate(self._lengths)
        self._lengths.clear()  # there may be very many sessions
        offsets = np.zeros(len(length) + 1, np.int64)
        np.cumsum(length, out=offsets[1:])
        np.save(self._folder / "offsets.npy", offsets)
        self._digest.update(offsets.data)
        events = int(offsets[-1])
        del offsets
        return {
            "sessions": len(length),
            "events": events,
            "mean_length": float(length.mean()) if len(length) else None,
            "median_length": float(np.median(length)) if len(length) else None,
            "max_length": int(length.max()) if len(length) else None,
            "repeated_events": self._repeated_events,  # of the same item as the event before
            "fingerprint": self._digest.hexdigest(),
            "files": {},  # filled in by DatasetWriter.finish
            **dict(zip(("first_time", "last_time"), self._span, strict=False)),
        }


class _IdsFile:
    """Files of the ids of one split's sessions; they are created with the first id."""

    def __init__(self, folder: Path, kind: str, open_files: ExitStack) -> None:
        self._folder, self._kind, self._open_files = folder, kind, open_files
        self._array: _ArrayFile | None = None  # of the numbers, or of the offsets into the text
        self._text: BinaryIO | None = None

    def append(self, ids: np.ndarray) -> None:
        """Append the ids of further sessions: all int64, or all str objects."""
        if ids.dtype != object:
            self._array = self._array or self._created("")
            self._array.append(ids)
            return
        if self._array is None or self._text is None:
            self._array = self._created("_offsets")
            self._array.append(np.zeros(1, np.int64))
            text = (self._folder / f"{self._kind}.txt").open("wb")
            self._text = self._open_files.enter_context(text)
        texts = [f"{text}\n".encode() for text in ids]
        ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
        self._array.append(self._text.tell() + ends)
        self._text.write(b"".join(texts))

    def _created(self, suffix: str) -> _ArrayFile:
        return _ArrayFile(self._folder / f"{self._kind}{suffix}.npy", np.int64, self._open_files)


class _ArrayFile:
    """A list of numbers as .npy that grows; its length is filled in when `open_files` closes."""

    def __init__(self, path: Path, dtype: type[np.generic], open_files: ExitStack) -> None:
        self._out = open_files.enter_context(path.open("wb"))
        self._dtype = np.dtype(dtype)
        self._length = 0
        self._write_header()
        open_files.callback(self._write_header)

    def append(self, values: np.ndarray) -> np.ndarray:
        """Append values; return them as they were written."""
        values = np.ascontiguousarray(values, dtype=self._dtype)
        self._out.write(values.data)
        self._length += len(values)
        return values

    def _write_header(self) -> None:
        """Write the header, which has the same size for every length."""
        self._out.seek(0)
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._length,),
        }
        np.lib.format.write_array_header_1_0(self._out, header)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
