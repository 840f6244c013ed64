"""Int8 products for tables of any size, which are else ranked by float32 products alone."""

from __future__ import annotations

import pytest
import torch

from tron_cli.evaluation import ranking
from tron_cli.ops import int8_table


def use_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank small tables by int8 products too, in chunks of a few items."""
    if not int8_table.usable(torch.device("cpu")):
        pytest.skip("this processor has no exact int8 products")
    monkeypatch.setattr(ranking, "_INT8_ITEMS", 1)
    monkeypatch.setattr(ranking, "_INT8_EVENTS", 1)
    monkeypatch.setattr(int8_table, "_CHUNK", 7)
    monkeypatch.setattr(int8_table, "_GROUP", 1)
    monkeypatch.setattr(int8_table, "_SCARCE", 4)
