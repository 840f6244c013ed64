"""Item tables whose rows are divided among processes.

Rows are looked up by two all-to-all exchanges, of the ids and of their rows. Gradients take the
same way back, so that the data sent grows with the rows that a step touches, not with the table.

Shapes: V rows of a whole table, v those that a process holds, U distinct rows that it needs, T
those of them that have a gradient, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tron_cli.distributed.processes import Processes

_ROWS_AT_ONCE = 1 << 16  # sent together to be written


@dataclass(frozen=True)
class TableShard:
    """Rows of each item table of a model that this process holds: first to last - 1.

    Rows are divided as torch.chunk divides them: all processes but the last ones hold equally many.
    num_rows: V. Methods that communicate are called by all processes, in the same order.
    """

    processes: Processes
    num_rows: int

    @property
    def size(self) -> int:
        """Rows that most processes hold."""
        return -(-self.num_rows // self.processes.count)

    @property
    def first(self) -> int:
        return min(self.processes.rank * self.size, self.num_rows)

    @property
    def last(self) -> int:
        return min(self.first + self.size, self.num_rows)

    def held(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the ids of rows that this process holds, as places in its part of the table."""
        return ids[(ids >= self.first) & (ids < self.last)] - self.first

    def fetch(self, table_vD: torch.Tensor, ids_U: torch.Tensor, *, sparse: bool) -> torch.Tensor:
        """Return rows [U, D] of the whole table from the processes that hold them.

        ids_U: int64, distinct and ascending. The rows have a gradient of table_vD, the sum over all
        processes in the order of their ranks: sparse, each row once, or dense.
        """
        return _Fetched.apply(table_vD, ids_U, self, sparse)

    def collected(self, table_vD: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield all rows of the whole table in the first process, some at a time, on the CPU.

        The other processes send theirs, and yield nothing.
        """
        for low in range(0, self.num_rows, _ROWS_AT_ONCE):
            first, last = (
                min(max(end - self.first, 0), len(table_vD)) for end in (low, low + _ROWS_AT_ONCE)
            )
            (rows,) = self.processes.to_first(table_vD[first:last].cpu())
            if self.processes.is_first:
                yield rows

    def _sizes(self, ids_U: torch.Tensor) -> tuple[list[int], list[int]]:
        """Return how many ids this process sends to each, and receives from each."""
        sent = torch.bincount(ids_U // self.size, minlength=self.processes.count)
        one_each = [1] * self.processes.count
        received = self.processes.exchanged(sent, one_each, one_each)
        return sent.tolist(), received.tolist()


class _Fetched(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table_vD: torch.Tensor, ids_U: torch.Tensor, shard: TableShard, sparse: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(ids_U)
        ctx.shape, ctx.shard, ctx.sparse = table_vD.shape, shard, sparse
        sent, received = shard._sizes(ids_U)
        asked = shard.processes.exchanged(ids_U, sent, received) - shard.first
        return shard.processes.exchanged(table_vD.index_select(0, asked), received, sent)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (ids_U,), shard = ctx.saved_tensors, ctx.shard
        # Most negatives that were looked up are not among the top-k; NaN counts as touched.
        touched = (grads[0].norm(dim=1) != 0).nonzero()[:, 0]
        ids_T, values_TD = ids_U[touched], grads[0].index_select(0, touched)
        sent, received = shard._sizes(ids_T)
        ids = shard.processes.exchanged(ids_T, sent, received) - shard.first
        values = shard.processes.exchanged(values_TD, sent, received)
        distinct, place = ids.unique(return_inverse=True)
        summed = values.new_zeros(len(distinct), values.shape[1])
        for place_of, values_of in zip(
            place.split(received), values.split(received), strict=True
        ):  # each process sends a row once, so that the order of the sum is that of the ranks
            summed.index_add_(0, place_of, values_of)
        if not ctx.sparse:
            dense = summed.new_zeros(ctx.shape).index_copy_(0, distinct, summed)
            return dense, None, None, None
        gradient = torch.sparse_coo_tensor(
            distinct[None], summed, ctx.shape, is_coalesced=True, check_invariants=False
        )
        return gradient, None, None, None
