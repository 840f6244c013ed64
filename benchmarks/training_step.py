"""The TRON XL training step beside a plain one in the originals' manner, in turns.

    python -m benchmarks.training_step [--items 50000] [--steps 10] [--output FILE.json]

The plain step pads every session to 50 events, scores all negatives of all padded places with
gradients, takes the top-k of that matrix, and applies dense Adam through dense gradients.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tron_cli.batches import training_batch
from tron_cli.config import ExperimentConfig
from tron_cli.dataset import Sessions
from tron_cli.models import build_model
from tron_cli.optim import build_optimizer
from tron_cli.report import format_table
from tron_cli.train import training_loss

# Mean session lengths of the data sets (the training windows of 50 events).
MEAN_LENGTHS = {"OTTO": 11.0, "Yoochoose": 4.0, "Diginetica": 4.9}


def generate(num_items: int, mean_length: float, num_sessions: int = 4096) -> Sessions:
    """Sessions of geometric length from 2 on, with items drawn by a Zipf-like law."""
    random = np.random.default_rng(0)
    lengths = 1 + random.geometric(1 / (mean_length - 1), num_sessions)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    share = 1 / np.arange(1, num_items + 1) ** 0.8
    items = random.choice(num_items, size=offsets[-1], p=share / share.sum()) + 1
    return Sessions(items.astype(np.int32), offsets)


class PlainStep(nn.Module):
    """TRON's arithmetic on padded batches, with nothing spared."""

    def __init__(self, config: ExperimentConfig, num_items: int) -> None:
        super().__init__()
        self.config = config
        self.num_items = num_items
        dim, length = config.embedding_dim, config.sequence_length
        self.items = nn.Embedding(num_items + 1, dim, padding_idx=0)
        self.positions = nn.Embedding(length, dim)
        layer = nn.TransformerEncoderLayer(
            dim, 1, dim, config.dropout_rate, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, config.num_blocks, nn.LayerNorm(dim), enable_nested_tensor=False
        )
        self.dropout = nn.Dropout(config.dropout_rate)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=config.lr)

    def step(self, sessions: Sessions, chosen: np.ndarray) -> None:
        config, length = self.config, self.config.sequence_length
        rows = [sessions[session][-(length + 1) :].astype(np.int64) for session in chosen]
        inputs_BL = np.zeros((len(rows), length), np.int64)
        targets_BL = np.zeros((len(rows), length), np.int64)
        for row, items in enumerate(rows):
            inputs_BL[row, length - len(items) + 1 :] = items[:-1]
            targets_BL[row, length - len(items) + 1 :] = items[1:]
        inputs, targets = torch.from_numpy(inputs_BL), torch.from_numpy(targets_BL)
        mask_BL = inputs > 0
        uniform_K = torch.randint(1, self.num_items + 1, (config.num_uniform_negatives,))
        occurrences = inputs[mask_BL]
        in_batch_BM = torch.stack(
            [
                occurrences[torch.randperm(len(occurrences))[: config.num_batch_negatives]]
                for _ in rows
            ]
        )
        future_LL = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
        blocked_BLL = (future_LL | ~mask_BL[:, None]) & ~torch.eye(length, dtype=torch.bool)
        hidden_BLD = self.items(inputs) * config.embedding_dim**0.5 + self.positions.weight
        hidden_BLD = self.encoder(self.dropout(hidden_BLD), blocked_BLL)
        positive_BL1 = (hidden_BLD * self.items(targets)).sum(-1, keepdim=True)
        negative_BLK = torch.cat(
            [
                hidden_BLD @ self.items(uniform_K).T,
                hidden_BLD @ self.items(in_batch_BM).transpose(1, 2),
            ],
            dim=-1,
        )
        kept_BLk = negative_BLK.topk(config.topk_sampling_k, dim=-1).values
        logits = torch.cat([positive_BL1, kept_BLk], dim=-1).flatten(0, 1)
        target = torch.zeros(len(logits), dtype=torch.int64)
        loss_N = F.cross_entropy(logits, target, reduction="none") * mask_BL.flatten()
        self.optimizer.zero_grad()
        (loss_N.sum() / mask_BL.sum()).backward()
        self.optimizer.step()


def our_step(config: ExperimentConfig, num_items: int) -> Callable[[Sessions, np.ndarray], None]:
    """The step of `tron train`."""
    model = build_model(config, num_items)
    optimizer = build_optimizer(config.optimizer, model.parameters(), config.lr)

    def step(sessions: Sessions, chosen: np.ndarray) -> None:
        batch = training_batch(sessions, chosen, config.sequence_length)
        loss = training_loss(model, batch, config, num_items)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def measure(num_items: int, steps: int) -> list[dict[str, object]]:
    """Median seconds of both steps, taken in turns on the same sessions."""
    config = ExperimentConfig(dataset_name="generated")
    results: list[dict[str, object]] = []
    for name, mean_length in MEAN_LENGTHS.items():
        sessions = generate(num_items, mean_length)
        sides = {"tron": our_step(config, num_items), "plain": PlainStep(config, num_items).step}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        random = np.random.default_rng(1)
        for _ in range(steps + 1):
            chosen = random.integers(len(sessions), size=config.train_batch_size)
            for side, step in sides.items():
                clock = time.perf_counter()
                step(sessions, chosen)
                seconds[side].append(time.perf_counter() - clock)
        tron, plain = (float(np.median(seconds[side][1:])) for side in ("tron", "plain"))
        results.append(
            {"lengths": name, "items": num_items, "tron_s": tron, "plain_s": plain,
             "ratio": plain / tron, "threads": torch.get_num_threads()}
        )  # fmt: skip
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    results = measure(arguments.items, arguments.steps)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    rows = [
        [str(r["lengths"]), f"{r['items']:,}", f"{r['tron_s']:.3f}", f"{r['plain_s']:.3f}",
         f"{r['ratio']:.1f}x"]
        for r in results
    ]  # fmt: skip
    print(format_table(["session lengths", "items", "tron, s", "plain, s", "ratio"], rows))


if __name__ == "__main__":
    main()
