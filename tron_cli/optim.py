"""Optimizers and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float
) -> torch.optim.Optimizer:
    """Adam or Adagrad over dense gradients, with torch's other defaults."""
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, fused=True)
    return torch.optim.Adagrad(parameters, lr=lr)  # its fused form lacks CUDA in some releases


def learning_rate(
    step: int, *, lr: float, schedule: str, warmup_steps: int, total_steps: int
) -> float:
    """The rate of step 0, 1, ...: linear warm-up to `lr`, then constant or a half cosine to 0."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
