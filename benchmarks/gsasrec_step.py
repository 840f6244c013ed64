"""Training step of gSASRec's MovieLens-1M setting compared with a plain one, in turns.

    python -m benchmarks.gsasrec_step [--items 3416] [--steps 4] [--output FILE.json]

128 histories of up to 200 items, two layers of width 128, 256 negatives an event, separate input
and output tables. Both sides are binary cross-entropies of the positive and 256 negatives; the
plain side adds gBCE's transformation of the positive's logit, one value an event.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.generated import LENGTHS, fill, generate_sessions
from benchmarks.measure import figure, in_turns, parser, report
from benchmarks.ours import training_step
from benchmarks.reference import PlainGSASRec
from benchmarks.work import step_work
from tron_cli.config import ExperimentConfig

ML1M_ITEMS = 3416


def settings(**changes: Any) -> ExperimentConfig:
    """Return the settings of gSASRec's config_ml1m."""
    values: dict[str, Any] = {
        "dataset_name": "generated",
        "optimizer": "adam",
        "sequence_length": 200,
        "embedding_dim": 128,
        "num_blocks": 2,
        "dropout_rate": 0.5,
        "reuse_item_embeddings": False,
        "loss": "gbce",
        "num_uniform_negatives": 256,
        "num_batch_negatives": 0,
        "sampling_style": "eventwise",
        "reject_in_batch_items": False,
        "topk_sampling": False,
        "mask_collisions": False,
        "train_batch_size": 128,
        "lr": 1e-3,
        "precision": "float32",
    }
    return ExperimentConfig(**{**values, **changes})


def measure(config: ExperimentConfig, num_items: int, steps: int) -> dict[str, Any]:
    sessions = generate_sessions(LENGTHS["MovieLens-1M"], num_items)
    reference = PlainGSASRec(
        num_items,
        dim=config.embedding_dim,
        length=config.sequence_length,
        layers=config.num_blocks,
        dropout=config.dropout_rate,
        negatives=config.num_uniform_negatives,
    )
    sides = {"tron": training_step(config, num_items), "reference": reference.step}
    random = np.random.default_rng(1)
    batches = [
        (sessions, random.integers(len(sessions), size=config.train_batch_size))
        for _ in range(steps + 1)
    ]
    seconds = in_turns(sides, batches, times={"tron": 3})
    return figure(
        f"gSASRec's MovieLens-1M step, {num_items:,} items, float32",
        seconds["tron"],
        seconds["reference"],
        work=step_work(config, sessions, batches[1][1], num_items),
        ceiling="fp32_gflop_per_s",
        items=num_items,
        filled=fill(sessions, config.sequence_length),
    )


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--items", type=int, default=ML1M_ITEMS)
    options.add_argument("--steps", type=int, default=4)
    arguments = options.parse_args(words)
    torch.manual_seed(0)
    report([measure(settings(), arguments.items, arguments.steps)], arguments.output)


if __name__ == "__main__":
    main()
