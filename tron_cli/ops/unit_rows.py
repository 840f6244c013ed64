"""Rows of length one, for scores by cosine.

Lengths are summed in float64 and rounded once, so that they do not depend on the platform, nor on
how many rows are computed together, and equal rows stay equal.

Shapes: N rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch

# Shorter rows are divided by this, as in torch.nn.functional.normalize: zeros stay zeros.
_SHORTEST = 1e-12
# float64 copies of so many rows stay in the cache.
_ROWS_AT_ONCE = 1 << 12


def unit_rows(x_ND: torch.Tensor) -> torch.Tensor:
    """Return `plain_unit_rows` of a table, with float64 copies of some rows at a time."""
    return _UnitRows.apply(x_ND)


def plain_unit_rows(x_ND: torch.Tensor) -> torch.Tensor:
    """Return each row divided by its length, [N, D]; float16 and bfloat16 become float32."""
    x_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
    return x_ND / _lengths(x_ND)


def _lengths(x_ND: torch.Tensor) -> torch.Tensor:
    """Return the length of each row, at least _SHORTEST: [N, 1]."""
    length_N1 = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True, dtype=torch.float64)
    return length_N1.clamp_min(_SHORTEST).to(x_ND.dtype)


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor) -> torch.Tensor:
        length_N1 = torch.cat([_lengths(rows) for rows in x_ND.split(_ROWS_AT_ONCE)])
        unit_ND = x_ND / length_N1
        ctx.save_for_backward(unit_ND, length_N1)
        return unit_ND

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        unit_ND, length_N1 = ctx.saved_tensors
        # The part of the gradient along a row changes its length alone. Rows that are divided by
        # _SHORTEST have a length of less than one, and all of the gradient.
        along_N1 = (unit_ND * grads[0]).sum(dim=1, keepdim=True)
        along_N1 = along_N1.masked_fill(length_N1 <= _SHORTEST, 0.0)
        return torch.addcmul(grads[0], unit_ND, along_N1, value=-1).div_(length_N1)
