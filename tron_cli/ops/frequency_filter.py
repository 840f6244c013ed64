"""BSARec's filter over packed rows: what changes slowly in a row, and a share of all else.

Shin et al., An Attentive Inductive Bias for Sequential Recommendation beyond the Self-Attention
(AAAI 2024).

Shapes: N packed events, D width of the hidden states, R rows of a group, W their padded width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from tron_cli.data.batches import AttentionGroup


class FrequencyFilter(nn.Module):
    """low + beta * (x - low), low being the lowest frequencies of each row and column.

    The row stands in a window of `length` places that is zero elsewhere, of whose discrete Fourier
    transform `frequencies` (an odd number, the mean and pairs) are low. Where it stands in the
    window makes no difference, since the filter depends on the distance of two places alone. beta,
    one number for each column, is the square of a learned one that is drawn from N(0, 1).
    """

    def __init__(self, dim: int, *, length: int, frequencies: int) -> None:
        super().__init__()
        self.length = length
        self.frequencies = frequencies
        self.sqrt_beta_D = nn.Parameter(torch.randn(dim))

    def forward(self, x_ND: torch.Tensor, groups: tuple[AttentionGroup, ...]) -> torch.Tensor:
        """Map [N, D] to [N, D]. Every event sees all of its row."""
        low_ND = torch.cat([self._low(x_ND, group) for group in groups])
        return low_ND + self.sqrt_beta_D.square() * (x_ND - low_ND)

    def _low(self, x_ND: torch.Tensor, group: AttentionGroup) -> torch.Tensor:
        """Return the low frequencies of the events of a group."""
        rows, width = group.gather_RW.shape
        kernel_WW = self._kernel(width, x_ND)
        if group.keep is None:
            x_RWD = x_ND[group.start : group.end].view(rows, width, x_ND.shape[1])
            return (kernel_WW @ x_RWD).flatten(0, 1)
        x_MD = x_ND.index_select(0, group.gather_RW.flatten())
        is_event_M1 = x_ND.new_zeros(rows * width, 1).index_fill_(0, group.keep, 1.0)
        x_RWD = (x_MD * is_event_M1).view(rows, width, x_ND.shape[1])
        return (kernel_WW @ x_RWD).flatten(0, 1).index_select(0, group.keep)

    def _kernel(self, width: int, like: torch.Tensor) -> torch.Tensor:
        """Return [W, W]: what each place (column) adds to the low frequencies at another (row).

        Transforming, keeping the frequencies 0 and +-1, +-2, ..., and transforming back comes to
        the mean of their waves at the distance of the places.
        """
        place_W = torch.arange(width, device=like.device)
        distance_WW = (place_W[:, None] - place_W).abs()
        angle_W = (2 * math.pi / self.length) * place_W.double()
        pairs = torch.arange(1, (self.frequencies + 1) // 2, device=like.device)
        waves_W = 1 + 2 * (angle_W[:, None] * pairs).cos().sum(dim=1)
        return (waves_W / self.length).to(like.dtype)[distance_WW]
