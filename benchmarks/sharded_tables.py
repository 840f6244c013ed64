"""Peak memory per process, and bytes sent per step, of a training that divides its item tables.

    python -m benchmarks.sharded_tables WORK --output FILE.json [--items 100000 1855603]
        [--processes 1 2 4] [--widths 64 200]

Some steps of TRON on generated sessions of OTTO's lengths, with one save. Processes run on this
machine, are joined by gloo and have one thread each. Peaks are those of the process with the
largest: of memory of its own ("own"), which decides if a training fits, and of the resident set,
which counts mapped files too, such as that in which the first process collects the best checkpoint.
"Sent" is what a process hands to torch.distributed in a step, to itself included.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, circumstances, resident_bytes
from benchmarks.measure import parser
from benchmarks.startup import ITEMS, write_dataset
from tron_cli.text_table import format_table

_STEPS = 4
_INSIDE = "--inside"  # the rest of the command line: folder of the figures, words of tron


def measured(work: Path, items: int, width: int, count: int, sharding: str) -> Any:
    """Train in `count` processes; return the largest figures of any."""
    folder, runs = work / "figures", work / "runs"
    for each in (folder, runs):
        shutil.rmtree(each, ignore_errors=True)
        each.mkdir()
    words = [
        "train", "--config", "config_otto", "dataset_name=generated", "optimizer=row_adam",
        f"embedding_dim={width}", "max_epochs=1", f"max_batches_per_epoch={_STEPS}",
        f"table_sharding={sharding}", "--data-dir", str(work / str(items)),
        "--output-dir", str(runs), "--name", "run", "--device", "cpu",
    ]  # fmt: skip
    start = [] if count == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    done = subprocess.run(
        [sys.executable, *start, "-m", "benchmarks.sharded_tables", _INSIDE, str(folder), *words],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    found = [json.loads(file.read_text()) for file in folder.iterdir()]
    return {name: max(each[name] for each in found) for name in found[0]}


def inside(folder: Path, words: list[str]) -> None:
    """Run a tron command in this process, and write its figures."""
    import torch
    import torch.distributed as dist

    import tron_cli.training.start as module
    from tron_cli.cli import main

    sent = 0
    own_peak = 0
    of_steps: list[int] = []

    def counted(name: str, number: int) -> None:
        original = getattr(dist, name)

        def send(*arguments: Any, **options: Any) -> Any:
            nonlocal sent
            values: torch.Tensor = arguments[number]
            sent += values.numel() * values.element_size()
            return original(*arguments, **options)

        setattr(dist, name, send)

    for name, number in (("all_reduce", 0), ("all_gather", 1), ("all_to_all_single", 1)):
        counted(name, number)
    original = module.accumulated_step

    def step(*arguments: Any, **options: Any) -> Any:
        before = sent
        loss = original(*arguments, **options)
        of_steps.append(sent - before)
        return loss

    module.accumulated_step = step
    ended = threading.Event()

    def watch() -> None:
        nonlocal own_peak
        while not ended.wait(0.01):
            lines = Path("/proc/self/status").read_text().splitlines()
            own = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
            own_peak = max(own_peak, own * 1024)

    watching = threading.Thread(target=watch)
    watching.start()
    sys.argv = ["tron", *words]
    try:
        main()
    finally:
        ended.set()
        watching.join()
        figures = {
            "own_gb": own_peak / 1e9,
            "resident_gb": resident_bytes(peak=True) / 1e9,
            "sent_mb": sum(of_steps) / len(of_steps) / 1e6 if of_steps else 0.0,
        }
        (folder / os.environ.get("RANK", "0")).write_text(json.dumps(figures))


def main() -> None:
    command = parser(__doc__)
    command.add_argument("work", type=Path)
    command.add_argument("--items", type=int, nargs="+", default=[100_000, ITEMS])
    command.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    command.add_argument("--widths", type=int, nargs="+", default=[64, 200])
    options = command.parse_args()
    lines = []
    for items in options.items:
        if not (options.work / str(items)).exists():
            write_dataset(options.work / str(items), 5_000, items, 50)
        for width, count in itertools.product(options.widths, options.processes):
            for sharding in ("none", "rows") if count > 1 else ("none",):
                case = {"items": items, "width": width, "processes": count, "sharding": sharding}
                lines.append({**case, **measured(options.work, *case.values())})
                print(lines[-1], file=sys.stderr)
    if options.output:
        content = {"command": " ".join(["python -m", *sys.orig_argv[2:]]), **circumstances()}
        content["figures"] = lines
        options.output.write_text(json.dumps(content, indent=2) + "\n")
    rows = [
        [f"{value:,.3g}" if isinstance(value, float) else str(value) for value in line.values()]
        for line in lines
    ]
    header = ["items", "width", "processes", "table_sharding", "own GB", "resident GB", "sent MB"]
    print(format_table(header, rows))


if __name__ == "__main__":
    if sys.argv[1:2] == [_INSIDE]:
        inside(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
