"""Checkpoints without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from helpers.datasets import tiny_settings
from tron_cli.checkpoint import (
    Checkpoint,
    dataset_identity,
    encode_item_ids,
    load_checkpoint,
    save_checkpoint,
)
from tron_cli.config import ExperimentConfig
from tron_cli.data.dataset import Dataset
from tron_cli.models.base import build_model


def random_checkpoint(dataset: Dataset, file: Path, **changes: Any) -> Checkpoint:
    config = ExperimentConfig(**tiny_settings(dataset_name=dataset.name, **changes))
    torch.manual_seed(3)
    save_checkpoint(
        file,
        config=config,
        model=build_model(config, dataset.num_items),
        step=5,
        epoch=0,
        metrics={},
        dataset=dataset_identity(dataset),
        item_ids=encode_item_ids(dataset.item_ids),
        training={},
    )
    return load_checkpoint(file)
