"""Cross-entropy over the whole catalogue, forward and backward, compared with the full matrix.

    python -m benchmarks.cross_entropy [--items 17376 43097 200000] [--repeats 5] [--output FILE]

1,000 events of width 200, as a TRON batch of short sessions has, float32. The reference is the
product with the whole table and torch's cross_entropy. Beside it, where torch has it (2.13),
torch.nn.functional.linear_cross_entropy with its own choice of parts, and SCE, which approximates.
Peak memory is that of a process of its own, beyond the events, the table and the table's gradient.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.machine import ROOT, resident_bytes
from benchmarks.measure import REFERENCE, Work, figure, in_turns, parser, report
from tron_cli.losses.cross_entropy import ce
from tron_cli.losses.scalable_cross_entropy import sce

# Yoochoose 1/64's and Diginetica's catalogues, and a larger one.
ITEMS = (17_376, 43_097, 200_000)
EVENTS, DIM = 1000, 200
# The paper's usual sizes of a bucket's items.
BUCKET_ITEMS = (256, 1024)

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def losses() -> dict[str, Loss]:
    """Return functions (hidden_ND, table_VD, targets_N) -> mean loss, by name."""

    def ours(hidden: torch.Tensor, table: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return ce(hidden, table, targets, num_items=len(table) - 1).mean()

    def all_logits(
        hidden: torch.Tensor, table: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        return F.cross_entropy(hidden @ table[1:].T, targets - 1)

    def linear(hidden: torch.Tensor, table: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, table[1:], targets - 1, options=options)

    def approximate(bucket_items: int) -> Loss:
        return lambda hidden, table, targets: sce(
            hidden, table, targets, num_items=len(table) - 1, sce_buckets=0,
            sce_bucket_positions=0, sce_bucket_items=bucket_items, sce_mix=False,
        ).mean()  # fmt: skip

    named: dict[str, Loss] = {"ce": ours, REFERENCE: all_logits}
    if hasattr(F, "linear_cross_entropy"):
        named["linear_cross_entropy"] = linear
    return named | {f"sce {items}": approximate(items) for items in BUCKET_ITEMS}


def inputs(num_items: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden_ND = torch.randn(EVENTS, DIM, requires_grad=True)
    table_VD = torch.empty(num_items + 1, DIM).normal_(0, 0.1).requires_grad_()
    return hidden_ND, table_VD, torch.randint(1, num_items + 1, (EVENTS,))


def forward_and_backward(loss: Loss, *tensors: torch.Tensor) -> None:
    for tensor in tensors:
        tensor.grad = None
    loss(*tensors).backward()


def measure(num_items: int, repeats: int) -> list[dict[str, Any]]:
    tensors = inputs(num_items)
    sides = {
        name: lambda loss=loss: forward_and_backward(loss, *tensors)
        for name, loss in losses().items()
    }
    seconds = in_turns(sides, [()] * (repeats + 1))
    memory = {name: peak_memory(name, num_items) for name in sides}
    return [
        figure(
            f"{name}, {num_items:,} items, peak {memory[name]:,.0f} MB",
            seconds[name],
            seconds[REFERENCE],
            # The logits, again, and two gradients.
            work=Work(gflop=4 * 2 * EVENTS * num_items * DIM / 1e9) if name == "ce" else None,
            ceiling="fp32_gflop_per_s",
            items=num_items,
            peak_mb=memory[name],
            reference_peak_mb=memory[REFERENCE],
            of_all_logits=memory[name] / (EVENTS * num_items * 4 / 1e6),
        )
        for name in sides
        if name != REFERENCE
    ]


def peak_memory(name: str, num_items: int) -> float:
    """Return the megabytes of one forward and backward pass in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cross_entropy",
               "--peak-memory", name, "--items", str(num_items)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def _measure_peak_memory(name: str, num_items: int) -> float:
    loss = losses()[name]
    forward_and_backward(loss, *inputs(64))  # what libraries take once
    hidden_ND, table_VD, targets_N = inputs(num_items)
    before = resident_bytes() + table_VD.nbytes
    forward_and_backward(loss, hidden_ND, table_VD, targets_N)
    return round((resident_bytes(peak=True) - before) / 1e6, 1)


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--items", type=int, nargs="+", default=ITEMS)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--peak-memory", metavar="NAME", help="only that, of this process")
    arguments = options.parse_args(words)
    if arguments.peak_memory:
        print(json.dumps(_measure_peak_memory(arguments.peak_memory, arguments.items[0])))
        return
    figures = [line for items in arguments.items for line in measure(items, arguments.repeats)]
    report(figures, arguments.output)


if __name__ == "__main__":
    main()
