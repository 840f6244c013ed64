"""Small archives, zip and 7z."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import py7zr

CLICKS = b"1,2014-04-07T10:51:09.277Z,214536502,0\n" * 2000


def make_zip(file: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def make_7z(file: Path, members: dict[str, bytes]) -> Path:
    with py7zr.SevenZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(content, name)
    return file


MAKERS = [make_zip, make_7z]


Maker = Callable[[Path, dict[str, bytes]], Path]
