"""Scalable cross-entropy: softmax among the items near a position, found by random projection.

Mezentsev, Gusak, Oseledets and Frolov, Scalable Cross-Entropy Loss for Sequential Recommendations
with Large Item Catalogs (RecSys 2024).

Shapes: N positions, D width of the table, V its rows, I items (rows 1..I of the table), C items of
a block, B buckets, b buckets of a part, X positions of a bucket, Y items of a bucket.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from tron_cli.losses.cross_entropy import blocks_of_items, product_dtype
from tron_cli.ops.products import row_products

# Logits of buckets held at once, as in cross_entropy.py.
_LOGITS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}


def sce(
    hidden_ND: torch.Tensor,
    table_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    num_items: int,
    sce_buckets: int,
    sce_bucket_positions: int,
    sce_bucket_items: int,
    sce_mix: bool,
) -> torch.Tensor:
    """Return the cross-entropy of each target among the items in a bucket of its position: [N].

    Each of sce_buckets random directions defines a bucket: the sce_bucket_positions positions and
    the sce_bucket_items items with the largest products with it. A position's loss in a bucket is
    the cross-entropy of its target among the target and the bucket's items. Its loss is the largest
    over its buckets: every bucket is a part of the full softmax, and the one with the hardest items
    comes closest to it. The paper takes the mean over the positions that are in a bucket. To make
    this the mean over all positions, the loss of a position in no bucket is zero here, and that of
    the others is multiplied by (positions with a target) / (positions in a bucket).

    hidden_ND [N, D] and table_VD [V, D] are floating point, V > num_items; targets_N is int64 [N],
    0 where there is nothing to predict: such positions do not count in any bucket.
    sce_buckets, sce_bucket_positions: 0 is the paper's choice, twice the root of N, for both.
    sce_mix: directions are random mixtures of the batch's hidden states instead of white noise, so
    that they lie where the hidden states do. Directions come from torch's default generator.

    Besides the products with the directions, which have no gradient, the logits of B x X x Y pairs
    are computed, in parts, and again for the gradients. The gradient of the table is dense.
    """
    hidden_ND = hidden_ND.to(table_VD.dtype)  # under autocast a layer may return a lower precision
    dtype = product_dtype(table_VD)
    usual = round(2 * math.sqrt(len(hidden_ND)))
    with torch.autocast(table_VD.device.type, enabled=False):
        with torch.no_grad():
            positions_BX, items_BY = buckets(
                hidden_ND.detach(),
                table_VD.detach(),
                targets_N,
                num_items=num_items,
                num_buckets=sce_buckets or usual,
                num_positions=min(sce_bucket_positions or usual, len(hidden_ND)),
                bucket_items=min(sce_bucket_items, num_items),
                mix=sce_mix,
                dtype=dtype,
            )
        return _BucketCrossEntropy.apply(
            hidden_ND, table_VD, targets_N, positions_BX, items_BY, dtype
        )


def buckets(
    hidden_ND: torch.Tensor,
    table_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    num_items: int,
    num_buckets: int,
    num_positions: int,
    bucket_items: int,
    mix: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions [B, X] and items [B, Y] of each bucket, int64, distinct and in no order.

    Where fewer than X positions have a target, others fill the bucket up.
    """
    padding_N = targets_N == 0
    if mix:
        weights_BN = _noise(num_buckets, len(hidden_ND), like=hidden_ND)
        directions_BD = weights_BN @ hidden_ND.masked_fill(padding_N[:, None], 0.0)
    else:
        directions_BD = _noise(num_buckets, hidden_ND.shape[1], like=hidden_ND)
    directions_BD = directions_BD.to(dtype)
    scores_BN = row_products(directions_BD, hidden_ND.to(dtype))
    scores_BN = scores_BN.masked_fill(padding_N, -torch.inf)
    _, positions_BX = _top(scores_BN, num_positions)
    best_BY = items_BY = None
    for block in blocks_of_items(num_buckets, num_items, hidden_ND.device):
        scores_BC = row_products(directions_BD, table_VD[block].to(dtype))
        scores_BC, column_BC = _top(scores_BC, bucket_items)
        item_BC = column_BC + block.start
        if best_BY is not None and items_BY is not None:
            scores_BC = torch.cat([best_BY, scores_BC], dim=1)
            item_BC = torch.cat([items_BY, item_BC], dim=1)
        best_BY, column_BY = _top(scores_BC, bucket_items)
        items_BY = item_BC.gather(1, column_BY)
    assert items_BY is not None
    return positions_BX, items_BY


def _noise(rows: int, columns: int, *, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=like.dtype, device=like.device)


def _top(scores_BC: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `count` highest scores of each row, or all if there are fewer, and columns."""
    best = scores_BC.topk(min(count, scores_BC.shape[1]), dim=1, sorted=False)
    return best.values, best.indices


class _BucketCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        table_VD: torch.Tensor,
        targets_N: torch.Tensor,
        positions_BX: torch.Tensor,
        items_BY: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        target_N = (hidden_ND * table_VD[targets_N]).sum(dim=1)
        others = []
        for positions_bX, items_bY in _parts(positions_BX, items_BY):
            hidden_bXD = F.embedding(positions_bX, hidden_ND).to(dtype)
            rows_bYD = F.embedding(items_bY, table_VD).to(dtype)
            logits_bXY = _logits(hidden_bXD, rows_bYD, targets_N[positions_bX], items_bY)
            others.append(logits_bXY.to(target_N.dtype).logsumexp(dim=2))
        # For each place in a bucket, the log-sum over the items other than the target.
        others_BX = torch.cat(others)
        # The largest belongs to the bucket of the largest loss: all buckets have the same target.
        others_N = target_N.new_full((len(target_N),), -torch.inf).scatter_reduce_(
            0, positions_BX.flatten(), others_BX.flatten(), "amax"
        )
        predicts_N = (targets_N > 0).to(target_N.dtype)
        placed_N = torch.zeros_like(target_N).scatter_(0, positions_BX.flatten(), 1.0) * predicts_N
        weight_N = placed_N * (predicts_N.sum() / placed_N.sum().clamp(min=1.0))
        ctx.save_for_backward(
            hidden_ND, table_VD, targets_N, positions_BX, items_BY,
            target_N, others_BX, others_N, weight_N,
        )  # fmt: skip
        ctx.dtype = dtype
        return -F.logsigmoid(target_N - others_N) * weight_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (
            hidden_ND, table_VD, targets_N, positions_BX, items_BY,
            target_N, others_BX, others_N, weight_N,
        ) = ctx.saved_tensors  # fmt: skip
        dtype = ctx.dtype
        grad_N = grads[0] * weight_N
        # The gradient of the target's logit: minus the softmax of all others.
        grad_target_N1 = -(grad_N * torch.sigmoid(others_N - target_N))[:, None]
        grad_hidden_ND = grad_target_N1 * table_VD[targets_N]
        grad_table_VD = torch.zeros_like(table_VD)
        grad_table_VD.index_add_(0, targets_N, grad_target_N1 * hidden_ND)
        # Only the bucket of the largest loss has a gradient; several that tie share it.
        largest_BX = (others_BX == others_N[positions_BX]).to(grad_N.dtype)
        ties_N = torch.zeros_like(grad_N).index_add_(
            0, positions_BX.flatten(), largest_BX.flatten()
        )
        log_sum_N = torch.logaddexp(others_N, target_N)
        share_BX = (grad_N / ties_N.clamp(min=1.0))[positions_BX] * largest_BX
        for positions_bX, items_bY, share_bX in _parts(positions_BX, items_BY, share_BX):
            hidden_bXD = F.embedding(positions_bX, hidden_ND).to(dtype)
            rows_bYD = F.embedding(items_bY, table_VD).to(dtype)
            grad_bXY = _logits(hidden_bXD, rows_bYD, targets_N[positions_bX], items_bY)
            grad_bXY = grad_bXY.to(grad_N.dtype).sub_(log_sum_N[positions_bX][:, :, None]).exp_()
            grad_bXY = grad_bXY.mul_(share_bX[:, :, None]).to(dtype)
            grad_bXD = (grad_bXY @ rows_bYD).to(hidden_ND.dtype)
            grad_bYD = (grad_bXY.transpose(1, 2) @ hidden_bXD).to(table_VD.dtype)
            grad_hidden_ND.index_add_(0, positions_bX.flatten(), grad_bXD.flatten(0, 1))
            grad_table_VD.index_add_(0, items_bY.flatten(), grad_bYD.flatten(0, 1))
        return grad_hidden_ND, grad_table_VD, None, None, None, None


def _logits(
    hidden_bXD: torch.Tensor,
    rows_bYD: torch.Tensor,
    targets_bX: torch.Tensor,
    items_bY: torch.Tensor,
) -> torch.Tensor:
    """Return logits [b, X, Y] of each bucket's positions and items, -inf at a position's target."""
    logits_bXY = hidden_bXD @ rows_bYD.transpose(1, 2)
    is_target_bXY = targets_bX[:, :, None] == items_bY[:, None, :]
    return logits_bXY.masked_fill_(is_target_bXY, -torch.inf)


def _parts(
    positions_BX: torch.Tensor, items_BY: torch.Tensor, *more: torch.Tensor
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield a few buckets at a time."""
    size = max(1, positions_BX.shape[1] * items_BY.shape[1])
    count = max(1, _LOGITS_AT_ONCE[positions_BX.device.type] // size)
    return zip(*(values.split(count) for values in (positions_BX, items_BY, *more)), strict=True)
