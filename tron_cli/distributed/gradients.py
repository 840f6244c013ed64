"""Gradients added up over processes: dense ones whole, those of tables as the rows touched.

Shapes: V rows of a table, U of them that a process touches, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from tron_cli.distributed.processes import Processes

# Dense gradients of more elements, such as those of whole tables, are not copied together.
_LARGE = 1 << 20


def add_up_gradients(
    parameters: Iterable[nn.Parameter],
    processes: Processes,
    *,
    sparse: bool,
    divided: Sequence[torch.Tensor] = (),
) -> None:
    """Replace each gradient by the sum over the processes, the same bits in all of them.

    Every process has gradients of the same parameters. sparse: the optimizer takes sparse
    gradients, in which each row then stands once; otherwise they are made dense. divided: tables
    whose rows are divided among the processes, which have the sums for their own rows already.
    """
    small = []
    for weights in parameters:
        if weights.grad is None:
            continue
        if any(weights is table for table in divided):
            if weights.grad.is_sparse and not sparse:
                weights.grad = weights.grad.to_dense()
        elif weights.grad.is_sparse:
            summed = _summed_rows(weights.grad, processes)
            weights.grad = summed if sparse else summed.to_dense()
        elif weights.grad.numel() > _LARGE:
            processes.add_up(weights.grad)
        else:
            small.append(weights.grad)
    if not small:
        return
    bucket = processes.add_up(torch.cat([gradient.flatten() for gradient in small]))
    for gradient, values in zip(small, bucket.split([each.numel() for each in small]), strict=True):
        gradient.copy_(values.view_as(gradient))


def _summed_rows(gradient: torch.Tensor, processes: Processes) -> torch.Tensor:
    """Return the sum over the processes of a sparse gradient [V, D], coalesced."""
    gradient = gradient.coalesce()
    ids_U, values_UD = gradient._indices()[0], gradient._values()
    # Most negatives that were looked up are not among the top-k; NaN counts as touched.
    touched = (values_UD.norm(dim=1) != 0).nonzero()[:, 0]
    ids, values = processes.gathered(ids_U[touched], values_UD[touched])
    return torch.sparse_coo_tensor(
        ids[None], values, gradient.shape, check_invariants=False
    ).coalesce()
