"""Checkpoints to export, and the runtimes that run what is exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from safetensors import safe_open

from helpers.checkpoints import random_checkpoint
from helpers.datasets import write_dataset
from tron_cli.checkpoint import Checkpoint

NUM_ITEMS, WINDOW = 60, 5

NETWORKS: dict[str, dict[str, Any]] = {
    "tron": {},
    "padding-attended-cosine": {
        "key_padding_mask": False,
        "num_heads": 2,
        "score": "cosine",
        "normalize_inputs": True,
        "output_bias": True,
    },
    "recbole": {
        "block": "post-norm",
        "activation": "gelu",
        "positions": "start",
        "reuse_item_embeddings": False,
        "output_bias": True,
        "num_blocks": 2,
    },
    "relative-ligr": {
        "block": "ligr",
        "activation": "swiglu",
        "feed_forward_dim": 32,
        "relative_positions": True,
        "positions": "none",
        "num_heads": 2,
        "num_blocks": 2,
    },
    "gsasrec": {"model": "gsasrec", "num_heads": 2, "key_padding_mask": False},
    "bsarec": {
        "block": "bsarec",
        "activation": "gelu",
        "training_windows": "prefixes",
        "low_frequencies": 3,
        "num_heads": 2,
    },
    "relative-bert4rec": {"model": "bert4rec", "relative_positions": True, "num_heads": 2},
    "gru4rec": {"model": "gru4rec", "num_blocks": 2},
    "bert4rec": {
        "model": "bert4rec",
        "activation": "gelu",
        "prediction_head": True,
        "output_bias": True,
        "num_heads": 2,
    },
    "cosine-gru4rec": {
        "model": "gru4rec",
        "num_blocks": 2,
        "score": "cosine",
        "learn_score_scale": True,
    },
}

# histories [B, L], k, filter_rated -> items [B, k], scores [B, k]
Runtime = Callable[[np.ndarray, int, bool], tuple[np.ndarray, np.ndarray]]


def make_checkpoint(folder: Path, **changes: Any) -> Checkpoint:
    """Save a network whose positions and order matter, and many of whose items tie."""
    dataset = write_dataset(folder, train=[[1, 2, 2, NUM_ITEMS]], num_items=NUM_ITEMS)
    return random_checkpoint(
        dataset, folder / "a.pt", with_ties=True, sequence_length=WINDOW, **changes
    )


def padded(histories: list[list[int]], width: int, random: np.random.Generator) -> np.ndarray:
    """Return [B, width]: each history in order, with zeros in front, behind and between."""
    found = np.zeros((len(histories), width), dtype=np.int64)
    for row, history in enumerate(histories):
        places = np.sort(random.choice(width, len(history), replace=False))
        found[row, places] = history
    return found


def in_onnxruntime(folder: Path) -> Runtime:
    session = onnxruntime.InferenceSession(folder / "model.onnx")

    def run(histories: np.ndarray, k: int, filter_rated: bool) -> tuple[np.ndarray, np.ndarray]:
        items, scores = session.run(
            ["items", "scores"],
            {
                "histories": histories,
                "k": np.array(k),
                "filter_rated": np.array(filter_rated),
            },
        )
        return items, scores

    return run


def in_torch(folder: Path) -> Runtime:
    program = torch.export.load(folder / "model.pt2").module()

    def run(histories: np.ndarray, k: int, filter_rated: bool) -> tuple[np.ndarray, np.ndarray]:
        found = program(torch.from_numpy(histories), torch.tensor(k), torch.tensor(filter_rated))
        return found[0].numpy(), found[1].numpy()

    return run


RUNTIMES = {"onnx": in_onnxruntime, "torch": in_torch}


def read_safetensors(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
