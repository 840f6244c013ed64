"""The one place where the benchmarks call tron's training step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch

from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import training_batch
from tron_cli.data.dataset import Sessions
from tron_cli.models.base import build_model
from tron_cli.sampling.negatives import Distribution
from tron_cli.training.optim import RowAdam, optimizer_of
from tron_cli.training.step import training_loss


def training_step(
    config: ExperimentConfig, num_items: int
) -> Callable[[Sessions, np.ndarray], torch.Tensor]:
    """Run one step of `tron train` on a batch of sessions, on the CPU; return the loss."""
    model = build_model(config, num_items)
    optimizer = optimizer_of(config, model)
    # A long run finds its moments in memory; the first steps would ask the system for each page.
    for moments in optimizer.state.values():
        for values in moments.values():
            values.zero_()
    distribution = Distribution(num_items)
    before_lookup = optimizer.catch_up if isinstance(optimizer, RowAdam) else None
    bf16 = config.precision == "bf16"

    def step(sessions: Sessions, chosen: np.ndarray) -> torch.Tensor:
        batch = training_batch(sessions, chosen, config.sequence_length)
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss = training_loss(model, batch, config, distribution, before_lookup=before_lookup)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
