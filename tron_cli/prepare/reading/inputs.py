"""Files, folders of parts and patterns to the files to read, in order."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path

from tron_cli.errors import InputError
from tron_cli.prepare.fetching.raw import mode_of


def input_files(inputs: Sequence[Path], option: str) -> list[Path]:
    """Return the files that the inputs name: a folder's and a pattern's in sorted order.

    A folder is searched with its subfolders; names that begin with `_` or `.`, which Spark and file
    systems write beside the parts, are left out. Raises InputError where an input names no file.
    """
    files: list[Path] = []
    for given in inputs:
        mode = mode_of(given)
        if stat.S_ISREG(mode):
            files.append(given)
        elif stat.S_ISDIR(mode):
            files += _parts(given, option)
        elif has_magic(str(given)):
            found = [Path(path) for path in sorted(glob(str(given), recursive=True))]  # noqa: PTH207 - may be absolute
            files += [path for path in found if path.is_file()]
            for folder in (path for path in found if path.is_dir() and "**" not in given.parts):
                files += _parts(folder, option)
            if not found:
                raise InputError(f"{option} {given} fits no file: correct the pattern")
        else:
            raise InputError(f"{option} {given} is not a file, a folder or a pattern of files")
    return files


def check_distinct(files: Sequence[Path]) -> None:
    """Raise InputError where one file is given twice, also under two names."""
    seen: dict[tuple[int, int], Path] = {}
    for file in files:
        place = _place(file)
        if place in seen:
            names = "" if file == seen[place] else f" (as {seen[place]} and {file})"
            raise InputError(f"{file} is given twice{names}: its events would count double")
        seen[place] = file


def _place(path: Path) -> tuple[int, int]:
    """Return an identity of a file or folder that is the same through any link."""
    found = path.stat()
    return found.st_dev, found.st_ino


def _parts(folder: Path, option: str) -> list[Path]:
    def fail(error: OSError) -> None:
        raise InputError(f"{option} {error.filename} cannot be read: {error.strerror}") from error

    parts: list[Path] = []
    entered: set[tuple[int, int]] = set()  # links to folders may form a cycle
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        entered.add(_place(Path(place)))
        folders[:] = [
            name
            for name in folders
            if not name.startswith(("_", ".")) and _place(Path(place, name)) not in entered
        ]
        files = (Path(place, name) for name in names if not name.startswith(("_", ".")))
        parts += [file for file in files if file.is_file()]
    if not parts:
        raise InputError(f"{option} {folder} is a folder without files")
    return sorted(parts)
