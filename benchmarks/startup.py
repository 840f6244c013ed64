"""Time to the first result: `tron train` to the end of its first step, `tron --help`.

    python -m benchmarks.startup [--sessions 12900000] [--items 1855603] [--output FILE.json]

A dataset of OTTO's size is generated straight into the prepared format. The reference is what comes
before the first step in the originals: the place of every line of the training file is noted by
reading it (extrapolated from 100,000 sessions), and the item table is made, torch's way and then
once more by Xavier's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.generated import LENGTHS, generate_sessions
from benchmarks.machine import ROOT
from benchmarks.measure import figure, parser, report
from benchmarks.prepare_otto import generate as generate_lines
from tron_cli.data.dataset import DatasetWriter, Sessions

SESSIONS, ITEMS = 12_900_000, 1_855_603
VALIDATION_SESSIONS = 1_000
_BLOCK = 500_000
_LINES = 100_000
_TIMEOUT = 300.0  # seconds


def write_dataset(data_dir: Path, sessions: int, num_items: int, held_out: int) -> None:
    """Write DATA_DIR/generated: sessions of OTTO's lengths, without times.

    held_out: sessions of validation and of test.
    """

    def chunks(count: int, seed: int) -> Iterator[Sessions]:
        blocks = range(0, count, _BLOCK)
        for low in tqdm(blocks, desc="generate sessions", disable=None):
            size = min(_BLOCK, count - low)
            yield generate_sessions(LENGTHS["OTTO"], num_items, size, seed=seed + low)

    with DatasetWriter(data_dir / "generated") as writer:
        writer.write_items(np.arange(num_items))
        writer.write_split("train", chunks(sessions, 0))
        for place, split in enumerate(("val", "test")):
            writer.write_split(split, chunks(held_out, sessions + place))
        writer.finish(name="generated", protocol="every-step")


def first_step(data_dir: Path, output_dir: Path, *settings: str) -> float:
    """Return seconds from the start of `tron train` until its first step is logged; then end it."""
    words = ["train", "--config", "config_otto", "dataset_name=generated", "max_epochs=1",
             "max_batches_per_epoch=1", *settings, "--data-dir", str(data_dir),
             "--output-dir", str(output_dir), "--name", "run"]  # fmt: skip
    log = output_dir / "run" / "metrics.jsonl"
    clock = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "tron_cli", *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not (log.exists() and log.stat().st_size):
            if process.poll() not in (None, 0) or time.perf_counter() - clock > _TIMEOUT:
                process.kill()
                raise RuntimeError(f"tron {' '.join(words)} failed: {process.communicate()[1]}")
            time.sleep(0.005)
        seconds = time.perf_counter() - clock
        process.kill()
    return seconds


def help_text() -> float:
    """Return the seconds of `tron --help`."""
    clock = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "tron_cli", "--help"], cwd=ROOT, check=True, capture_output=True
    )
    return time.perf_counter() - clock


def as_the_originals_start(lines: Path, sessions: int, num_items: int) -> float:
    """Return the seconds of the reference; reading `lines` is extrapolated to `sessions`."""
    clock = time.perf_counter()
    offsets = []
    offset = 0
    with lines.open() as file:
        for number, line in enumerate(file):
            offsets.append((len(line), number, offset))
            offset += len(line)
    _ = [place for _, _, place in offsets]
    reading = (time.perf_counter() - clock) * sessions / len(offsets)
    clock = time.perf_counter()
    table = torch.nn.Embedding(num_items + 1, 200, padding_idx=0)
    torch.nn.init.xavier_uniform_(table.weight)
    return reading + time.perf_counter() - clock


def measure(
    sessions: int, num_items: int, repeats: int, settings: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    starts, references = [], []
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "datasets"
        write_dataset(data_dir, sessions, num_items, VALIDATION_SESSIONS)
        lines = Path(folder) / "train.jsonl"
        generate_lines(lines, min(sessions, _LINES), 0)
        for repeat in range(repeats):
            starts.append(first_step(data_dir, Path(folder) / f"runs{repeat}", *settings))
            references.append(as_the_originals_start(lines, sessions, num_items))
    return [
        figure(
            f"tron train to its first step, {sessions:,} sessions, {num_items:,} items",
            starts,
            references,
            items=num_items,
            sessions=sessions,
        ),
        figure("tron --help", [help_text() for _ in range(repeats + 1)][1:]),
    ]


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--sessions", type=int, default=SESSIONS)
    options.add_argument("--items", type=int, default=ITEMS)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("settings", nargs="*", help="key=value words for `tron train`")
    arguments = options.parse_args(words)
    figures = measure(
        arguments.sessions, arguments.items, arguments.repeats, tuple(arguments.settings)
    )
    report(figures, arguments.output, load=os.getloadavg()[0])


if __name__ == "__main__":
    main()
