"""Peak memory and seconds of `tron prepare table` on logs of several sizes, on one thread.

    python -m benchmarks.prepare_table WORK --output FILE.json [--millions 8 16 32]
        [--items 100000] [--label now]

The logs are generated: CSV, sessions of integer ids with OTTO's lengths, spread over 30 days and
mixed, items by a Zipf-like law. Peak memory is that of the process, with Python and its libraries.
Figures of other labels and sizes in FILE stay. WORK is a folder for all files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.generated import LENGTHS, draw_items
from benchmarks.machine import ROOT, circumstances
from benchmarks.measure import parser
from tron_cli.text_table import format_table

DAYS, PIECES = 30, 32  # the log is generated in pieces of time
DAY, START = 86_400_000, 1_700_000_000_000
COLUMNS = ["--session-col", "session", "--item-col", "item", "--time-col", "time"]

# The process says its own peak (Linux): that of a child counts its parent before exec.
_PREPARED = """
from tron_cli.cli import main
try:
    main()
finally:
    with open("/proc/self/status") as file:
        print(next(line.split()[1] for line in file if line.startswith("VmHWM:")))
"""


def write_log(file: Path, events: int, num_items: int) -> None:
    """Write a log of about so many events in the order of time."""
    random = np.random.default_rng(0)
    first = 0
    with file.open("wb") as out:
        for piece in range(PIECES):
            lengths = LENGTHS["OTTO"].draw(events // PIECES // 11, random)
            count = int(lengths.sum())
            length = DAYS * DAY // PIECES
            starts = random.integers(0, length * 9 // 10, len(lengths))
            times = np.repeat(starts, lengths) + random.integers(0, length // 10, count)
            order = np.argsort(times)
            sessions = np.repeat(np.arange(first, first + len(lengths)), lengths)
            columns = {
                "session": sessions[order],
                "item": draw_items(num_items, count, random),
                "time": START + piece * length + times[order],
            }
            pl.DataFrame(columns).write_csv(out, include_header=piece == 0)
            first += len(lengths)


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("work", type=Path)
    options.add_argument("--millions", type=int, nargs="*", default=[8, 16, 32], help="of events")
    options.add_argument("--items", type=int, default=100_000)
    options.add_argument("--label", default="now", help="of the figures, such as a version")
    arguments = options.parse_args(words)
    if arguments.output is None:
        options.error("--output is missing")
    os.environ |= {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1"}
    output, work = arguments.output, arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    content = json.loads(output.read_text()) if output.exists() else {"figures": []}
    shown = f"python -m benchmarks.prepare_table WORK --items {arguments.items}"
    for millions in arguments.millions:
        log = work / f"{millions}-{arguments.items}.csv"
        if not log.exists():
            write_log(log, millions * 10**6, arguments.items)
        data = ["--name", "log", "--data-dir", str(work), "--force", "--json"]
        clock = time.perf_counter()
        command = ["prepare", "table", "--input", str(log), *COLUMNS, *data]
        done = subprocess.run(
            [sys.executable, "-c", _PREPARED, *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            check=True,
        )
        seconds = time.perf_counter() - clock
        info = json.loads((work / "log" / "dataset.json").read_text())
        here = circumstances()
        figure = {
            "label": arguments.label,
            "commit": here["commit"],
            "events": info["filters"][0]["events"],
            "sessions": info["filters"][0]["sessions"],
            "items": info["filters"][0]["items"],
            "csv_gb": log.stat().st_size / 1e9,
            "peak_gb": int(done.stdout.split()[-1]) * 1024 / 1e9,
            "seconds": seconds,
        }
        shutil.rmtree(work / "log")
        others = [
            each
            for each in content["figures"]
            if (each["label"], each["events"]) != (figure["label"], figure["events"])
        ]
        content = {"command": shown, **here, "figures": [*others, figure]}
        output.write_text(json.dumps(content, indent=2) + "\n")
    rows = [
        [each["label"], f"{each['events']:,}", f"{each['peak_gb']:.2f}", f"{each['seconds']:.0f}"]
        for each in content["figures"]
    ]
    print(format_table(["", "events", "peak GB", "s"], rows))


if __name__ == "__main__":
    main()
