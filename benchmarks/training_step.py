"""TRON XL training step compared with a plain one in the style of the originals, in turns.

    python -m benchmarks.training_step [--items 50000 500000 1855603] [--lengths OTTO Yoochoose ...]
        [--optimizer row_adam] [--steps 4] [--full] [--output FILE.json]

tron's side is `tron train --config config_otto`, in float32 and in bf16; the plain side is float32.
The first number of items is measured with all lengths, the others with the first of them. The peak
memory of our step at each size is measured in a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import numpy as np
import torch

from benchmarks.generated import LENGTHS, fill, generate_sessions
from benchmarks.machine import ROOT, ordinary_pages, resident_bytes
from benchmarks.measure import figure, in_turns, parser, report
from benchmarks.ours import training_step
from benchmarks.reference import PlainTron
from benchmarks.work import step_work
from tron_cli.config import ExperimentConfig, load_config

ITEMS = (50_000, 500_000, 1_855_603)
SESSION_LENGTHS = ("OTTO", "Yoochoose", "Diginetica")


def settings(**changes: Any) -> ExperimentConfig:
    """Return TRON XL's packaged settings, with the optimizer for OTTO's number of items."""
    config, _ = load_config("config_otto", ["dataset_name=generated", "optimizer=row_adam"])
    return dataclasses.replace(config, **changes)


def plain(config: ExperimentConfig, num_items: int) -> PlainTron:
    """Return the reference for these settings, in memory as the originals have it."""
    with ordinary_pages():
        return _plain(config, num_items)


def _plain(config: ExperimentConfig, num_items: int) -> PlainTron:
    return PlainTron(
        num_items,
        dim=config.embedding_dim,
        length=config.sequence_length,
        layers=config.num_blocks,
        dropout=config.dropout_rate,
        uniform=config.num_uniform_negatives,
        in_batch=config.num_batch_negatives,
        topk=config.topk_sampling_k,
        lr=config.lr,
    )


def measure(
    config: ExperimentConfig, num_items: int, lengths: str, steps: int
) -> list[dict[str, Any]]:
    """Measure float32, bf16 and the plain step, in turns on the same sessions."""
    sessions = generate_sessions(LENGTHS[lengths], num_items)
    # Made anew for every size and freed after it: three tables of the largest fit 16 GB.
    sides = {
        "float32": training_step(dataclasses.replace(config, precision="float32"), num_items),
        "bf16": training_step(dataclasses.replace(config, precision="bf16"), num_items),
        "reference": plain(config, num_items).step,
    }
    random = np.random.default_rng(1)
    batches = [
        (sessions, random.integers(len(sessions), size=config.train_batch_size))
        for _ in range(steps + 1)
    ]
    seconds = in_turns(sides, batches, times={"float32": 3, "bf16": 3})
    work = step_work(config, sessions, batches[1][1], num_items)
    return [
        figure(
            f"TRON XL step, {num_items:,} items, {lengths} lengths, {precision}",
            seconds[precision],
            seconds["reference"],
            work=work,
            ceiling=ceiling,
            items=num_items,
            lengths=lengths,
            precision=precision,
            optimizer=config.optimizer,
            filled=fill(sessions, config.sequence_length),
        )
        for precision, ceiling in (("float32", "fp32_gflop_per_s"), ("bf16", "bf16_gflop_per_s"))
    ]


def peak_memory(config: ExperimentConfig, num_items: int) -> dict[str, float]:
    """Return megabytes of steps in their own process, `above` the table and optimizer state."""
    command = [sys.executable, "-m", "benchmarks.training_step", "--peak-memory", str(num_items),
               "--optimizer", config.optimizer]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def _measure_peak_memory(config: ExperimentConfig, num_items: int) -> dict[str, float]:
    sessions = generate_sessions(LENGTHS["OTTO"], num_items)
    process = resident_bytes()
    step = training_step(config, num_items)
    random = np.random.default_rng(1)
    for _ in range(4):
        step(sessions, random.integers(len(sessions), size=config.train_batch_size))
    peak = resident_bytes(peak=True)
    # Adam has two moments a weight.
    table = 3 * (num_items + 1) * config.embedding_dim * 4
    figures = {"peak_mb": peak, "table_and_state_mb": table, "interpreter_mb": process,
               "above_mb": peak - table, "of_the_step_mb": peak - table - process}  # fmt: skip
    return {name: round(size / 1e6, 1) for name, size in figures.items()}


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--items", type=int, nargs="+", default=ITEMS)
    options.add_argument("--lengths", nargs="+", choices=LENGTHS, default=SESSION_LENGTHS)
    options.add_argument("--steps", type=int, default=4)
    options.add_argument("--optimizer", help="of tron; default: row_adam")
    options.add_argument("--full", action="store_true", help="all lengths at all sizes, 20 steps")
    options.add_argument("--peak-memory", type=int, help="only that, of this process, as JSON")
    arguments = options.parse_args(words)
    torch.manual_seed(0)
    config = settings(precision="float32")
    if arguments.optimizer:
        config = dataclasses.replace(config, optimizer=arguments.optimizer)
    if arguments.peak_memory:
        print(json.dumps(_measure_peak_memory(config, arguments.peak_memory)))
        return
    steps = 20 if arguments.full else arguments.steps
    figures = []
    for place, num_items in enumerate(arguments.items):
        for lengths in arguments.lengths if arguments.full or not place else arguments.lengths[:1]:
            figures += measure(config, num_items, lengths, steps)
    memory = {f"{items}": peak_memory(config, items) for items in arguments.items}
    alike = [line for line in figures if line["lengths"] == arguments.lengths[0]]
    growth = {
        precision: alike[place - 2]["tron_s"] / alike[place]["tron_s"]
        for place, precision in enumerate(("float32", "bf16"))
    }
    report(figures, arguments.output, growth_with_the_catalogue=growth, peak_memory=memory)
    for items, found in memory.items():
        print(
            f"peak memory at {int(items):,} items: {found['above_mb']:,.0f} MB above the table "
            f"and its moments, {found['interpreter_mb']:,.0f} of it before the model"
        )
    shown = ", ".join(f"{precision} {ratio:.2f}x" for precision, ratio in growth.items())
    print(f"growth from the first number of items to the last: {shown}")


if __name__ == "__main__":
    main()
