"""OTTO's files of JSON lines, in blocks of whole lines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tron_cli.errors import InputError
from tron_cli.prepare.fetching.raw import describe, is_compressed, open_raw
from tron_cli.prepare.reading.columns import MAX_LINE_BYTES, text_blocks
from tron_cli.prepare.reading.otto_lines import read_clicks

BLOCK_BYTES = 1 << 22
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RawFile:
    """A file of JSON lines, plain or compressed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.free: list[bytearray] = []
        self._digest = hashlib.sha256()

    def blocks(self) -> Iterator[bytearray]:
        """Yield the file in blocks of whole lines, as `read_clicks` takes them.

        Getting fresh memory from the system takes longer than filling it: put used blocks into
        `free`.
        """
        if is_compressed(self.path):
            for text, _ in text_blocks(self.path):
                block = self._block()
                block[:] = text
                yield block
            return
        size = self.path.stat().st_size
        if not size:
            raise InputError(f"{self.path} is empty")
        is_first = True
        with (
            open_raw(self.path) as content,
            tqdm(total=size, desc=self.path.name, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while True:
                block = self._block()
                del block[BLOCK_BYTES:]
                block += bytes(BLOCK_BYTES - len(block))
                del block[content.readinto(block) :]
                if not block:
                    return
                line_end = content.readline(MAX_LINE_BYTES)
                if len(line_end) == MAX_LINE_BYTES:
                    raise InputError(
                        f"{self.path} has no line end for {MAX_LINE_BYTES:,} bytes: is it jsonl?"
                    )
                block += line_end
                self._digest.update(block)  # while its bytes are in the cache
                bar.update(len(block))
                if is_first and block.startswith(BYTE_ORDER_MARK):
                    del block[: len(BYTE_ORDER_MARK)]
                is_first = False
                yield block

    def _block(self) -> bytearray:
        return self.free.pop() if self.free else bytearray()

    def description(self) -> dict[str, Any]:
        """Describe the file for dataset.json, after all blocks were read."""
        if is_compressed(self.path):
            return describe(self.path)
        return {
            "file": self.path.name,
            "bytes": self.path.stat().st_size,
            "sha256": self._digest.hexdigest(),
        }


def by_first_session(paths: list[Path]) -> list[RawFile]:
    """Return files in the order of the first sessions in them; that of one file is not read."""

    def first_session(path: Path) -> tuple[bool, int, Path]:
        for text in RawFile(path).blocks() if len(paths) > 1 else ():
            numbers = read_clicks(text).sessions
            if len(numbers):
                return False, int(numbers[0]), path
        return True, 0, path

    return [RawFile(path) for path in sorted(paths, key=first_session)]
