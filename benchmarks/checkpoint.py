"""Saving and loading a checkpoint with its optimizer, compared with torch.save and torch.load.

    python -m benchmarks.checkpoint [--items 50000 1855603] [--output FILE.json]

Both sides write aside, flush to the disk and rename; both copy what they load into a model and an
optimizer. What is compared is the writing and reading itself: a disk is slower on fresh blocks.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Work, figure, in_turns, parser, report
from benchmarks.training_step import settings
from tron_cli.checkpoint import load_checkpoint, save_checkpoint
from tron_cli.models.base import build_model
from tron_cli.training.optim import optimizer_of

ITEMS = (50_000, 1_855_603)


def measure(num_items: int, repeats: int) -> list[dict[str, Any]]:
    config = settings()
    model = build_model(config, num_items)
    optimizer = optimizer_of(config, model)
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
                training={"optimizer": optimizer.state_dict(), "scaler": {}, "progress": {}},
            )

        def load() -> None:
            checkpoint = load_checkpoint(ours)
            model.load_state_dict(checkpoint.weights)
            optimizer.load_state_dict(checkpoint.training["optimizer"])

        def bare_save() -> None:
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            aside = bare.with_suffix(".partial")
            with aside.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(bare)

        def bare_load() -> None:
            content = torch.load(bare, weights_only=True)
            model.load_state_dict(content["model"])
            optimizer.load_state_dict(content["optimizer"])

        turns = [()] * (repeats + 1)
        saved = in_turns({"tron": save, "reference": bare_save}, turns)
        loaded = in_turns({"tron": load, "reference": bare_load}, turns)
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
    options.add_argument("--repeats", type=int, default=2)
    arguments = options.parse_args(words)
    figures = []
    for num_items in arguments.items:
        figures += measure(num_items, arguments.repeats)
    report(figures, arguments.output)


if __name__ == "__main__":
    main()
