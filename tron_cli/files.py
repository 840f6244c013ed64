"""Atomic writes, locks that end with their process, and the best checkpoint of a run folder."""

from __future__ import annotations

import os
import shutil
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tron_cli.errors import InputError

LAST = "last.pt"  # the state from which a run is resumed


@contextmanager
def written_aside(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Write `path` atomically: yield a file that replaces it if the block ends without an error."""
    partial = _partial(path)
    try:
        with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def written_alone(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Write a file that a person named, as `written_aside` does, when no other process writes it.

    Raises InputError where it cannot be written.
    """
    try:
        with _claimed(path, patience=86_400), written_aside(path, mode) as file:
            yield file
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error


def check_writable(path: Path) -> None:
    """Raise InputError where `written_alone` would fail, before hours of ranking."""
    try:
        with _claimed(path):
            _partial(path).unlink()
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error}); name a file in a folder that exists"
        ) from error


@contextmanager
def _claimed(path: Path, *, patience: float = 0) -> Iterator[None]:
    if path.is_dir():
        raise IsADirectoryError("it is a folder")
    # Before the lock, which makes missing folders, and waits where files cannot be made.
    _partial(path).touch()
    lock = path.with_name(f".{path.name}.lock")
    with locked(lock, path, "name another file", patience=patience):
        yield


@contextmanager
def locked(file: Path, written: Path, otherwise: str, *, patience: float = 0) -> Iterator[None]:
    """Hold the lock `file`, which exists during the block.

    The system releases it when the process ends, however it ends. Raises InputError where it is
    still taken after `patience` seconds, which names `written`, the process that writes it, and
    what to do otherwise; and where the lock cannot be made.
    """
    from filelock import FileLock, Timeout  # not needed for `tron --help`

    lock = FileLock(file)
    try:
        lock.acquire(timeout=patience)
    except Timeout as error:
        if not file.exists():  # as in /proc, where files cannot be made
            raise InputError(
                f"cannot write to {file.parent}: {file.name} cannot be made; name another folder"
            ) from error
        raise InputError(
            f"{written} is being written by {_holder(file)}; wait until it ends, or {otherwise}"
        ) from error
    except OSError as error:
        raise InputError(f"cannot write to {file.parent}: {error}") from error
    try:
        yield
    finally:
        # Before the release: a process that has opened the file by now finds it gone, and retries.
        with suppress(OSError):
            file.unlink()
        lock.release()


def _holder(lock: Path) -> str:
    """Return the process that holds a lock, and its command, where the system tells (Linux)."""
    try:
        inode = lock.stat().st_ino
        held = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        # Such as: 1: FLOCK ADVISORY WRITE 4242 fe:00:2769636 0 EOF; those that wait have an arrow.
        (pid,) = {line[4] for line in held if line[1] == "FLOCK" and line[5].endswith(f":{inode}")}
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except (OSError, ValueError, IndexError):
        return "another process"
    if int(pid) == os.getpid():
        return "this process"
    command = textwrap.shorten(" ".join([Path(words[0]).name, *words[1:]]), 100, placeholder=" ...")
    return f"process {pid} ({command})"


def best_checkpoint(run_dir: Path) -> Path:
    """Return the .pt file beside last.pt in a run folder; raise InputError unless there is one."""
    found = sorted(path.name for path in run_dir.glob("*.pt") if path.name != LAST)
    if len(found) != 1:
        what = f"{len(found)} ({', '.join(found)})" if found else "none"
        raise InputError(
            f"expected one finished checkpoint (.pt) beside {LAST} in {run_dir}, found {what}; "
            "name the file"
        )
    return run_dir / found[0]


def remove_older(folder: Path, pattern: str) -> None:
    """Remove files and folders that fit a pattern and that nobody has changed for a day.

    A killed process left them there.
    """
    for left in folder.glob(pattern):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > 86_400:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
