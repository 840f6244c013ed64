"""Peak memory and seconds of each command on a large catalogue.

    python -m benchmarks.memory [--items 1855603] [--sessions 100000]
        [--output FILE.json] [-- key=value ...]

A dataset with OTTO's lengths is generated, TRON trained for one step on it, and the other commands
use that checkpoint. Peak memory is the resident set: memory of its own and mapped files as far as
they were read. Each command is a process of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import ROOT, circumstances
from benchmarks.measure import parser
from benchmarks.serving import served
from benchmarks.startup import ITEMS, write_dataset
from tron_cli.text_table import format_table

HELD_OUT = 100  # sessions of validation and of test
_ASKED = 2_000  # sessions
_SIMILAR = 1_000  # items
FORMATS = ("onnx", "torch", "safetensors")


def measured(words: list[str]) -> tuple[dict[str, float], str]:
    """Run a tron command; return its peak memory and seconds, and what it printed."""
    clock = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "tron_cli", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, spent = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"tron {' '.join(words)} ended with {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    seconds = time.perf_counter() - clock
    return {"peak_gb": spent.ru_maxrss * unit / 1e9, "seconds": seconds}, printed


def measure(num_items: int, sessions: int, work: Path, settings: list[str]) -> list[dict[str, Any]]:
    """Measure each command in turn."""
    # In a process of its own: its memory would count in the peaks of the processes that follow.
    making = multiprocessing.get_context("spawn").Process(
        target=write_dataset, args=(work, sessions, num_items, HELD_OUT)
    )
    making.start()
    making.join()
    asked = work / "asked.jsonl"
    random = np.random.default_rng(0)
    asked.write_text(
        "".join(
            json.dumps({"items": random.integers(0, num_items, 10).tolist()}) + "\n"
            for _ in range(_ASKED)
        )
    )
    data = ["--data-dir", str(work)]
    train = ["train", "--config", "config_otto", "dataset_name=generated", "max_epochs=1",
             "max_batches_per_epoch=1", *settings, *data, "--output-dir", str(work),
             "--json"]  # fmt: skip
    figures: list[dict[str, Any]] = []

    def note(what: str, words: list[str]) -> str:
        found, printed = measured(words)
        figures.append({"what": what, **found})
        print(table(figures[-1:]), flush=True)
        return printed

    trained = note("train, one step", [*train, "--name", "first"])
    checkpoint = json.loads(trained)["checkpoint"]
    note("train --init-from, one step", [*train, "--name", "second", "--init-from", checkpoint])
    note(f"evaluate, {HELD_OUT} sessions", ["evaluate", checkpoint, *data])
    note(
        f"evaluate --run --cutoff 20, {HELD_OUT} sessions",
        ["evaluate", checkpoint, *data, "--run", str(work / "a.run"), "--cutoff", "20"],
    )
    note(f"compare, {HELD_OUT} sessions", ["compare", checkpoint, str(work / "second"), *data])
    note("recommend, one history", ["recommend", checkpoint, "--history", "1 2 3"])
    note(
        f"recommend, {_ASKED:,} sessions",
        ["recommend", checkpoint, "--input", str(asked), "--output", str(work / "lists.jsonl")],
    )
    note("similar, one item", ["similar", checkpoint, "5"])
    note(
        f"similar, {_SIMILAR:,} items",
        ["similar", checkpoint, *map(str, range(_SIMILAR)), "--output", str(work / "near.csv")],
    )
    for kind in FORMATS:
        note(
            f"export --format {kind}",
            ["export", checkpoint, "--format", kind, "--output", str(work / kind)],
        )
    with served([sys.executable, "-m", "tron_cli", "serve", checkpoint, "--port", "0"]) as server:
        peak = server.memory_mb()["peak_rss_mb"] * 2**20 / 1e9
        figures.append({"what": "serve, start", "peak_gb": peak, "seconds": server.start_s})
    return figures


def table(figures: list[dict[str, Any]]) -> str:
    rows = [
        [figure["what"], f"{figure['peak_gb']:.2f}", f"{figure['seconds']:.1f}"]
        for figure in figures
    ]
    return format_table(["tron", "peak GB", "s"], rows)


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--items", type=int, default=ITEMS)
    options.add_argument("--sessions", type=int, default=100_000, help="to train on")
    options.add_argument("settings", nargs="*", help="key=value overrides of config_otto")
    arguments = options.parse_args(words)
    with tempfile.TemporaryDirectory() as work:
        figures = measure(arguments.items, arguments.sessions, Path(work), arguments.settings)
    print("\n" + table(figures))
    if arguments.output:
        shown = f"--items {arguments.items} --sessions {arguments.sessions}"
        content = {
            "command": " ".join(["python -m benchmarks.memory", shown, *arguments.settings]),
            **circumstances(),
            "figures": figures,
        }
        arguments.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
