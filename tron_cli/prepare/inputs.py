"""Files, folders of parts and patterns -> the files to read, in order."""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path

from tron_cli.errors import InputError


def input_files(inputs: Sequence[Path], option: str) -> list[Path]:
    """Return the files that the inputs name: a folder's and a pattern's in sorted order.

    A folder is searched with its subfolders, but for names that begin with `_` or `.`, as Spark and
    file systems write beside the parts. Raises InputError where an input names no file.
    """
    files: list[Path] = []
    for given in inputs:
        if given.is_file():
            files.append(given)
        elif given.is_dir():
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
    """Raise InputError where one file is given twice, be it by another name."""
    seen: dict[Path, Path] = {}
    for file in files:
        place = file.resolve()
        if place in seen:
            names = "" if file == seen[place] else f" (as {seen[place]} and {file})"
            raise InputError(f"{file} is given twice{names}: its events would count double")
        seen[place] = file


def _parts(folder: Path, option: str) -> list[Path]:
    parts = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(("_", ".")) for part in path.relative_to(folder).parts)
    ]
    if not parts:
        raise InputError(f"{option} {folder} is a folder without files")
    return parts
