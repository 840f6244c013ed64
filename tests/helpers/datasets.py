"""Sessions, datasets and settings that are quickly made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tron_cli.data.dataset import Dataset, DatasetWriter, Sessions


def pack_sessions(sessions: Iterable[Sequence[int]]) -> Sessions:
    """Lists of item ids -> Sessions."""
    rows = [np.asarray(row, dtype=np.int32) for row in sessions]
    items = np.concatenate(rows) if rows else np.zeros(0, np.int32)
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    return Sessions(items, offsets)


def random_sessions(
    rng: np.random.Generator, count: int, num_items: int, *, longest: int = 9, shortest: int = 2
) -> list[list[int]]:
    lengths = rng.integers(shortest, longest + 1, count)
    return [rng.integers(1, num_items + 1, length).tolist() for length in lengths]


def cyclic_sessions(count: int, seed: int, *, cycle: int = 20) -> list[list[int]]:
    """Each item is followed by the next one, the last by the first: what follows is known."""
    random = np.random.default_rng(seed)
    starts, lengths = random.integers(cycle, size=count), random.integers(2, 9, size=count)
    return [
        [int(start + place) % cycle + 1 for place in range(length)]
        for start, length in zip(starts, lengths, strict=True)
    ]


def write_dataset(
    data_dir: Path,
    *,
    name: str = "tiny",
    train: Sequence[Sequence[int]] = ((1, 2),),
    val: Sequence[Sequence[int]] = (),
    test: Sequence[Sequence[int]] = (),
    item_ids: np.ndarray | None = None,
    num_items: int | None = None,
    protocol: str = "every-step",
    lost_predictions: int = 0,
    **info: Any,
) -> Dataset:
    """Write DATA_DIR/NAME as `tron prepare` would; original ids default to 101, 102, ..."""
    if item_ids is None:
        largest = max(item for split in (train, val, test) for row in split for item in row)
        item_ids = np.arange(101, 101 + (num_items or largest))
    with DatasetWriter(data_dir / name, force=True) as writer:
        writer.write_items(item_ids)
        writer.write_split("train", [pack_sessions(train)])
        writer.write_split("val", [pack_sessions(val)])
        writer.write_split("test", [pack_sessions(test)], lost_predictions=lost_predictions)
        return writer.finish(name=name, protocol=protocol, **info)


def tiny_settings(**changes: Any) -> dict[str, Any]:
    """Settings of a model that trains in milliseconds."""
    return {
        "dataset_name": "tiny",
        "sequence_length": 6,
        "embedding_dim": 8,
        "num_blocks": 1,
        "num_uniform_negatives": 16,
        "num_batch_negatives": 4,
        "topk_sampling_k": 8,
        "train_batch_size": 8,
        "max_epochs": 2,
        "lr": 1e-2,
        "val_metric": "R@5",
        "metrics": ("R@5", "RR@5"),
        **changes,
    }
