"""References in plain operations on padded windows, for networks whose weights they are handed.

Shapes: B histories, L places of a window, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from tron_cli.data.batches import Batch

# x_BLD, attend -> x_BLD
BlockOf = Callable[[nn.Module, torch.Tensor, "Attention"], torch.Tensor]


class Attention:
    """softmax(q k' / sqrt(d)) v over earlier places of padded windows, head by head."""

    def __init__(self, real_BL: torch.Tensor, num_heads: int, key_padding_mask: bool) -> None:
        length = real_BL.shape[1]
        future_LL = torch.ones(length, length, dtype=torch.bool).triu(1)
        self.hidden_BLL = future_LL.expand(len(real_BL), -1, -1)
        if key_padding_mask:
            self.hidden_BLL = self.hidden_BLL | ~real_BL[:, None, :]
        self.num_heads = num_heads

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found = []
        for q_BLd, k_BLd, v_BLd in zip(
            *(part.chunk(self.num_heads, dim=2) for part in (q, k, v)), strict=True
        ):
            scores_BLL = q_BLd @ k_BLd.transpose(1, 2) / math.sqrt(q_BLd.shape[2])
            weights_BLL = scores_BLL.masked_fill(self.hidden_BLL, -math.inf).softmax(2)
            found.append(weights_BLL.nan_to_num(0.0) @ v_BLd)  # a place of padding may see nothing
        return torch.cat(found, dim=2)


def windows(batch: Batch, length: int, *, at_end: bool) -> torch.Tensor:
    """[B, L]: item ids of the batch's rows, zeros in front of them or behind."""
    rows = batch.inputs_N.split(batch.lengths_B.tolist())
    missing = [length - len(row) for row in rows]
    return torch.stack(
        [
            F.pad(row, (gap, 0) if at_end else (0, gap))
            for row, gap in zip(rows, missing, strict=True)
        ]
    )


def padded_states(
    model: nn.Module,
    batch: Batch,
    block_of: BlockOf,
    *,
    num_heads: int,
    positions: str = "end",
    key_padding_mask: bool = True,
    embed: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    finish: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> torch.Tensor:
    """Hidden states [N, D] of the batch's events, computed on whole windows.

    Histories end where their window does and, with positions="start", count from their own first
    event. The input of every block is zero at padding. embed: what happens to the sum of item and
    position embedding; finish: what happens to the last block's output.
    """
    inputs_BL = windows(batch, model.sequence_length, at_end=True)
    real_BL = inputs_BL > 0
    x = model.item_embedding.weight[inputs_BL] * model.item_scale
    if positions == "end":
        x = x + model.position_embedding.weight
    elif positions == "start":
        place_BL = (real_BL.cumsum(1) - 1).clamp_min(0)
        x = x + model.position_embedding.weight[place_BL]
    x = embed(x)
    attend = Attention(real_BL, num_heads, key_padding_mask)
    for block in model.blocks:
        x = block_of(block, x * real_BL[:, :, None], attend)
    return finish(x)[real_BL]


def check_same(model: nn.Module, found_ND: torch.Tensor, expected_ND: torch.Tensor) -> None:
    """States and, of a random function of them, the gradients of all weights."""
    torch.testing.assert_close(found_ND, expected_ND, rtol=0, atol=1e-9)
    probe_ND = torch.randn_like(expected_ND)
    names, weights = zip(*model.named_parameters(), strict=True)
    ours, theirs = (
        torch.autograd.grad((states * probe_ND).sum(), weights)
        for states in (found_ND, expected_ND)
    )
    for name, one, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def shaken(model: nn.Module) -> nn.Module:
    """Return a model in float64 and evaluation mode, with no bias at zero and no scale at one."""
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model
