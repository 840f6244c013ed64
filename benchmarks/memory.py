"""Peak memory and seconds of each command on a large catalogue.

    python -m benchmarks.memory WORK --output FILE.json [--items 1855603] [--sessions 100000]
        [--settings key=value ...]

A dataset with OTTO's lengths is generated, TRON trained for one step on it, and the other commands
use that checkpoint. Peak memory is the resident set: memory of its own and mapped files as far as
they were read. Each command is a process of its own. WORK is a folder for all files. Where FILE
exists, only the commands that it lacks are measured.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
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


def measured(words: list[str]) -> dict[str, float]:
    """Run a tron command; return its peak memory and seconds."""
    clock = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "tron_cli", *words], cwd=ROOT, stdout=subprocess.DEVNULL
    ) as process:
        _, status, spent = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"tron {' '.join(words)} ended with {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    seconds = time.perf_counter() - clock
    return {"peak_gb": spent.ru_maxrss * unit / 1e9, "seconds": seconds}


def measure(
    num_items: int, sessions: int, work: Path, settings: list[str], output: Path
) -> list[dict[str, Any]]:
    """Measure each command in turn, and write the figures after each."""
    if not (work / "generated").exists():
        # In a process of its own: its memory would count in the peaks of the later ones.
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
             "max_batches_per_epoch=1", *settings, *data, "--output-dir", str(work)]  # fmt: skip
    figures = json.loads(output.read_text())["figures"] if output.exists() else []
    shown = f"python -m benchmarks.memory WORK --items {num_items} --sessions {sessions}"
    content = {"command": " ".join([shown, *settings]), **circumstances()}

    def add(what: str, found: dict[str, float]) -> None:
        figures.append({"what": what, **found, "commit": content["commit"]})
        output.write_text(json.dumps({**content, "figures": figures}, indent=2) + "\n")
        print(table(figures[-1:]), flush=True)

    def note(what: str, words: list[str]) -> None:
        if what not in [figure["what"] for figure in figures]:
            add(what, measured(words))

    checkpoint = str(work / "first")
    note("train, one step", [*train, "--name", "first"])
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
    command = [sys.executable, "-m", "tron_cli", "serve", checkpoint, "--port", "0"]
    with served(command) as server:
        peak = server.memory_mb()["peak_rss_mb"] * 2**20 / 1e9
        add("serve, start", {"peak_gb": peak, "seconds": server.start_s})
    return figures


def table(figures: list[dict[str, Any]]) -> str:
    rows = [
        [figure["what"], f"{figure['peak_gb']:.2f}", f"{figure['seconds']:.1f}"]
        for figure in figures
    ]
    return format_table(["tron", "peak GB", "s"], rows)


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("work", type=Path)
    options.add_argument("--items", type=int, default=ITEMS)
    options.add_argument("--sessions", type=int, default=100_000, help="to train on")
    options.add_argument(
        "--settings", nargs="*", default=[], help="key=value overrides of config_otto"
    )
    arguments = options.parse_args(words)
    if arguments.output is None:
        options.error("--output is missing")
    work = arguments.work.absolute()
    found = measure(arguments.items, arguments.sessions, work, arguments.settings, arguments.output)
    print("\n" + table(found))


if __name__ == "__main__":
    main()
