"""Unpacking of the wanted files of a zip or 7z archive, and no others."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import py7zr
from py7zr.exceptions import PasswordRequired
from py7zr.io import Py7zIO, WriterFactory
from tqdm import tqdm

from tron_cli.errors import InputError

ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
SEVEN_ZIP_MAGIC = b"7z\xbc\xaf\x27\x1c"
BLOCK = 1 << 22


@dataclass(frozen=True)
class _Member:
    """File of an archive. name: with its path; size: bytes; regular: neither link nor device."""

    name: str
    size: int
    crc32: int | None
    regular: bool


def is_archive(path: Path) -> bool:
    """Return whether a file is a zip or 7z archive, by its first bytes."""
    with path.open("rb") as file:
        start = file.read(6)
    return start.startswith(ZIP_MAGIC) or start == SEVEN_ZIP_MAGIC


def unpack(archive: Path, wanted: Sequence[str], folder: Path) -> dict[str, Path]:
    """Unpack the members called `wanted`, from any folder of the archive, to folder/NAME.

    Existing files with the archived size and CRC-32 are kept. Files are written atomically, under
    our own names, never the archive's.
    Raises InputError for a damaged archive, a missing member, one that is a link or whose path
    leaves the archive, and for too little disk space.
    """
    with archive.open("rb") as file:
        is_7z = file.read(6) == SEVEN_ZIP_MAGIC
    listing = _list_7z(archive) if is_7z else _list_zip(archive)
    members = {name: _choose(archive, listing, name) for name in wanted}
    targets = {name: folder / name for name in wanted}
    missing = [name for name in wanted if not _is_unpacked(targets[name], members[name])]
    if not missing:
        return targets

    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(members[name].size for name in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"unpacking {archive} needs {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB "
            "free: make room, or use another --data-dir"
        )
    aside = {name: folder / f".{name}.partial-{os.getpid()}" for name in missing}
    outputs = {members[name].name: aside[name] for name in missing}
    try:
        with (
            tqdm(
                total=needed, desc=f"unpack {archive.name}", unit="B", unit_scale=True, disable=None
            ) as bar,
            _reading(archive, folder),
        ):
            (_extract_7z if is_7z else _extract_zip)(archive, outputs, bar.update)
        for name in missing:
            if not aside[name].is_file() or aside[name].stat().st_size != members[name].size:
                raise InputError(f"{archive} is damaged: {name} ends too early; get it again")
        for name in missing:
            aside[name].replace(targets[name])
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)
    return targets


@contextmanager
def _reading(archive: Path, folder: Path | None = None) -> Iterator[None]:
    """Turn what a damaged or encrypted archive makes the libraries raise into InputError.

    folder: where its files are written.
    """
    try:
        yield
    except InputError:
        raise
    except PasswordRequired as error:
        raise _encrypted(archive) from error
    except OSError as error:
        # Not of the archive: no permission, no space.
        if error.filename is not None or error.errno == errno.ENOSPC:
            target = f" to {folder}" if folder else ""
            raise InputError(f"unpacking {archive}{target} failed: {error}") from error
        raise _damaged(archive, error) from error
    except Exception as error:
        # These libraries raise anything for damage: struct.error, TypeError, LZMAError, ...
        raise _damaged(archive, error) from error


def _encrypted(archive: Path) -> InputError:
    return InputError(f"{archive} is encrypted: unpack it with its password, and pass the folder")


def _damaged(archive: Path, error: Exception) -> InputError:
    reason = str(error) or type(error).__name__
    return InputError(f"{archive} is a truncated or damaged archive ({reason}); get it again")


def _choose(archive: Path, listing: list[_Member], name: str) -> _Member:
    """Return the one member called `name`, if it is a plain file within the archive."""
    found = [member for member in listing if PurePosixPath(member.name).name == name]
    if len(found) != 1:
        number = "no" if not found else "more than one"
        raise InputError(f"{archive} holds {number} {name}: is it the right archive?")
    member = found[0]
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or ":" in member.name or not member.regular:
        raise InputError(
            f"{archive} holds {member.name!r}, a link or a path out of the folder: not unpacked; "
            "get the archive from its own page"
        )
    return member


def _is_unpacked(file: Path, member: _Member) -> bool:
    if member.crc32 is None or not file.is_file() or file.stat().st_size != member.size:
        return False
    crc = 0
    with file.open("rb") as source:
        while block := source.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return crc == member.crc32


def _list_zip(archive: Path) -> list[_Member]:
    with _reading(archive), zipfile.ZipFile(archive) as content:
        infos = content.infolist()
    return [
        _Member(
            name=info.filename.replace("\\", "/"),
            size=info.file_size,
            crc32=info.CRC,
            # The upper half of the attributes is the Unix mode, zero where there is none.
            regular=stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG),
        )
        for info in infos
        if not info.is_dir()
    ]


def _extract_zip(
    archive: Path, outputs: dict[str, Path], progress: Callable[[int], object]
) -> None:
    with zipfile.ZipFile(archive) as content:
        for info in content.infolist():
            output = outputs.get(info.filename.replace("\\", "/"))
            if output is None:
                continue
            if info.flag_bits & 1:
                raise _encrypted(archive)
            with content.open(info) as source, output.open("wb") as target:
                while block := source.read(BLOCK):
                    target.write(block)
                    progress(len(block))


def _list_7z(archive: Path) -> list[_Member]:
    with _reading(archive), py7zr.SevenZipFile(archive) as content:
        infos = content.list()
    return [
        _Member(
            name=info.filename.replace("\\", "/"),
            size=info.uncompressed,
            crc32=info.crc32,
            regular=info.is_file,
        )
        for info in infos
        if not info.is_directory
    ]


def _extract_7z(archive: Path, outputs: dict[str, Path], progress: Callable[[int], object]) -> None:
    with py7zr.SevenZipFile(archive) as content:
        names = [name for name in content.namelist() if name.replace("\\", "/") in outputs]
        by_name = {PurePosixPath(name).name: path for name, path in outputs.items()}
        content.extract(targets=names, factory=_Writers(by_name, progress))


class _Writers(WriterFactory):
    """Factory of our file for each member, so that py7zr never chooses a path itself."""

    def __init__(self, outputs: dict[str, Path], progress: Callable[[int], object]) -> None:
        self.outputs = outputs
        self.progress = progress

    def create(self, filename: str) -> Py7zIO:
        # py7zr puts a folder before the member's name.
        return _Writer(self.outputs[PurePosixPath(filename).name], self.progress)


class _Writer(Py7zIO):
    def __init__(self, path: Path, progress: Callable[[int], object]) -> None:
        self.file = path.open("w+b")
        self.progress = progress

    def write(self, s: bytes | bytearray) -> int:
        self.progress(len(s))
        return self.file.write(s)

    def read(self, size: int | None = None) -> bytes:
        return self.file.read(-1 if size is None else size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def flush(self) -> None:
        self.file.flush()

    def size(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def close(self) -> None:
        self.file.close()
