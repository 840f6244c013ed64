"""Checkpoints without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from helpers.datasets import tiny_settings
from tron_cli.baselines import build_baseline
from tron_cli.baselines.base import Baseline
from tron_cli.checkpoint import (
    Checkpoint,
    dataset_identity,
    encode_item_ids,
    load_checkpoint,
    save_checkpoint,
)
from tron_cli.config import ExperimentConfig
from tron_cli.data.dataset import Dataset, count_events
from tron_cli.models.base import Model, build_model


def random_checkpoint(
    dataset: Dataset, file: Path, *, torch_seed: int = 3, with_ties: bool = False, **changes: Any
) -> Checkpoint:
    """Save a network with random weights, or a baseline fitted to the training split.

    with_ties: many items share an embedding, and some have one of zeros.
    """
    config = ExperimentConfig(**tiny_settings(dataset_name=dataset.name, **changes))
    train, num_items = dataset.split("train"), dataset.num_items
    model: Model | Baseline
    if config.is_baseline:
        model = build_baseline(config, num_items)
        model.fit(train)
    else:
        torch.manual_seed(torch_seed)
        model = build_model(config, num_items)
        if with_ties:
            with torch.no_grad():
                for table in (model.item_embedding.weight, model.item_table):
                    table[2 : num_items + 1 : 3] = table[1:num_items:3]
                    table[num_items // 2] = 0
                    table[num_items] = 0
    save_checkpoint(
        file,
        config=config,
        model=model,
        step=5,
        epoch=0,
        metrics={},
        dataset=dataset_identity(dataset),
        item_ids=encode_item_ids(dataset.item_ids),
        training={},
        popularity=torch.from_numpy(count_events(train, num_items)),
    )
    return load_checkpoint(file)
