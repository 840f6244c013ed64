"""Cross-entropy over the whole catalogue, without the matrix of all logits.

Shapes: N positions, D width of the table, V its rows, I items (rows 1..I of the table), C items of
a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tron_cli.ops.products import row_products

# Logits held at once; on a CPU they fit its cache.
_LOGITS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}
# The narrowest block; with very many positions a block exceeds the cache.
_ITEMS = 64


def ce(
    hidden_ND: torch.Tensor,
    table_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    num_items: int,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return -log softmax of each position's target among all items: [N], float32 at least.

    label_smoothing: this share of the target's weight 1 is spread evenly over all items, the target
    included; the loss is then the weighted mean of their -log softmax.

    hidden_ND [N, D] and table_VD [V, D] are floating point, V > num_items; targets_N is int64 [N].
    Row 0 of the table and the rows after num_items are no items: they take no part and have a
    gradient of zero. A position whose target is no item, such as padding, gets the logarithm of the
    sum of all items' exponentials, which is finite; the caller leaves it out.

    Logits exist for one block of items at a time, N by C, and the backward pass computes them
    again: four matrix products where the full matrix takes three, in the memory of one block. Under
    autocast products are in its dtype, logarithms and sums in float32; float64 stays float64.
    `torch.nn.functional.linear_cross_entropy` (torch 2.13) computes the same products in parts of
    positions, each of which reads the whole table; see benchmarks/LOG.md.
    """
    hidden_ND = hidden_ND.to(table_VD.dtype)  # under autocast a layer may return a lower precision
    dtype = product_dtype(table_VD)
    with torch.autocast(table_VD.device.type, enabled=False):
        items = Items(1, num_items, num_items, label_smoothing)
        return _CrossEntropy.apply(hidden_ND, table_VD, targets_N, items, dtype)


def product_dtype(table_VD: torch.Tensor) -> torch.dtype:
    """Return the dtype of matrix products with the table: autocast's, as in layers."""
    device = table_VD.device.type
    if table_VD.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return table_VD.dtype


def blocks_of_items(
    num_rows: int, num_items: int, device: torch.device, first: int = 1
) -> Iterator[slice]:
    """Cut items first..num_items into slices whose products with num_rows rows fit a cache.

    Widths are powers of two, so that batches of nearly equal size have equal blocks.
    """
    width = _ITEMS
    while 2 * width * num_rows <= _LOGITS_AT_ONCE[device.type] and width < num_items:
        width *= 2
    ends = range(first, num_items + 1, width)
    return (slice(low, min(low + width, num_items + 1)) for low in ends)


@dataclass(frozen=True)
class Items:
    """Rows first to last of a table, which are items, with the weights of their logits in the loss.

    The weight of a target is smoothing - 1, and that of every item smoothing / num_items less.
    """

    first: int
    last: int
    num_items: int
    smoothing: float

    def blocks(self, num_rows: int, device: torch.device) -> Iterator[slice]:
        return blocks_of_items(num_rows, self.last, device, self.first)

    def sums(
        self,
        hidden_ND: torch.Tensor,
        table_VD: torch.Tensor,
        targets_N: torch.Tensor,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log of the sum of exponentials, and weighted sum of target and items: both [N].

        The loss is their difference. A target that is not among the items counts as 0.
        """
        factors_ND = hidden_ND.to(dtype)
        log_sum_N = hidden_ND.new_full((len(hidden_ND),), -torch.inf)
        target_N1 = hidden_ND.new_zeros(len(hidden_ND), 1)
        sum_N = hidden_ND.new_zeros(len(hidden_ND))  # of all logits
        for block in self.blocks(len(hidden_ND), hidden_ND.device):
            logits_NC = row_products(factors_ND, table_VD[block].to(dtype)).to(hidden_ND.dtype)
            column_N1, inside_N1 = _columns(targets_N, block)
            target_N1 = target_N1.where(~inside_N1, logits_NC.gather(1, column_N1))
            log_sum_N = torch.logaddexp(log_sum_N, logits_NC.logsumexp(dim=1))
            if self.smoothing:
                sum_N += logits_NC.sum(dim=1)
        share = self.smoothing / self.num_items
        return log_sum_N, (1 - self.smoothing) * target_N1[:, 0] + share * sum_N

    def gradients(
        self,
        grad_N: torch.Tensor,
        hidden_ND: torch.Tensor,
        table_VD: torch.Tensor,
        targets_N: torch.Tensor,
        log_sum_N: torch.Tensor,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients [N, D] of hidden states and [V, D] of the table.

        log_sum_N: of all items of the catalogue.
        """
        grad_N1 = grad_N[:, None]
        factors_ND = hidden_ND.to(dtype)
        grad_hidden_ND = torch.zeros_like(hidden_ND)
        grad_table_VD = torch.empty_like(table_VD)
        grad_table_VD[: self.first] = 0.0
        grad_table_VD[self.last + 1 :] = 0.0
        for block in self.blocks(len(hidden_ND), hidden_ND.device):
            rows_CD = table_VD[block].to(dtype)
            grad_NC = row_products(factors_ND, rows_CD).to(hidden_ND.dtype)
            # softmax minus the weight of each item, times the incoming gradient
            grad_NC.sub_(log_sum_N[:, None]).exp_()
            if self.smoothing:
                grad_NC.sub_(self.smoothing / self.num_items)
            column_N1, inside_N1 = _columns(targets_N, block)
            grad_NC.scatter_add_(1, column_N1, inside_N1.to(grad_NC.dtype).mul_(self.smoothing - 1))
            factors_NC = grad_NC.mul_(grad_N1).to(dtype)
            grad_hidden_ND += row_products(factors_NC, rows_CD.T)
            grad_table_VD[block] = row_products(factors_NC.T, factors_ND.T)
        return grad_hidden_ND, grad_table_VD


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        table_VD: torch.Tensor,
        targets_N: torch.Tensor,
        items: Items,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        log_sum_N, weighted_N = items.sums(hidden_ND, table_VD, targets_N, dtype)
        ctx.save_for_backward(hidden_ND, table_VD, targets_N, log_sum_N)
        ctx.items, ctx.dtype = items, dtype
        return log_sum_N - weighted_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = ctx.items.gradients(grads[0], *ctx.saved_tensors, ctx.dtype)
        return *gradients, None, None, None


def _columns(targets_N: torch.Tensor, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the column of each target in a block, and whether it is in the block: both [N, 1]."""
    column_N = targets_N - block.start
    last = block.stop - block.start - 1
    inside_N = (column_N >= 0) & (column_N <= last)
    return column_N.clamp(0, last)[:, None], inside_N[:, None]
