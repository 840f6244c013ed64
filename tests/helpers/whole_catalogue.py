"""Losses over the whole catalogue by their formula."""

from __future__ import annotations

import torch
from torch.nn import functional as F

ITEMS, DIM = 150, 6


def problem(events: int = 70, *, rows: int = ITEMS + 1, scale: float = 1.0, dtype=torch.float64):
    """Hidden states, a table whose rows beyond the items hold large values, and targets."""
    generator = torch.Generator().manual_seed(events)
    hidden_ND = scale * torch.randn(events, DIM, generator=generator, dtype=torch.float64)
    table_VD = torch.randn(rows, DIM, generator=generator, dtype=torch.float64)
    table_VD[0] = 50.0
    table_VD[ITEMS + 1 :] = 50.0
    targets_N = torch.randint(1, ITEMS + 1, (events,), generator=generator)
    return (
        hidden_ND.to(dtype).requires_grad_(),
        table_VD.to(dtype).requires_grad_(),
        targets_N,
    )


def full(hidden_ND, table_VD, targets_N, *, label_smoothing=0.0):
    """The definition, in float64, on all logits at once."""
    logits_NI = hidden_ND.double() @ table_VD.double()[1 : ITEMS + 1].T
    return F.cross_entropy(
        logits_NI, targets_N - 1, reduction="none", label_smoothing=label_smoothing
    )


def gradients(loss_N, *leaves, weight_N=None):
    weight_N = torch.ones_like(loss_N) if weight_N is None else weight_N.to(loss_N.dtype)
    return torch.autograd.grad((loss_N * weight_N).sum(), leaves)
