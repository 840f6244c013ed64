"""Unpacking: the wanted files and nothing else, and refusals of archives that are not sound."""

from __future__ import annotations

import errno
import random
import shutil
import stat
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import py7zr
import pytest
from helpers.archives import CLICKS, MAKERS, Maker, make_zip

from tron_cli.errors import InputError
from tron_cli.prepare.fetching.archive import unpack


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("folder", ["", "inner/", "a/b/"])
def test_only_what_is_wanted_is_unpacked(tmp_path: Path, make: Maker, folder: str) -> None:
    members = {f"{folder}other.dat": b"x" * 99, f"{folder}clicks.dat": CLICKS, "read.me": b"y"}
    archive = make(tmp_path / "archive", members)
    found = unpack(archive, ["clicks.dat"], tmp_path / "out")
    assert found == {"clicks.dat": tmp_path / "out" / "clicks.dat"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["clicks.dat"]
    assert found["clicks.dat"].read_bytes() == CLICKS


@pytest.mark.parametrize("make", MAKERS)
def test_unpacked_files_are_kept_unless_they_differ(tmp_path: Path, make: Maker) -> None:
    archive = make(tmp_path / "archive", {"a": CLICKS, "b": b"bb"})
    unpack(archive, ["a", "b"], tmp_path)
    before = (tmp_path / "a").stat().st_ino
    (tmp_path / "b").write_bytes(b"xx")
    unpack(archive, ["a", "b"], tmp_path)
    assert (tmp_path / "a").stat().st_ino == before
    assert (tmp_path / "b").read_bytes() == b"bb"


@pytest.mark.parametrize(
    "name",
    ["../clicks.dat", "/clicks.dat", "a/../../clicks.dat", "C:/clicks.dat", "..\\clicks.dat"],
)
def test_paths_out_of_a_zip_are_refused(tmp_path: Path, name: str) -> None:
    archive = make_zip(tmp_path / "archive.zip", {name: CLICKS})
    with pytest.raises(InputError, match="out of the folder"):
        unpack(archive, ["clicks.dat"], tmp_path / "in" / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["archive.zip"]


def test_paths_out_of_a_7z_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "archive.7z"
    with py7zr.SevenZipFile(file, "w") as archive:
        archive.set_encoded_header_mode(False)
        archive.writestr(CLICKS, "xx/clicks.dat")
    # No tool writes such a name, so it is put into the header, whose checksums are mended.
    content = bytearray(
        file.read_bytes().replace("xx/".encode("utf-16le"), "../".encode("utf-16le"))
    )
    header = 32 + int.from_bytes(content[12:20], "little")
    content[28:32] = zlib.crc32(content[header:]).to_bytes(4, "little")
    content[8:12] = zlib.crc32(content[12:32]).to_bytes(4, "little")
    file.write_bytes(content)
    with pytest.raises(InputError, match="out of the folder"):
        unpack(file, ["clicks.dat"], tmp_path / "in" / "out")
    assert list(tmp_path.rglob("*")) == [file]


def test_links_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("clicks.dat")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    (tmp_path / "clicks.dat").symlink_to("/etc/passwd")
    with py7zr.SevenZipFile(tmp_path / "archive.7z", "w") as seven:
        seven.write(tmp_path / "clicks.dat", "clicks.dat")
    for name in ("archive.zip", "archive.7z"):
        with pytest.raises(InputError, match="a link"):
            unpack(tmp_path / name, ["clicks.dat"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", MAKERS)
def test_missing_and_ambiguous_members(tmp_path: Path, make: Maker) -> None:
    archive = make(tmp_path / "archive", {"a/x.dat": b"1", "b/x.dat": b"2"})
    with pytest.raises(InputError, match=r"holds no clicks\.dat"):
        unpack(archive, ["clicks.dat"], tmp_path)
    with pytest.raises(InputError, match=r"more than one x\.dat"):
        unpack(archive, ["x.dat"], tmp_path)


@pytest.mark.parametrize("make", MAKERS)
def test_damaged_archives(tmp_path: Path, make: Maker) -> None:
    noise = random.Random(0).randbytes(20_000)
    whole = make(tmp_path / "whole", {"clicks.dat": noise}).read_bytes()
    damaged = tmp_path / "damaged"
    out = tmp_path / "out"
    cuts = [6, 10, 33, 200, 9_000, len(whole) - 30, len(whole) - 1]
    flips = [len(whole) // 2, 1_000]
    texts = [whole[:cut] for cut in cuts]
    texts += [whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :] for at in flips]
    for text in texts:
        damaged.write_bytes(text)
        with pytest.raises(InputError, match=r"damaged is .*damaged"):
            unpack(damaged, ["clicks.dat"], out)
        assert not out.exists() or list(out.iterdir()) == []


def test_encrypted_archives(tmp_path: Path) -> None:
    with py7zr.SevenZipFile(tmp_path / "a.7z", "w", password="secret") as archive:
        archive.writestr(CLICKS, "clicks.dat")
    with pytest.raises(InputError, match="encrypted"):
        unpack(tmp_path / "a.7z", ["clicks.dat"], tmp_path / "out")


def test_an_encrypted_zip_says_so(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"a.txt": CLICKS})
    content = bytearray(archive.read_bytes())
    content[6] |= 1  # in the member's own header
    content[content.index(b"PK\x01\x02") + 8] |= 1  # and in the directory
    archive.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.zip is encrypted: unpack it with its password"):
        unpack(archive, ["a.txt"], tmp_path / "out")


@pytest.mark.parametrize("make", MAKERS)
def test_too_little_space(tmp_path: Path, make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make(tmp_path / "archive", {"clicks.dat": CLICKS})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="make room"):
        unpack(archive, ["clicks.dat"], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("make", MAKERS)
def test_a_disk_that_fills_up_is_reported_with_the_folder(
    tmp_path: Path, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make(tmp_path / "archive", {"clicks.dat": CLICKS})

    def fill(bar: object, count: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tron_cli.prepare.fetching.archive.tqdm.update", fill)
    with pytest.raises(InputError, match=rf"unpacking .* to {tmp_path / 'out'} failed: .*No space"):
        unpack(archive, ["clicks.dat"], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
