"""A tiny model and training steps on batches whose shapes do not depend on the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from helpers.datasets import pack_sessions, random_sessions, tiny_settings
from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import Batch
from tron_cli.data.dataset import Sessions
from tron_cli.models.base import Model, build_model
from tron_cli.sampling.negatives import Distribution
from tron_cli.training.optim import optimizer_of
from tron_cli.training.step import training_step

ITEMS = 300
CATALOGUE = {"num_uniform_negatives": 0, "num_batch_negatives": 0, "topk_sampling": False}
LANES = {"model": "gru4rec", "session_parallel": True}


def settings(**changes: Any) -> ExperimentConfig:
    return ExperimentConfig(**tiny_settings(**{"dropout_rate": 0.0, **changes}))


def some_sessions(count: int = 40, seed: int = 3, **lengths: int) -> Sessions:
    return pack_sessions(random_sessions(np.random.default_rng(seed), count, ITEMS, **lengths))


def build(
    config: ExperimentConfig, dtype: torch.dtype = torch.float64
) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = build_model(config, ITEMS).to(dtype)
    return model, optimizer_of(config, model)


def take(
    model: Model,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: ExperimentConfig,
    distribution: Distribution = Distribution(ITEMS),
) -> torch.Tensor:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return training_step(model, optimizer, scaler, batch, config, distribution, torch.float32)
