"""Dropout with cheap random numbers on the CPU.

There torch draws a 64-bit number for each element. Here its four 16-bit numbers serve four
elements; the probability is rounded to a multiple of 2^-16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# Number of rows of a whole batch, and which of them a tensor holds.
RowsOfWhole = tuple[int, torch.Tensor]

_events: RowsOfWhole | None = None


@contextmanager
def dropping_as_part(events: RowsOfWhole) -> Iterator[None]:
    """Let the rows that `Dropout` sees on the CPU be some of the events of a whole batch.

    Each is dropped as in the whole batch, whose random numbers are all drawn.
    """
    global _events
    _events = events
    try:
        yield
    finally:
        _events = None


class Dropout(nn.Dropout):
    """nn.Dropout with cheap random numbers on the CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        return drop(x, self.p, _events)


def drop(x: torch.Tensor, rate: float, whole: RowsOfWhole | None = None) -> torch.Tensor:
    """Drop elements of x at `rate`, in [0, 1), and scale up the others to keep the mean.

    whole: x holds these rows of a whole tensor, of which they drop what they would drop in it.

    The plain form is torch.nn.functional.dropout. Saves 6 % of a SASRec step (50,000 items, one
    thread; 14 % with two) and 3 % of a TRON XL step.
    """
    dropped = min(round(rate * 65536), 65535)
    if not dropped:
        return x
    shape = x.shape if whole is None else torch.Size([whole[0], *x.shape[1:]])
    words = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    draws = words.view(torch.int16)[: shape.numel()].view(shape)
    if whole is not None:
        draws = draws.index_select(0, whole[1])
    return x * (draws >= dropped - 32768).to(x.dtype).mul_(65536 / (65536 - dropped))
