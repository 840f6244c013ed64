"""Exponential moving average of the weights of a training.

torch.optim.swa_utils.AveragedModel counts its steps in a tensor that it copies to the device each
time, which waits for the GPU.
"""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def add_to_average(average: nn.Module, model: nn.Module, *, decay: float, step: int) -> None:
    """Add a model's weights after a step, counted from 1, to the average of those before.

    In the average, the weights after each step weigh `decay` times as much as those after the next
    one; those before the first step have no part. Buffers are not averaged but copied.
    """
    share = (1 - decay) / (1 - decay**step)
    torch._foreach_lerp_([*average.parameters()], [*model.parameters()], share)
    for values, current in zip(average.buffers(), model.buffers(), strict=True):
        values.copy_(current)
