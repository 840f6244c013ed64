"""Attention over packed rows. Only here are rows padded, in groups of similar length.

Shapes: N packed events, B rows, D width of the hidden states, R rows of a group, W their padded
width, H heads, d = D / H, V keys of a row: W, or one more where padding is attended, K distances
of a key from a query.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from tron_cli.ops.dropout import RowsOfWhole, drop

if TYPE_CHECKING:
    from tron_cli.data.batches import AttentionGroup


class Padding(NamedTuple):
    """Padding in front of each row, to which its events attend; all of it has one key and value.

    query_key_value_13D: laid out like that of an event. count_B: int64, places of padding per row.
    """

    query_key_value_13D: torch.Tensor
    count_B: torch.Tensor


class RelativeBias(nn.Module):
    """Learned bias of each head's scores for each distance between two events, at first 0.

    window: most events of a row. causal: for distances 0 to window - 1 to earlier events; otherwise
    also for those to later events. The biases are one vector, so that, like other biases, they are
    not decayed.
    """

    def __init__(self, num_heads: int, window: int, *, causal: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.later = 0 if causal else window - 1
        self.bias_HK = nn.Parameter(torch.zeros(num_heads * (self.later + window)))

    def forward(self, width: int) -> torch.Tensor:
        """Return the biases [H, W, W] of queries (rows) and keys (columns) of padded rows."""
        place_W = torch.arange(width, device=self.bias_HK.device)
        distance_WW = place_W[:, None] - place_W
        # Attention sees no padding, which may lie further away, nor what is later if causal.
        index_WW = distance_WW.clamp(-self.later, self.window - 1) + self.later
        bias_KH = self.bias_HK.view(self.num_heads, -1).T
        return F.embedding(index_WW, bias_KH).permute(2, 0, 1)


def packed_attention(
    query_key_value_N3D: torch.Tensor,
    groups: tuple[AttentionGroup, ...],
    *,
    num_heads: int,
    dropout_rate: float,
    causal: bool = True,
    padding: Padding | None = None,
    relative_bias: RelativeBias | None = None,
) -> torch.Tensor:
    """Let each event attend to the events of its own row, head by head: [N, 3D] -> [N, D].

    query_key_value_N3D: queries, keys and values side by side. dropout_rate: applied to the
    attention weights; 0 outside training. causal: an event attends to itself and to earlier events
    of its row; otherwise to all of them. padding: all events of a row attend to each of its places
    of padding; dropout drops all or none of them. relative_bias: added to the scores, not together
    with padding.
    """
    attended = []
    first_row = 0
    head_dim = query_key_value_N3D.shape[1] // (3 * num_heads)
    for group in groups:
        rows, width = group.gather_RW.shape
        if group.keep is None:
            qkv = query_key_value_N3D[group.start : group.end]
        else:
            qkv = query_key_value_N3D.index_select(0, group.gather_RW.flatten())
        qkv_RW3Hd = qkv.view(rows, width, 3, num_heads, head_dim)
        q_RHWd, k_RHVd, v_RHVd = qkv_RW3Hd.permute(2, 0, 3, 1, 4)
        bias = None
        if not causal and group.keep is not None:
            bias = _hidden_padding(qkv, group.keep, rows, width)
        if relative_bias is not None:
            bias_HWW = relative_bias(width).to(qkv.dtype)
            hidden = _hidden_future(q_RHWd) if causal else bias
            bias = bias_HWW if hidden is None else bias_HWW + hidden
        if padding is not None:
            count_R = padding.count_B[first_row : first_row + rows]
            k_RHVd, v_RHVd, bias = _with_padding(padding, count_R, k_RHVd, v_RHVd, bias, causal)
        first_row += rows
        out_RHWd = attention(
            q_RHWd, k_RHVd, v_RHVd, dropout_rate, causal=causal, bias=bias, whole=group.whole
        )
        out_ND = out_RHWd.transpose(1, 2).reshape(rows * width, num_heads * head_dim)
        attended.append(out_ND if group.keep is None else out_ND.index_select(0, group.keep))
    return torch.cat(attended)


def attention(
    q_RHWd: torch.Tensor,
    k_RHVd: torch.Tensor,
    v_RHVd: torch.Tensor,
    dropout_rate: float,
    *,
    causal: bool = True,
    bias: torch.Tensor | None = None,
    whole: RowsOfWhole | None = None,
) -> torch.Tensor:
    """Return `F.scaled_dot_product_attention`, computed faster where the CPU drops weights.

    causal: without a bias, place w sees the keys up to w. bias: added to the scores [R, H, W, V],
    to whose shape it is broadcast; -inf hides a key. whole: see `drop`.

    Saves 8 % of a gSASRec step at MovieLens-1M's lengths, one thread; 1 % at OTTO's.
    """
    causal = causal and bias is None
    if not dropout_rate or q_RHWd.is_cuda:
        return F.scaled_dot_product_attention(
            q_RHWd, k_RHVd, v_RHVd, attn_mask=bias, dropout_p=dropout_rate, is_causal=causal
        )
    scores_RHWV = q_RHWd @ (k_RHVd / math.sqrt(q_RHWd.shape[3])).transpose(2, 3)
    if causal:
        bias = _hidden_future(q_RHWd)
    if bias is not None:
        scores_RHWV = scores_RHWV + bias
    return drop(scores_RHWV.softmax(dim=3), dropout_rate, whole) @ v_RHVd


def _with_padding(
    padding: Padding,
    count_R: torch.Tensor,
    k_RHWd: torch.Tensor,
    v_RHWd: torch.Tensor,
    bias: torch.Tensor | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return keys and values with one in front that stands for all padding of a row, and the bias.

    n equal scores weigh as much as one score that is higher by log n.
    """
    rows, heads, width, dim = k_RHWd.shape
    key_value_2H1d = padding.query_key_value_13D.view(3, heads, 1, dim)[1:]
    k_RH1d, v_RH1d = key_value_2H1d.unsqueeze(1).expand(2, rows, heads, 1, dim)
    if bias is None:
        bias = _hidden_future(k_RHWd) if causal else k_RHWd.new_zeros(())
    log_count_R1W1 = count_R.to(k_RHWd.dtype).log().view(rows, 1, 1, 1).expand(-1, 1, width, 1)
    bias_R1WV = torch.cat([log_count_R1W1, bias.expand(rows, 1, width, width)], dim=3)
    return torch.cat([k_RH1d, k_RHWd], dim=2), torch.cat([v_RH1d, v_RHWd], dim=2), bias_R1WV


def _hidden_future(like_RHWd: torch.Tensor) -> torch.Tensor:
    """Return a bias [W, W] that hides from each place the places after it."""
    width = like_RHWd.shape[2]
    return like_RHWd.new_full((width, width), -torch.inf).triu_(1)


def _hidden_padding(like: torch.Tensor, keep: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """Return a bias [R, 1, 1, W] that hides the places past the end of each row."""
    bias = like.new_full((rows * width,), -torch.inf).index_fill_(0, keep, 0.0)
    return bias.view(rows, 1, 1, width)
