"""The folder of a dataset while it is written: locked, replaced atomically, recovered after a kill.

    DATA_DIR/.NAME.lock               held while NAME is prepared
    DATA_DIR/.NAME.partial/new        the new dataset
    DATA_DIR/.NAME.partial/scratch    temporary files of preparation
    DATA_DIR/.NAME.partial/replaced   the old dataset, until the new one is in place

Each preparation in DATA_DIR first removes what killed processes left there, under any name whose
lock is free, and puts a replaced dataset back where the new one was never completed.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from tron_cli.errors import InputError, RunError
from tron_cli.files import locked

SPLITS = ("train", "val", "test")
_FILES = {"dataset.json", "item_ids.npy", "item_ids.txt"}
_LEFTOVERS = {"new", "scratch", "replaced", *SPLITS, *_FILES, "aids.bin", "times.bin"}

log = logging.getLogger("tron")


class DatasetFolder:
    """The locked place of a dataset, whose content is replaced at the end.

    `path` may be a link to a folder elsewhere: then that folder is replaced. Raises InputError
    where `path` exists and `replace` is false, or where it is not a prepared dataset, and RunError
    where the disk is full.
    """

    def __init__(self, path: Path, *, replace: bool) -> None:
        self.path = path
        self._replace = replace
        self._place = path.resolve()
        self._work = _work_folder(self._place)
        self.new = self._work / "new"
        self.scratch = self._work / "scratch"
        self._lock = ExitStack()
        self._check()

    def __enter__(self) -> DatasetFolder:
        data_dir = self._place.parent
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            remove_leftovers(data_dir)
            lock = locked(_lock_file(self._place), self.path, "pass another --name", patience=1)
            self._lock.enter_context(lock)
            self._check()  # again: another process or the leftovers may have put one there
            self.new.mkdir(parents=True)
            self.scratch.mkdir()
        except (OSError, InputError) as error:
            self._lock.close()
            if isinstance(error, InputError):
                raise
            raise InputError(f"cannot write to {self.path.parent}: {error}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            _clear(self._work, self._place)
        if isinstance(error, OSError) and _is_full_disk(error):
            raise RunError(
                f"cannot write {self.path} ({error.strerror or 'the disk is full'}); make room in "
                f"{self.path.parent}, or name another folder with --data-dir"
            ) from error

    def put_in_place(self) -> None:
        """Move the new dataset to its place, replacing an old one."""
        if self._place.exists():
            self._place.replace(self._work / "replaced")
        self.new.replace(self._place)

    def _check(self) -> None:
        if not self.path.exists():
            if self.path.is_symlink():
                raise InputError(
                    f"{self.path} is a link to {self._place}, which does not exist; make that "
                    "folder or remove the link"
                )
            return
        if not self._replace:
            raise InputError(
                f"{self.path} exists already; pass --force to replace it, or another --name"
            )
        foreign = _foreign_entries(self.path)
        if foreign:
            raise InputError(
                f"--force replaces prepared datasets only, and {self.path} holds other things "
                f"({', '.join(foreign[:3])}); choose another --name"
            )
        if any(self.path.iterdir()) and not made_with(self.path):
            raise InputError(
                f"--force replaces prepared datasets only, and {self.path} has no readable "
                "dataset.json; move it away, or choose another --name"
            )


def _is_full_disk(error: OSError) -> bool:
    # NumPy says `9 requested and 5 written`, without a number.
    is_numpy = error.errno is None and " requested and " in str(error)
    return is_numpy or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def remove_leftovers(data_dir: Path) -> None:
    """Remove what killed preparations left in a folder of datasets; live ones are kept."""
    for work in data_dir.glob(".*"):
        # Versions without locks appended process ids and random letters.
        found = re.fullmatch(r"\.(.+)\.(partial(-\d+)?|spool-\w+)", work.name)
        if not found or not work.is_dir() or {entry.name for entry in work.iterdir()} - _LEFTOVERS:
            continue
        place = data_dir / found[1]
        try:
            with locked(_lock_file(place), place, "wait"):
                _clear(work, place)
        except InputError:
            continue


def _clear(work: Path, place: Path) -> None:
    """Remove a work folder; a replaced dataset goes back if the new one is not in place."""
    if (work / "replaced").exists() and not place.exists():
        (work / "replaced").replace(place)
        log.warning("restored %s as it was before a killed `tron prepare --force`", place)
    shutil.rmtree(work, ignore_errors=True)


def _work_folder(place: Path) -> Path:
    return place.with_name(f".{place.name}.partial")


def _lock_file(place: Path) -> Path:
    return place.with_name(f".{place.name}.lock")


def made_with(path: Path, **facts: object) -> bool:
    """Return whether a folder has a dataset.json that tron wrote and that holds these entries."""
    try:
        info = json.loads((path / "dataset.json").read_bytes())
    except (OSError, ValueError):
        return False
    is_ours = isinstance(info, dict) and {"format_version", "catalogue_fingerprint"} <= info.keys()
    return is_ours and all(info.get(name) == value for name, value in facts.items())


def _foreign_entries(path: Path) -> list[str]:
    """List the entries of a folder that no prepared dataset has; for a file, its name."""
    if not path.is_dir():
        return [path.name]
    own = {*_FILES, *SPLITS}
    inner = [entry for split in SPLITS for entry in (path / split).glob("*")]
    return sorted(
        [entry.name for entry in path.iterdir() if entry.name not in own]
        + [f"{entry.parent.name}/{entry.name}" for entry in inner if not _is_array(entry)]
    )


def _is_array(path: Path) -> bool:
    return path.is_file() and path.suffix in (".npy", ".txt")
