"""Download of a large file with a progress bar, resumed where it was interrupted."""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tron_cli.data.integrity import sha256_of_file
from tron_cli.errors import InputError

BLOCK = 1 << 18
TIMEOUT = 30  # seconds without a byte
_BROKEN = (http.client.HTTPException, ConnectionError, TimeoutError)


def download(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    attempts: int = 5,
    pause: float = 1.0,
) -> Path:
    """Download `url` to `target`, resuming an interrupted transfer, also that of an earlier run.

    The bytes received so far are in TARGET.part, and the identity of the server's file (ETag or
    Last-Modified, and size) in TARGET.part.json: only the rest is requested, and only if the file
    is still the same. A server that cannot do that sends the whole file again. Gives up after
    `attempts` transfers in a row without new bytes, waiting `pause` seconds, doubling, between
    them. Raises InputError when the server refuses, the connection fails, or the checksum differs.
    """
    part = target.with_name(target.name + ".part")
    about = target.with_name(target.name + ".part.json")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        failures = 0
        while True:
            before = _size(part)
            reason = _transfer(url, part, about)
            if reason is None:
                break
            failures = failures + 1 if _size(part) <= before else 0
            if failures >= attempts:
                raise InputError(
                    f"downloading {url} broke off after {_size(part):,} bytes ({reason}); "
                    "run the same command again to resume"
                )
            time.sleep(pause * 2**failures)
    except urllib.error.HTTPError as error:
        raise InputError(f"downloading {url} failed: the server answered {error}") from error
    except urllib.error.URLError as error:
        raise InputError(f"downloading {url} failed: {error.reason}") from error
    except OSError as error:
        raise InputError(f"downloading {url} to {target} failed: {error}") from error

    if sha256 is not None and (actual := sha256_of_file(part)) != sha256:
        part.unlink()
        about.unlink()
        raise InputError(
            f"{url} has sha256 {actual}, expected {sha256}: it was damaged on the way or changed "
            "at its source, and was deleted; run the same command again"
        )
    part.replace(target)
    about.unlink()
    return target


def _transfer(url: str, part: Path, about: Path) -> str | None:
    """Append the answer to one request to `part`; return None if complete, else the reason."""
    identity = _read_identity(about, url) or {}
    have = _size(part) if identity else 0
    request = urllib.request.Request(url, headers={"User-Agent": "tron-recsys"})
    if have:
        if have == identity["size"]:
            return None
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", identity["etag"] or identity["modified"])
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
            raise
        part.unlink()  # the server has another, shorter file now
        return "the file has changed"
    except _BROKEN as error:
        return _reason(error)
    with response:
        came = _identity(url, response.headers)
        if response.status == http.client.PARTIAL_CONTENT:
            start, size = _content_range(response.headers)
            came["size"] = size
            if start != have or not _same(came, identity):
                part.unlink()
                return "the file has changed"
        else:
            have = 0
            about.write_text(json.dumps(came))
        with (
            part.open("ab" if have else "wb") as output,
            tqdm(
                desc=f"download {part.stem}",
                total=came["size"],
                initial=have,
                unit="B",
                unit_scale=True,
                disable=None,
            ) as bar,
        ):
            try:
                while block := response.read(BLOCK):
                    output.write(block)
                    bar.update(len(block))
            except _BROKEN as error:
                return _reason(error)
    if came["size"] is not None and _size(part) != came["size"]:
        return f"got {_size(part):,} of {came['size']:,} bytes"
    return None


def _identity(url: str, headers: Message) -> dict[str, Any]:
    """Return what identifies the version of a file on a server."""
    etag = headers.get("ETag")
    length = headers.get("Content-Length")
    return {
        "url": url,
        # A weak ETag does not promise the same bytes, so it cannot be resumed with.
        "etag": None if etag is None or etag.startswith("W/") else etag,
        "modified": headers.get("Last-Modified"),
        "size": int(length) if length else None,
    }


def _read_identity(about: Path, url: str) -> dict[str, Any] | None:
    """Return the identity of the partial file, or None if it cannot be resumed."""
    try:
        identity = json.loads(about.read_text())
        resumable = identity["url"] == url and (identity["etag"] or identity["modified"])
        return identity if resumable and identity["size"] is not None else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _same(came: dict[str, Any], identity: dict[str, Any]) -> bool:
    """Return whether a partial answer is of the same file; it may leave out ETag and date."""
    repeated = [key for key in ("etag", "modified") if came[key] is not None]
    return all(came[key] == identity[key] for key in ("size", *repeated))


def _content_range(headers: Message) -> tuple[int, int] | tuple[None, None]:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
    return (int(match[1]), int(match[2])) if match else (None, None)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
