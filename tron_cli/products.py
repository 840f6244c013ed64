"""Matrix products against rows of a table, by the fastest float32 library of the machine.

PyTorch multiplies float32 matrices on the CPU with MKL, which on other vendors' processors keeps to
AVX2. oneDNN, which PyTorch brings along, uses AVX-512 on any that has it: twice the rate there, in
the same arithmetic.

Shapes: N rows, D width, V rows of the table.
"""

from __future__ import annotations

import functools

import torch


def row_products(a_ND: torch.Tensor, table_VD: torch.Tensor) -> torch.Tensor:
    """a_ND @ table_VD.T, without gradients; [N, V] in the arguments' dtype."""
    if a_ND.dtype == torch.float32 and a_ND.device.type == "cpu" and _one_dnn():
        return torch.ops.mkldnn._linear_pointwise(a_ND, table_VD, None, "none", [], "")
    return a_ND @ table_VD.T


@functools.cache
def _one_dnn() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )
