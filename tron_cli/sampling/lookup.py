"""One lookup per table and step: the distinct rows that a batch and its negatives need.

Everything between the lookup and its gradient works on the looked-up rows and their places, so that
neither the forward nor the backward pass touches the rest of a table.

Shapes: N events, K negatives, V rows of the table, U distinct rows, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tron_cli.data.batches import Batch
    from tron_cli.distributed.tables import TableShard
    from tron_cli.sampling.negatives import Negatives


@dataclasses.dataclass(frozen=True)
class Looked:
    """Looked-up rows of a table, with a batch and negatives that refer to them by place.

    rows_UD: with a gradient of the whole table. batch, negatives: as given, but their item ids are
    places in rows_UD.
    """

    rows_UD: torch.Tensor
    batch: Batch
    negatives: Negatives


# Called with a table and the ids of the rows about to be looked up.
BeforeLookup = Callable[[torch.Tensor, torch.Tensor], None]


def look_up(
    table_VD: torch.Tensor,
    batch: Batch,
    negatives: Negatives,
    *,
    sparse: bool,
    before: BeforeLookup | None = None,
    shard: TableShard | None = None,
) -> Looked:
    """Look up the rows of the inputs, targets, uniform negatives and candidates.

    sparse: the table's gradient is a sparse tensor of the rows looked up, each once. Otherwise it
    is dense, and if more ids are needed than the table has rows, the table itself is returned.
    shard: the rows of the table that table_VD holds; others are fetched from other processes.
    """
    assert batch.targets_N is not None
    parts = [batch.inputs_N, batch.targets_N, negatives.uniform.flatten()]
    if negatives.candidates_N is not None:
        parts.append(negatives.candidates_N)
    ids = torch.cat(parts)
    if not sparse and shard is None and len(ids) >= len(table_VD):
        return Looked(table_VD, batch, negatives)
    ids_U, place = _distinct(ids, len(table_VD), same_shape=batch.padded)
    if before is not None:
        before(table_VD, ids_U)
    inputs_N, targets_N, uniform, *candidates = place.split([*map(len, parts)])
    return Looked(
        _rows(table_VD, ids_U, sparse, shard),
        dataclasses.replace(batch, inputs_N=inputs_N, targets_N=targets_N),
        dataclasses.replace(
            negatives,
            uniform=uniform.view(negatives.uniform.shape),
            candidates_N=candidates[0] if candidates else None,
        ),
    )


def look_up_inputs(
    table_VD: torch.Tensor,
    batch: Batch,
    *,
    sparse: bool,
    before: BeforeLookup | None = None,
    shard: TableShard | None = None,
) -> tuple[Batch, torch.Tensor]:
    """Look up the rows of the inputs alone, for a model that scores with another table."""
    ids_U, place_N = _distinct(batch.inputs_N, len(table_VD), same_shape=batch.padded)
    if before is not None:
        before(table_VD, ids_U)
    return dataclasses.replace(batch, inputs_N=place_N), _rows(table_VD, ids_U, sparse, shard)


def _rows(
    table_VD: torch.Tensor, ids_U: torch.Tensor, sparse: bool, shard: TableShard | None
) -> torch.Tensor:
    """Return rows [U, D] with a gradient of the table."""
    if shard is not None:
        return shard.fetch(table_VD, ids_U, sparse=sparse)
    return _Rows.apply(table_VD, ids_U, sparse)


def _distinct(
    ids: torch.Tensor, num_rows: int, *, same_shape: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distinct ids, ascending, and the place of each id among them.

    same_shape: return as many as there are ids, or as the table has rows if that is fewer, so that
    the host need not wait for the device to count them; the rest are 0, the row of no item, which
    has no gradient.
    """
    if not same_shape:
        return ids.unique(return_inverse=True)
    ascending, order = ids.sort()
    is_new = torch.ones_like(ids)
    is_new[1:] = ascending[1:] != ascending[:-1]
    place_ascending = is_new.cumsum(0) - 1
    place = torch.empty_like(ids).scatter_(0, order, place_ascending)
    ids_U = ids.new_zeros(min(len(ids), num_rows))
    return ids_U.scatter_(0, place_ascending, ascending), place


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table_VD: torch.Tensor, ids_U: torch.Tensor, sparse: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(ids_U)
        ctx.shape, ctx.sparse = table_VD.shape, sparse
        return table_VD.index_select(0, ids_U)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (ids_U,) = ctx.saved_tensors
        if ctx.sparse:
            # The ids are distinct or have a gradient of zero, so there is nothing to add up.
            return (
                torch.sparse_coo_tensor(
                    ids_U[None], grads[0], ctx.shape, is_coalesced=True, check_invariants=False
                ),
                None,
                None,
            )
        return grads[0].new_zeros(ctx.shape).index_copy_(0, ids_U, grads[0]), None, None
