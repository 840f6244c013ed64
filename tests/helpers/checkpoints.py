"""Checkpoints without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.datasets import tiny_settings, write_dataset
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

TRAIN = [[1, 2, 3], [4, 5]]


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


@pytest.fixture
def dataset(tmp_path: Path, test_sessions: list[list[int]]) -> Dataset:
    return write_dataset(tmp_path, train=TRAIN, test=test_sessions, val=[[1, 2]], num_items=20)
