"""Exact evaluation compared with top-k evaluation one time step at a time, in turns.

    python -m benchmarks.evaluation [--items 3416 50000 500000 1855603] [--output FILE.json]

tron's side is what `tron evaluate` calls: the rank of every event among all items, each event from
its own history (the default), and in one pass over a session as the reference has it. The reference
finds the top 20 of each padded time step, and the loss, as TRON's validation does; above 50,000
items only of some time steps, from which all are extrapolated, for each costs the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from benchmarks.generated import LENGTHS, generate_sessions
from benchmarks.measure import Work, figure, in_turns, parser, report
from benchmarks.training_step import plain, settings
from benchmarks.work import network_flop
from tron_cli.config import ExperimentConfig
from tron_cli.data.dataset import Sessions
from tron_cli.evaluation.predict import predict
from tron_cli.models.base import build_model

ITEMS = (3_416, 50_000, 500_000, 1_855_603)


def measure(
    config: ExperimentConfig, num_items: int, sessions_at_once: int, repeats: int
) -> list[dict[str, Any]]:
    """Measure both: tron ranks `sessions_at_once` sessions per call, the reference a batch."""
    sessions = generate_sessions(LENGTHS["OTTO"], num_items, sessions_at_once)
    model = build_model(config, num_items).eval()
    reference = plain(config, num_items)
    size = config.train_batch_size
    batch = reference.collate(sessions, np.arange(size))
    length = config.sequence_length
    timed_steps = max(2, length * 50_000 // max(50_000, num_items))
    sides = {
        "own": lambda: predict(model, sessions, protocol="every-step",
                               batch_size=config.eval_batch_size),
        "one_pass": lambda: predict(model, sessions, protocol="every-step", one_pass=True,
                                    batch_size=config.eval_batch_size),
        "reference": lambda: reference.validate(batch, length - timed_steps),
    }  # fmt: skip
    seconds = in_turns(sides, [()] * (repeats + 1))
    inputs = np.minimum(sessions.lengths - 1, config.sequence_length)
    events = int(inputs.sum())
    # As much of the reference's time as that many events take it.
    share = events / int(inputs[:size].sum()) * length / timed_steps
    scaled = [taken * share for taken in seconds["reference"]]
    scores = 2 * events * num_items * config.embedding_dim
    rows = {"own": _prefixes(sessions, config.sequence_length), "one_pass": inputs}
    return [
        figure(
            f"evaluation, {num_items:,} items, {name}",
            seconds[side],
            scaled,
            work=Work(
                gflop=(scores + network_flop(config, rows[side].astype(np.float64))) / 1e9,
                events=events,
            ),
            ceiling="fp32_gflop_per_s",
            items=num_items,
            histories=name,
        )
        for side, name in (("own", "own histories"), ("one_pass", "one pass"))
    ]


def _prefixes(sessions: Sessions, window: int) -> np.ndarray:
    """Return the lengths of the histories of the last `window` events of each session."""
    lengths = [
        np.minimum(np.arange(max(1, length - window), length), window)
        for length in sessions.lengths
    ]
    return np.concatenate(lengths)


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--items", type=int, nargs="+", default=ITEMS)
    options.add_argument("--sessions", type=int, default=512, help="a call, at most 50k items")
    options.add_argument("--repeats", type=int, default=3)
    arguments = options.parse_args(words)
    torch.manual_seed(0)
    config = dataclasses.replace(settings(), precision="float32")
    figures = []
    for num_items in arguments.items:
        # Fewer events of larger catalogues, so that all sizes take about as long.
        sessions = max(
            config.train_batch_size, arguments.sessions * 50_000 // max(50_000, num_items)
        )
        figures += measure(config, num_items, sessions, arguments.repeats)
    report(figures, arguments.output)


if __name__ == "__main__":
    main()
