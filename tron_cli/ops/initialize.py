"""Initial values of tables and layers."""

from __future__ import annotations

import torch
from torch import nn

_SMALL = 0.02  # standard deviation


def xavier_uniform(rows: int, columns: int) -> torch.Tensor:
    """Draw [rows, columns] evenly from +- sqrt(6 / (rows + columns))."""
    return nn.init.xavier_uniform_(torch.empty(rows, columns))


def standard_normal(rows: int, columns: int) -> torch.Tensor:
    """Draw [rows, columns] from N(0, 1)."""
    return torch.randn(rows, columns)


def small_normal(rows: int, columns: int) -> torch.Tensor:
    """Draw [rows, columns] from N(0, 0.02), RecBole's choice after BERT's."""
    return standard_normal(rows, columns).mul_(_SMALL)


def small_normal_weights(module: nn.Module) -> None:
    """Draw the matrix of a linear layer from N(0, 0.02) and set its bias to zero; skip others."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=_SMALL)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
