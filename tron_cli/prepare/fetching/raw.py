"""Raw files of the public sources: their origin, search and opening."""

from __future__ import annotations

import gzip
import os
import re
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from tron_cli.data.integrity import sha256_of_file
from tron_cli.errors import InputError
from tron_cli.prepare.fetching.archive import is_archive, unpack
from tron_cli.prepare.fetching.download import download

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

GZIP_MAGIC = b"\x1f\x8b"
# A zstd file begins with a frame, or with a skippable frame as pzstd writes it.
ZSTD_MAGIC = (b"\x28\xb5\x2f\xfd", *(bytes([byte]) + b"\x2a\x4d\x18" for byte in range(80, 96)))
PARQUET_MAGIC = b"PAR1"
_NO_TEXT = {
    rb"PK\x03\x04": "a zip archive (or a workbook): unpack it (or export CSV)",
    rb"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it",
    rb"Rar!\x1a": "a rar archive: unpack it",
    rb"BZh[1-9]1AY&SY": "compressed by bzip2: decompress it, or compress it by gzip or zstd",
    rb"\xfd7zXZ\0": "compressed by xz: decompress it, or compress it by gzip or zstd",
    rb".{257}ustar": "a tar archive: unpack it",
    rb"\x04\x22\x4d\x18": "compressed by lz4: decompress it, or compress it by gzip or zstd",
    rb"\x1f\x9d": "compressed by compress: decompress it, or compress it by gzip or zstd",
    rb"\x1f\x8b|\x28\xb5\x2f\xfd": "compressed twice: decompress it once",
    rb"\xff\xfe\0\0|\0\0\xfe\xff": "UTF-32 text; save it as UTF-8",
    rb"\xff\xfe|\xfe\xff": "UTF-16 text; save it as UTF-8",
    PARQUET_MAGIC: "a Parquet file, where text was expected",
}


@dataclass(frozen=True)
class Source:
    """Public data set: the files that `prepare` reads, and where to get them.

    files: names of the plain files that are read. downloads: names under which the file or archive
    is downloaded, the usual one first. page: web page of the data set. url: a direct address, or
    None where an account or a browser is needed. sha256: of the file at url, where known.
    """

    files: tuple[str, ...]
    downloads: tuple[str, ...]
    page: str
    url: str | None = None
    sha256: str | None = None


SOURCES: dict[str, Source] = {
    "otto": Source(
        files=("otto-recsys-train.jsonl", "otto-recsys-test.jsonl"),
        # The Kaggle client names the archive after the data set, the browser calls it archive.zip.
        downloads=("recsys-dataset.zip", "archive.zip"),
        page="https://www.kaggle.com/datasets/otto/recsys-dataset",
    ),
    "yoochoose": Source(
        files=("yoochoose-clicks.dat",),
        downloads=("yoochoose-data.7z",),
        page="https://s3-eu-west-1.amazonaws.com/yc-rdata/yoochoose-data.7z",
        url="https://s3-eu-west-1.amazonaws.com/yc-rdata/yoochoose-data.7z",
    ),
    "diginetica": Source(
        files=("train-item-views.csv",),
        downloads=("dataset-train-diginetica.zip",),
        page="https://drive.google.com/file/d/0B7XZSACQf0KdenRmMk8yVUU5LWc/",
    ),
    # Kang's preprocessing. The same file is data/ml-1m.txt in kang205/SASRec,
    # python/data/ml-1m.txt in pmixer/SASRec.pytorch and datasets/ml1m/ml-1m.txt in
    # asash/gSASRec-pytorch.
    "ml1m": Source(
        files=("ml-1m.txt",),
        downloads=("ml-1m.txt",),
        page="https://github.com/kang205/SASRec/blob/master/data/ml-1m.txt",
        url="https://raw.githubusercontent.com/kang205/SASRec/master/data/ml-1m.txt",
        sha256="b725f3acb3986fe3130bffd1e77a74d182a1f51799567a236dbd60270f95b0a2",
    ),
}


def locate(source: str, raw: Path | None, data_dir: Path) -> dict[str, Path]:
    """Find, unpack or download the raw files of a source.

    raw: the archive, the unpacked folder (searched with its subfolders) or the file itself; without
    it DATA_DIR/raw/SOURCE is searched, then the source is downloaded to there. Returns the path of
    every file in SOURCES[source].files, compressed or not: read them with `open_raw`. Raises
    InputError where a file is missing, with instructions to get it.
    """
    known = SOURCES[source]
    folder = data_dir / "raw" / source
    if raw is not None:
        return _from_raw(known, raw, folder)
    found = _search(known, folder)
    if found:
        return found
    archive = _find_one(folder, known.downloads)
    if archive is None:
        if known.url is None:
            raise InputError(
                f"{source} needs a browser or an account to download: get {known.downloads[0]} "
                f"from {known.page} and put it into {folder}, or pass --raw PATH"
            )
        try:
            archive = download(known.url, folder / known.downloads[0], sha256=known.sha256)
        except InputError as error:
            raise InputError(
                f"{error}; or get {known.downloads[0]} from {known.page} yourself and put it into "
                f"{folder}, or pass --raw PATH"
            ) from error
    return _from_raw(known, archive, folder)


def _from_raw(known: Source, raw: Path, folder: Path) -> dict[str, Path]:
    """Find the files of a source at the path of --raw; an archive is unpacked into `folder`."""
    wanted = " and ".join(known.files)
    mode = mode_of(raw)
    if stat.S_ISDIR(mode):
        found = _search(known, raw)
        if found:
            return found
        archive = _find_one(raw, known.downloads)
        if archive is None:
            raise InputError(
                f"{raw} and its subfolders hold neither {wanted} (or .gz, .zst) nor "
                f"{known.downloads[0]}; get it from {known.page}"
            )
        raw, mode = archive, mode_of(archive)
    if not stat.S_ISREG(mode):
        problem = "is not a file" if mode else "does not exist"
        raise InputError(f"{raw} {problem}: expected {wanted}, its folder or its archive")
    if is_archive(raw):
        return unpack(raw, known.files, folder)
    with open_raw(raw):
        pass  # refuses other archives
    if len(known.files) == 1:
        return {known.files[0]: raw}
    name = raw.name.removesuffix(".gz").removesuffix(".zst")
    if name not in known.files:
        raise InputError(
            f"{raw} is not an archive and not named as expected: {wanted} (or .gz, .zst); "
            "rename it, or pass the folder that holds them"
        )
    found = _search(known, raw.parent)
    if not found:
        raise InputError(f"{raw.parent} must hold both {wanted} (or .gz, .zst), one is missing")
    return found | {name: raw}


def _search(known: Source, folder: Path) -> dict[str, Path] | None:
    """Find all files of the source in a folder, plain, .gz or .zst; None if one is missing."""
    found = {name: _find_one(folder, (name, name + ".gz", name + ".zst")) for name in known.files}
    complete = {name: path for name, path in found.items() if path is not None}
    return complete if len(complete) == len(found) else None


def _find_one(folder: Path, names: tuple[str, ...]) -> Path | None:
    """Find the first of these names in the folder, else in a subfolder."""
    if not folder.is_dir():
        return None
    # Folders with a leading dot are hidden, or are those into which we unpack.
    nested = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    for level in ([folder], nested):
        for name in names:
            matches = [place / name for place in level if (place / name).is_file()]
            if len(matches) > 1:
                listing = " and ".join(map(str, matches))
                raise InputError(f"found {name} more than once, {listing}: pass the one to use")
            if matches:
                return matches[0]
    return None


def mode_of(path: Path) -> int:
    """Return the st_mode of a path, 0 where nothing is there."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be read: {error.strerror}")


def first_bytes(path: Path) -> bytes:
    """Return the first 512 bytes of a file; one that cannot be read raises InputError."""
    mode = mode_of(path)
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} is a folder: name the file in it")
    if mode and not stat.S_ISREG(mode):
        raise InputError(f"{path} is not a plain file, but a pipe, say: write it to a file first")
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise _unreadable(path, error) from error


def is_compressed(path: Path) -> bool:
    """Return whether `open_raw` decompresses a file, by its first bytes."""
    return first_bytes(path).startswith((GZIP_MAGIC, *ZSTD_MAGIC))


@contextmanager
def open_raw(path: Path) -> Iterator[BufferedReader]:
    """Open a raw file for binary reading, decompressing gzip and zstd as it goes.

    Raises InputError, also within the `with` block, for a file that cannot be read, an archive, a
    truncated or corrupt compressed file, or a file that changes while it is read.
    """
    start = first_bytes(path)
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        with _decompressed(path, start, file) as content:
            yield content
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise InputError(f"{path} changed while it was read: prepare a copy of it")


@contextmanager
def _decompressed(path: Path, start: bytes, file: BufferedReader) -> Iterator[BufferedReader]:
    if not start.startswith((GZIP_MAGIC, *ZSTD_MAGIC)):
        _check_text(path, start)
        yield file
        return
    kind = "gzip" if start.startswith(GZIP_MAGIC) else "zstd"
    try:
        with gzip.GzipFile(fileobj=file) if kind == "gzip" else _ZstdFile(file) as content:
            _check_text(path, content.read(512))
            content.seek(0)
            yield content  # type: ignore[misc]
    except (EOFError, gzip.BadGzipFile, zlib.error, zstd.ZstdError) as error:
        raise InputError(
            f"{path} is a truncated or corrupt {kind} file ({error}); get it again"
        ) from error


class _ZstdFile(zstd.ZstdFile):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.fileobj = file  # as GzipFile has it


def _check_text(path: Path, start: bytes) -> None:
    for magic, what in _NO_TEXT.items():
        if re.match(magic, start, re.DOTALL):
            raise InputError(f"{path} is {what}")


def describe(path: Path) -> dict[str, Any]:
    """Return the record of a source file in dataset.json: name, size and SHA-256 as on disk."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
