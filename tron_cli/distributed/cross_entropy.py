"""Cross-entropy over the whole catalogue, where each process holds some rows of the table.

Each process compares the hidden states of all with its own items. What is sent per step are the
hidden states, their gradients and two sums of each position; of the table it is nothing.

Shapes: N positions of a process, M of all, D width, v rows of the table that a process holds.
"""

from __future__ import annotations

from typing import Any

import torch

from tron_cli.distributed.tables import TableShard
from tron_cli.losses.cross_entropy import Items, product_dtype


def sharded_ce(
    hidden_ND: torch.Tensor,
    table_vD: torch.Tensor,
    targets_N: torch.Tensor,
    shard: TableShard,
    num_items: int,
    label_smoothing: float,
) -> torch.Tensor:
    """Return `losses.cross_entropy.ce` of the own positions, [N], among the items of all processes.

    Called by all processes together, as is its backward pass. The gradient of table_vD is that of
    the losses of all positions.
    """
    hidden_ND = hidden_ND.to(table_vD.dtype)  # under autocast a layer may return a lower precision
    dtype = product_dtype(table_vD)
    first, last = max(shard.first, 1), min(shard.last - 1, num_items)
    items = Items(first - shard.first, last - shard.first, num_items, label_smoothing)
    with torch.autocast(table_vD.device.type, enabled=False):
        return _ShardedCrossEntropy.apply(hidden_ND, table_vD, targets_N, shard, items, dtype)


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        table_vD: torch.Tensor,
        targets_N: torch.Tensor,
        shard: TableShard,
        items: Items,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        processes = shard.processes
        (length,) = processes.gathered(torch.tensor([len(hidden_ND)]))
        end = int(length[: processes.rank + 1].sum())
        own = slice(end - len(hidden_ND), end)
        hidden_MD, targets_M = processes.gathered(hidden_ND, targets_N)
        targets_M = targets_M - shard.first  # those of other processes are no row of this one
        log_sum_M, weighted_M = items.sums(hidden_MD, table_vD, targets_M, dtype)
        (log_sums,) = processes.gathered(log_sum_M)
        log_sum_M = log_sums.view(processes.count, -1).logsumexp(dim=0)
        processes.add_up(weighted_M)
        ctx.save_for_backward(hidden_MD, table_vD, targets_M, log_sum_M)
        ctx.processes, ctx.own, ctx.items, ctx.dtype = processes, own, items, dtype
        return log_sum_M[own] - weighted_M[own]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_M,) = ctx.processes.gathered(grads[0].contiguous())
        grad_hidden_MD, grad_table_vD = ctx.items.gradients(grad_M, *ctx.saved_tensors, ctx.dtype)
        ctx.processes.add_up(grad_hidden_MD)
        return grad_hidden_MD[ctx.own], grad_table_vD, None, None, None, None
