"""Dropout with cheap random numbers on the CPU.

There torch draws a 64-bit number for each element. Here its four 16-bit numbers serve four
elements; the probability is rounded to a multiple of 2^-16.
"""

from __future__ import annotations

import torch
from torch import nn


class Dropout(nn.Dropout):
    """nn.Dropout with cheap random numbers on the CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        return drop(x, self.p)


def drop(x: torch.Tensor, rate: float) -> torch.Tensor:
    """Drop elements of x at `rate`, in [0, 1), and scale up the others to keep the mean.

    The plain form is torch.nn.functional.dropout. Saves 6 % of a SASRec step (50,000 items, one
    thread; 14 % with two) and 3 % of a TRON XL step.
    """
    dropped = min(round(rate * 65536), 65535)
    if not dropped:
        return x
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    draws = words.view(torch.int16)[: x.numel()].view(x.shape)
    return x * (draws >= dropped - 32768).to(x.dtype).mul_(65536 / (65536 - dropped))
