"""Saving and loading a checkpoint with its optimizer, beside bare torch.save and torch.load.

    python -m benchmarks.checkpoint [--items 50000 1855603] [--output FILE.json]

The bare side writes the same weights and moments; it neither flushes them to the disk nor renames,
and does not check the weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Work, figure, in_turns, parser, report
from benchmarks.training_step import settings
from tron_cli.checkpoint import load_checkpoint, save_checkpoint
from tron_cli.models import build_model
from tron_cli.optim import build_optimizer

ITEMS = (50_000, 1_855_603)


def measure(num_items: int, repeats: int) -> list[dict[str, Any]]:
    config = settings()
    model = build_model(config, num_items)
    optimizer = build_optimizer(config.optimizer, model.parameters(), config.lr)
    identity = {"name": "generated", "protocol": "every-step", "num_items": num_items}
    item_ids = torch.arange(num_items)
    with tempfile.TemporaryDirectory() as folder:
        ours, bare = Path(folder) / "last.pt", Path(folder) / "bare.pt"

        def save() -> None:
            save_checkpoint(
                ours,
                config=config,
                model=model,
                step=1,
                epoch=0,
                metrics={},
                dataset=identity,
                item_ids=item_ids,
                training={"optimizer": optimizer.state_dict()},
            )

        def bare_save() -> None:
            torch.save({"w": model.state_dict(), "o": optimizer.state_dict(), "i": item_ids}, bare)

        saved = in_turns({"tron": save, "reference": bare_save}, [()] * (repeats + 1))
        loaded = in_turns(
            {
                "tron": lambda: load_checkpoint(ours),
                "reference": lambda: torch.load(bare, weights_only=True),
            },
            [()] * (repeats + 1),
        )
        size = ours.stat().st_size / 1e9
    return [
        figure(
            f"{what} a checkpoint, {num_items:,} items, {size:.2f} GB",
            seconds["tron"],
            seconds["reference"],
            work=Work(gb=size),
            items=num_items,
        )
        for what, seconds in (("save", saved), ("load", loaded))
    ]


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--items", type=int, nargs="+", default=ITEMS)
    options.add_argument("--repeats", type=int, default=3)
    arguments = options.parse_args(words)
    figures = []
    for num_items in arguments.items:
        figures += measure(num_items, arguments.repeats)
    report(figures, arguments.output)


if __name__ == "__main__":
    main()
