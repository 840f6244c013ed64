"""`tron train` alone and two at once on one machine, under several policies of waiting.

    python -m benchmarks.pairs [--policies default GOMP_SPINCOUNT=infinity ...] [--seconds 30]
        [--items 50000] [--repeats 1] [--output FILE.json] [key=value ...]

A policy is environment variables, joined by commas; `default` sets none, so that tron chooses.
torch's threads wait for each other at the end of every operation: by spinning, which is quick while
each has a core, or by sleeping, which leaves the core to others.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generated import LENGTHS, generate_sessions
from benchmarks.machine import ROOT, circumstances
from benchmarks.measure import parser
from tron_cli.data.dataset import DatasetWriter, Sessions
from tron_cli.text_table import format_table

POLICIES = (
    "default",
    "OMP_WAIT_POLICY=passive",
    "GOMP_SPINCOUNT=300000",
)  # the last is the library's own
SESSIONS = 1_000_000  # more than are trained on: an epoch would end with a save
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def write_dataset(data_dir: Path, num_items: int) -> None:
    """Write DATA_DIR/generated: sessions of OTTO's lengths; validation is empty."""
    sessions = generate_sessions(LENGTHS["OTTO"], num_items, SESSIONS)
    empty = Sessions(np.empty(0, np.int32), np.zeros(1, np.int64))
    with DatasetWriter(data_dir / "generated") as writer:
        writer.write_items(np.arange(num_items))
        writer.write_split("train", [sessions])
        for split in ("val", "test"):
            writer.write_split(split, [empty])
        writer.finish(name="generated", protocol="every-step")


def environment(policy: str) -> dict[str, str]:
    """Return this process's environment with the variables of a waiting policy."""
    kept = {name: value for name, value in os.environ.items() if name not in _WAITING}
    words = [] if policy == "default" else policy.split(",")
    return kept | dict(word.split("=", 1) for word in words)


def trained(
    count: int, data_dir: Path, policy: str, seconds: float, settings: list[str]
) -> list[float]:
    """Return events per second of `count` simultaneous trainings, once all have begun to step."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder) / str(number) for number in range(count)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tron_cli", "train", "--config", "config_otto",
                 "dataset_name=generated", "save_every=0", *settings, "--data-dir", str(data_dir),
                 "--output-dir", folder, "--name", run.name],
                cwd=ROOT, env=environment(policy),
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for run in runs
        ]  # fmt: skip
        try:
            logs = [run / "metrics.jsonl" for run in runs]
            while not all(log.exists() and log.stat().st_size for log in logs):
                if any(process.poll() is not None for process in processes):
                    raise RuntimeError("tron train ended before its first steps")
                time.sleep(0.05)
            time.sleep(seconds)
            lines = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    # The first line counts the start, and a pair's lines differ in number.
    return [
        statistics.median([line["events_per_second"] for line in found[1:] or found])
        for found in lines
    ]


def measure(
    policies: list[str], num_items: int, seconds: float, repeats: int, settings: list[str]
) -> list[dict[str, Any]]:
    """Return one line per policy: medians of `repeats` turns over all policies."""
    alone: dict[str, list[float]] = {policy: [] for policy in policies}
    pairs: dict[str, list[list[float]]] = {policy: [] for policy in policies}
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), num_items)
        for _ in range(repeats):
            for policy in policies:
                alone[policy] += trained(1, Path(folder), policy, seconds, settings)
                pairs[policy].append(trained(2, Path(folder), policy, seconds, settings))
    return [
        {
            "policy": policy,
            "alone_events_per_s": statistics.median(alone[policy]),
            "pair_events_per_s": statistics.median([sum(pair) for pair in pairs[policy]]),
            "alone": alone[policy],
            "pairs": pairs[policy],
        }
        for policy in policies
    ]


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--policies", nargs="+", default=POLICIES)
    options.add_argument("--items", type=int, default=50_000)
    options.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    options.add_argument("--repeats", type=int, default=1)
    options.add_argument("settings", nargs="*", help="key=value words for `tron train`")
    arguments = options.parse_args(words)
    figures = measure(
        list(arguments.policies),
        arguments.items,
        arguments.seconds,
        arguments.repeats,
        arguments.settings,
    )
    rows = [
        [
            line["policy"],
            f"{line['alone_events_per_s']:,.0f}",
            f"{line['pair_events_per_s']:,.0f}",
            f"{line['pair_events_per_s'] / line['alone_events_per_s']:.0%}",
        ]
        for line in figures
    ]
    print(format_table(["policy", "alone, events/s", "pair together", "of alone"], rows))
    if arguments.output:
        content = {**circumstances(), "figures": figures}
        arguments.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
