"""Raw files: downloading from a real server, and finding and reading what is there."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import socket
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tron_cli.errors import InputError
from tron_cli.prepare.fetching import raw as raw_module
from tron_cli.prepare.fetching.download import download
from tron_cli.prepare.fetching.raw import SOURCES, Source, describe, locate, open_raw
from tron_cli.prepare.reading.inputs import input_files

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd
from helpers.archives import CLICKS, make_7z, make_zip

CONTENT = bytes(range(256)) * 4000  # about 1 MB


@dataclass
class Server:
    """A server on the loopback address, what it serves, how it behaves, and what it was asked."""

    url: str
    content: bytes = CONTENT
    etag: str | None = '"one"'
    modified: str | None = None
    ranges: bool = True
    if_range: bool = True  # whether it knows that header
    break_after: list[int] = field(default_factory=list)  # bytes sent before each next break-off
    status: int = 200
    asked: list[str | None] = field(default_factory=list)  # the Range of each request
    sent: list[int] = field(default_factory=list)  # bytes of each answer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.asked.append(asked)
            if state.status != 200:
                self.send_error(state.status)
                return
            start = 0
            weak = state.etag is not None and state.etag.startswith("W/")
            validator = state.modified if weak else state.etag or state.modified
            same = self.headers.get("If-Range") == validator or not state.if_range
            if asked and state.ranges and same:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                if start >= len(state.content):
                    self.send_error(416)
                    return
                self.send_response(206)
                total = len(state.content)
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            else:
                self.send_response(200)
            if state.etag:
                self.send_header("ETag", state.etag)
            if state.modified:
                self.send_header("Last-Modified", state.modified)
            body = state.content[start:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            body = body[: state.break_after.pop(0)] if state.break_after else body
            state.sent.append(len(body))
            self.wfile.write(body)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Server(f"http://127.0.0.1:{http.server_address[1]}/file.7z")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_download(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.7z"
    assert download(server.url, target, sha256=sha256(CONTENT)) == target
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]
    assert server.asked == [None]


@pytest.mark.parametrize(
    ("etag", "modified"),
    [
        ('"one"', None),
        (None, "Wed, 21 Oct 2015 07:28:00 GMT"),
        ('W/"1"', "Wed, 21 Oct 2015 07:28:00 GMT"),
    ],
)
def test_a_broken_off_transfer_goes_on_where_it_stopped(
    server: Server, tmp_path: Path, etag: str | None, modified: str | None
) -> None:
    server.etag, server.modified = etag, modified
    server.break_after = [300_000, 200_000]
    download(server.url, tmp_path / "file.7z", pause=0)
    assert (tmp_path / "file.7z").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=500000-"]
    assert server.sent == [300_000, 200_000, len(CONTENT) - 500_000]


def test_a_later_run_resumes(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "file.7z"
    server.break_after = [400_000, 0, 0]
    with pytest.raises(InputError, match=r"broke off after 400,000 bytes.*run the same command"):
        download(server.url, target, attempts=2, pause=0)
    assert not target.exists()
    server.asked.clear()
    server.sent.clear()
    download(server.url, target, pause=0)
    assert target.read_bytes() == CONTENT
    assert (server.asked, server.sent) == (["bytes=400000-"], [len(CONTENT) - 400_000])


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("new", [CONTENT[::-1], CONTENT[:300_000], CONTENT + b"more"])
def test_a_file_that_changed_starts_again(
    server: Server, tmp_path: Path, new: bytes, if_range: bool
) -> None:
    target = tmp_path / "file.7z"
    server.break_after = [400_000, 0]
    with pytest.raises(InputError, match="broke off"):
        download(server.url, target, attempts=1, pause=0)
    server.content, server.etag, server.if_range = new, '"two"', if_range
    download(server.url, target, pause=0)
    assert target.read_bytes() == new


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.break_after = [400_000]
    download(server.url, tmp_path / "file.7z", pause=0)
    assert (tmp_path / "file.7z").read_bytes() == CONTENT
    assert server.sent == [400_000, len(CONTENT)]


def test_without_a_validator_there_is_no_resuming(server: Server, tmp_path: Path) -> None:
    server.etag = None
    server.break_after = [400_000]
    download(server.url, tmp_path / "file.7z", pause=0)
    assert server.asked == [None, None]
    assert (tmp_path / "file.7z").read_bytes() == CONTENT


def test_a_complete_part_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "file.7z"
    server.break_after = [400_000, 0]
    with pytest.raises(InputError):
        download(server.url, target, attempts=1, pause=0)
    server.asked.clear()
    target.with_name("file.7z.part").write_bytes(CONTENT)
    download(server.url, target)
    assert server.asked == []


def test_a_wrong_checksum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"sha256 {sha256(CONTENT)}, expected 0123"):
        download(server.url, tmp_path / "file.7z", sha256="0123")
    assert list(tmp_path.iterdir()) == []


def test_refusals_are_one_sentence(server: Server, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(InputError, match="404"):
        download(server.url, tmp_path / "file.7z")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(InputError, match="refused"):
        download(f"http://127.0.0.1:{port}/file.7z", tmp_path / "file.7z")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", ["otto", "yoochoose", "ml1m"])
def test_a_tar_archive_says_so(tmp_path: Path, source: str) -> None:
    (tmp_path / "clicks").write_bytes(CLICKS)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "clicks")
    with pytest.raises(InputError, match=r"a\.tar\.gz is a tar archive: unpack it"):
        locate(source, tmp_path / "a.tar.gz", tmp_path)


def test_zstd_is_read_as_gzip_is(tmp_path: Path) -> None:
    file = tmp_path / "yoochoose-clicks.dat.zst"
    file.write_bytes(zstd.compress(CLICKS))
    assert locate("yoochoose", tmp_path, tmp_path) == {"yoochoose-clicks.dat": file}
    with open_raw(file) as content:
        assert content.read() == CLICKS
    # pzstd writes a skippable frame before each of its frames.
    file.write_bytes(b"\x50\x2a\x4d\x18\x04\0\0\0size" + zstd.compress(CLICKS))
    with open_raw(file) as content:
        assert content.read() == CLICKS


def test_pipes_are_refused(tmp_path: Path) -> None:
    """A pipe gives its bytes once, and without a writer reading one waits for ever."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="pipe is not a plain file"), open_raw(pipe):
        pass


def test_paths_that_cannot_be_looked_at(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", tmp_path / ("n" * 300)):
        with pytest.raises(InputError, match=r"cannot be read: (Too many|File name too long)"):
            locate("yoochoose", path, tmp_path)
        with pytest.raises(InputError, match=r"cannot be read: (Too many|File name too long)"):
            input_files([path], "--input")


def test_raw_may_be_the_file_the_folder_or_the_archive(tmp_path: Path) -> None:
    name = "yoochoose-clicks.dat"
    nested = tmp_path / "unpacked" / "yoochoose-data"
    nested.mkdir(parents=True)
    (nested / f"{name}.gz").write_bytes(gzip.compress(CLICKS))
    renamed = tmp_path / "mine.dat"
    renamed.write_bytes(CLICKS)
    seven = make_7z(tmp_path / "yoochoose-data.7z", {name: CLICKS, "yoochoose-buys.dat": b"1"})
    holder = tmp_path / "holder"
    holder.mkdir()
    shutil.copy(seven, holder)
    data = tmp_path / "data"
    for raw, expected in [
        (renamed, renamed),
        (nested / f"{name}.gz", nested / f"{name}.gz"),
        (nested, nested / f"{name}.gz"),
        (nested.parent, nested / f"{name}.gz"),
        (seven, data / "raw" / "yoochoose" / name),
        (holder, data / "raw" / "yoochoose" / name),
    ]:
        found = locate("yoochoose", raw, data)
        assert found == {name: expected}
        with open_raw(found[name]) as content:
            assert content.read() == CLICKS


def test_without_raw_the_data_folder_is_searched(tmp_path: Path) -> None:
    folder = tmp_path / "raw" / "diginetica"
    folder.mkdir(parents=True)
    make_zip(folder / "dataset-train-diginetica.zip", {"d/train-item-views.csv": b"a;b\n"})
    found = locate("diginetica", None, tmp_path)
    assert found == {"train-item-views.csv": folder / "train-item-views.csv"}
    (folder / "dataset-train-diginetica.zip").unlink()
    assert locate("diginetica", None, tmp_path) == found


def test_otto_needs_both_files(tmp_path: Path) -> None:
    train, test = SOURCES["otto"].files
    (tmp_path / train).write_bytes(b"{}")
    for raw in (tmp_path, tmp_path / train):
        with pytest.raises(InputError, match=test):
            locate("otto", raw, tmp_path)
    (tmp_path / f"{test}.gz").write_bytes(gzip.compress(b"{}"))
    both = {train: tmp_path / train, test: tmp_path / f"{test}.gz"}
    for raw in (tmp_path, tmp_path / train, tmp_path / f"{test}.gz"):
        assert locate("otto", raw, tmp_path) == both
    (tmp_path / "other.jsonl").write_bytes(b"{}")
    with pytest.raises(InputError, match="not named as expected"):
        locate("otto", tmp_path / "other.jsonl", tmp_path)


def test_two_candidates_are_not_guessed_between(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ml-1m.txt").write_text("1 1\n")
    with pytest.raises(InputError, match="more than once"):
        locate("ml1m", tmp_path, tmp_path)


@pytest.mark.parametrize("source", ["otto", "diginetica"])
def test_sources_behind_a_browser_say_what_to_do(tmp_path: Path, source: str) -> None:
    known = SOURCES[source]
    with pytest.raises(InputError) as error:
        locate(source, None, tmp_path)
    for part in (known.downloads[0], known.page, str(tmp_path / "raw" / source), "--raw"):
        assert part in str(error.value)


def test_a_wrong_raw_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist: expected ml-1m\.txt"):
        locate("ml1m", tmp_path / "nowhere", tmp_path)
    with pytest.raises(InputError, match=r"/dev/null is not a file: expected ml-1m\.txt"):
        locate("ml1m", Path("/dev/null"), tmp_path)
    with pytest.raises(InputError, match=r"hold neither yoochoose-clicks\.dat"):
        locate("yoochoose", tmp_path, tmp_path)


def test_a_known_source_is_downloaded_and_unpacked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make_7z(tmp_path / "a.7z", {"clicks.dat": CLICKS}).read_bytes()
    server.content = archive
    server.break_after = [len(archive) // 2]
    monkeypatch.setattr("tron_cli.prepare.fetching.download.time.sleep", lambda seconds: None)
    known = Source(("clicks.dat",), ("all.7z",), "https://page", server.url, sha256(archive))
    monkeypatch.setitem(raw_module.SOURCES, "shop", known)
    found = locate("shop", None, tmp_path / "data")
    assert found["clicks.dat"].read_bytes() == CLICKS
    assert found["clicks.dat"].parent == tmp_path / "data" / "raw" / "shop"
    assert len(server.asked) == 2
    assert locate("shop", None, tmp_path / "data") == found
    assert len(server.asked) == 2

    server.status = 403
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(InputError, match=r"403.*get all\.7z from https://page .*--raw"):
        locate("shop", None, tmp_path / "data")


@pytest.mark.parametrize("cut", [1, 9, 100])
def test_a_truncated_gzip_file_is_named(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "clicks.dat.gz"
    file.write_bytes(gzip.compress(CLICKS)[:-cut])
    with (
        pytest.raises(InputError, match=r"clicks\.dat\.gz is a truncated"),
        open_raw(file) as content,
    ):
        content.read()


def test_describe(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(CLICKS)
    assert describe(tmp_path / "f") == {
        "file": "f",
        "bytes": len(CLICKS),
        "sha256": sha256(CLICKS),
    }


SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_the_published_ml1m_has_the_checksum_we_expect() -> None:
    content = gzip.decompress((SHARED / "ml1m_kang" / "ml-1m.txt.gz").read_bytes())
    assert sha256(content) == SOURCES["ml1m"].sha256
