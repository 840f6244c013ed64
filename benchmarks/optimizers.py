"""adam compared with row_adam, in turns, for growing catalogues and growing numbers of rows.

    python -m benchmarks.optimizers [--items 10000 20000 40000 80000 160000] [--steps 10]

rows: events, last targets and negatives that a step looks up; auto: what these resolve to.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from benchmarks.generated import LENGTHS, generate_sessions
from benchmarks.measure import in_turns, parser
from benchmarks.ours import training_step
from benchmarks.training_step import settings
from tron_cli.data.batches import training_batch
from tron_cli.text_table import format_table
from tron_cli.training.optim import faster_adam

ITEMS = (10_000, 20_000, 40_000, 80_000, 160_000)
_ONE = {"num_batch_negatives": 0, "topk_sampling": False, "sampling_style": "eventwise"}
METHODS: dict[str, dict[str, Any]] = {
    "TRON XL": {},
    "TRON, 2,048 negatives": {"num_uniform_negatives": 2048},
    "SASRec, 1 negative": {"loss": "bce", "num_uniform_negatives": 1, **_ONE},
    "16 eventwise negatives": {"loss": "bce", "num_uniform_negatives": 16, **_ONE},
}


def measure(method: str, lengths: str, num_items: int, steps: int) -> list[Any]:
    """Return a line: the rows that a step looks up, and the fewest milliseconds with each."""
    config = settings(precision="float32", reject_in_batch_items=False, **METHODS[method])
    sessions = generate_sessions(LENGTHS[lengths], num_items)
    random = np.random.default_rng(1)
    works = [
        (sessions, random.integers(len(sessions), size=config.train_batch_size))
        for _ in range(steps + 2)
    ]
    events = len(training_batch(*works[0], config.sequence_length).inputs_N)
    sets = 1 if config.sampling_style == "batchwise" else events
    rows = events + config.train_batch_size + config.num_uniform_negatives * sets
    seconds = in_turns(
        {
            name: training_step(dataclasses.replace(config, optimizer=name), num_items)
            for name in ("adam", "row_adam")
        },
        works,
        times={"adam": 2, "row_adam": 2},
        warm_up=2,
    )
    adam, row_adam = (1e3 * min(seconds[name]) for name in ("adam", "row_adam"))
    return [
        method, lengths, f"{num_items:,}", f"{rows:,}",
        faster_adam(num_items, rows, topk=config.topk_sampling),
        f"{adam:.1f}", f"{row_adam:.1f}", f"{adam / row_adam:.2f}",
    ]  # fmt: skip


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--items", type=int, nargs="+", default=ITEMS)
    options.add_argument("--lengths", nargs="+", choices=LENGTHS, default=["OTTO", "Yoochoose"])
    options.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    options.add_argument("--steps", type=int, default=10)
    arguments = options.parse_args(words)
    rows = [
        measure(method, lengths, num_items, arguments.steps)
        for method in arguments.methods
        for lengths in arguments.lengths
        for num_items in arguments.items
    ]
    head = ["method", "lengths", "items", "rows", "auto", "adam ms", "row_adam ms", "ratio"]
    print(format_table(head, rows))


if __name__ == "__main__":
    main()
