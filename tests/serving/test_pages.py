"""Pages of a mapped checkpoint that leave memory and come back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tron_cli.serving.pages import release

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is mapped")


def mapped(path: Path) -> torch.Tensor:
    torch.manual_seed(0)
    torch.save({"table": torch.randn(4_000_000)}, path)
    table: torch.Tensor = torch.load(path, mmap=True, weights_only=True)["table"]
    return table


def resident_file_pages() -> int:
    """Return the bytes of mapped files in the memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def test_released_pages_leave_memory_and_come_back_unchanged(tmp_path: Path) -> None:
    table = mapped(tmp_path / "table.pt")
    copy = table.clone()
    before = resident_file_pages()
    assert release(table)
    assert resident_file_pages() <= before - table.nbytes + (1 << 20)
    assert torch.equal(table, copy)


def test_pages_that_were_written_to_stay(tmp_path: Path) -> None:
    table = mapped(tmp_path / "table.pt")
    table[1_000_000] = 7
    assert not release(table)
    assert table[1_000_000] == 7


@pytest.mark.parametrize("size", [0, 1, 1_000_000])
def test_memory_that_is_not_of_a_file_stays(size: int) -> None:
    table = torch.arange(size)
    assert not release(table)
    assert torch.equal(table, torch.arange(size))


def test_a_system_that_says_nothing_keeps_its_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tron_cli.serving.pages._SMAPS", tmp_path / "missing")
    assert not release(mapped(tmp_path / "table.pt"))
