"""Speed and memory of `tron prepare otto` on generated sessions with OTTO's statistics.

    python benchmarks/prepare_otto.py [--sizes 100 400] [--repeats 3] [--output FILE.json]

Two references read the smaller files line by line, in turns with `prepare`: `json.loads` alone, and
TRON's preprocessing (loads, keep the clicks, count ids from 1, collect the items, dump). Every side
finds its files in the page cache. From the two sizes time and memory are extrapolated to the real
12 GB: beyond the blocks that are read at a time, memory holds a few numbers of every session.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tqdm import tqdm

OTTO_MB, OTTO_ITEMS = 12_000, 1_855_603  # 11.3 GB of training, 0.7 GB of test
TEST_SHARE = 0.064  # sessions of the test file for each of the training file: so many events
MEAN_EVENTS, MEDIAN_EVENTS, MAX_EVENTS = 16.8, 6, 500
KINDS = {"clicks": 0.9, "carts": 0.08, "orders": 0.02}
START, PERIOD = 1_659_304_800_000, 28 * 86_400_000  # ms
BYTES_PER_SESSION = 870
BLOCK = 50_000  # sessions generated at a time


def generate(file: Path, sessions: int, seed: int) -> None:
    """Write sessions with OTTO's lengths, catalogue, popularity, types and period, by start."""
    rng = np.random.default_rng(seed)
    starts = np.sort(rng.integers(0, PERIOD, sessions))
    ids = rng.permutation(OTTO_ITEMS)
    spread = np.sqrt(2 * np.log(MEAN_EVENTS / MEDIAN_EVENTS))
    with file.open("wb") as output:
        for first in tqdm(range(0, sessions, BLOCK), desc=f"generate {file.name}", disable=None):
            start = starts[first : first + BLOCK]
            lengths = rng.lognormal(np.log(MEDIAN_EVENTS), spread, len(start))
            lengths = np.clip(lengths.round(), 2, MAX_EVENTS).astype(np.int64)
            session = np.repeat(np.arange(len(start)), lengths)
            # Within a visit half a minute passes between events, hours from visit to visit.
            gaps = rng.exponential(np.where(rng.random(len(session)) < 0.85, 3e4, 1e7))
            begins = np.cumsum(lengths) - lengths
            elapsed = np.cumsum(gaps)
            elapsed -= elapsed[begins][session]
            fits = np.minimum(1, (PERIOD - start) / (elapsed[begins + lengths - 1] + 1))
            events = pl.DataFrame(
                {
                    "session": session + first,
                    "aid": ids[(OTTO_ITEMS ** rng.random(len(session))).astype(np.int64) - 1],
                    "ts": START + start[session] + (elapsed * fits[session]).astype(np.int64),
                    "type": rng.choice(list(KINDS), len(session), p=list(KINDS.values())),
                }
            )
            event = pl.concat_str(
                pl.lit('{"aid":'),
                "aid",
                pl.lit(',"ts":'),
                "ts",
                pl.lit(',"type":"'),
                "type",
                pl.lit('"}'),
            )
            lines = (
                events.group_by("session", maintain_order=True)
                .agg(event.str.join(",").alias("events"))
                .select(
                    pl.concat_str(
                        pl.lit('{"session":'),
                        "session",
                        pl.lit(',"events":['),
                        "events",
                        pl.lit("]}\n"),
                    ).str.join()
                )
            )
            output.write(lines.item().encode())


def json_loads(files: list[Path]) -> None:
    for file in files:
        with file.open() as lines:
            for line in lines:
                json.loads(line)


def as_tron_does(files: list[Path]) -> None:
    """Do all the work of the reference, with its data structures."""
    for file in files:
        items: set[int] = set()
        with file.open() as lines, file.with_suffix(".clicks").open("w") as output:
            for line in lines:
                session = json.loads(line)
                session["events"] = [e for e in session["events"] if e["type"] == "clicks"]
                for event in session["events"]:
                    event["aid"] += 1
                items.update([event["aid"] for event in session["events"]])
                output.write(json.dumps(session, separators=(",", ":")) + "\n")


def into_page_cache(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as content:
            while content.read(1 << 22):
                pass


def timed(function: Callable[..., object], *arguments: object) -> dict[str, float]:
    """Return seconds on the clock and of all cores; the latter hardly depend on other load."""
    begin, cpu = time.perf_counter(), _cpu()
    function(*arguments)
    return {"seconds": time.perf_counter() - begin, "cpu_seconds": _cpu() - cpu}


def _cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure_prepare(raw: Path, data_dir: Path) -> None:
    """Run prepare once in this process and print its figures (see `prepare_once`)."""
    from tron_cli.prepare.sources.otto import prepare_otto

    taken = timed(prepare_otto, raw, data_dir)
    print(json.dumps({**taken, "peak_memory_mb": _peak_memory_mb()}))


def _peak_memory_mb() -> float:
    # Not getrusage: on Linux its peak is also that of the process that started this one.
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def prepare_once(raw: Path) -> dict[str, float]:
    """Return seconds and peak memory of one run in a process of its own."""
    with tempfile.TemporaryDirectory() as data_dir:
        command = [sys.executable, __file__, "--measure", str(raw), data_dir]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs=2, default=[100, 400], help="MB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure_prepare(*arguments.measure)
        return

    with tempfile.TemporaryDirectory() as folder:
        raws = []
        for size in arguments.sizes:
            raw = Path(folder) / f"{size}"
            raw.mkdir()
            files = [raw / "otto-recsys-train.jsonl", raw / "otto-recsys-test.jsonl"]
            sessions = round(size * 1_000_000 / BYTES_PER_SESSION / (1 + TEST_SHARE))
            generate(files[0], sessions, seed=0)
            generate(files[1], round(sessions * TEST_SHARE), seed=1)
            raws.append((raw, files))
        small = raws[0][1]
        runs: dict[str, list[dict[str, float]]] = {"json_loads": [], "as_tron_does": []}
        prepared: list[list[dict[str, float]]] = [[], []]
        for _ in range(arguments.repeats):
            into_page_cache(small)
            runs["json_loads"].append(timed(json_loads, small))
            runs["as_tron_does"].append(timed(as_tron_does, small))
            for which, (raw, files) in enumerate(raws):
                into_page_cache(files)
                prepared[which].append(prepare_once(raw))
        sizes = [sum(file.stat().st_size for file in files) / 1e6 for _, files in raws]

    references = {name: _speeds(sizes[0], taken) for name, taken in runs.items()}
    results: list[dict[str, Any]] = []
    for mb, measured in zip(sizes, prepared, strict=True):
        speeds = _speeds(mb, measured)
        memory = max(run["peak_memory_mb"] for run in measured)
        times = {
            f"times_{name}": {unit: speeds[unit] / reference[unit] for unit in speeds}
            for name, reference in references.items()
        }
        results.append({"mb": mb, **speeds, **times, "peak_memory_mb": memory})
    taken = [result["mb"] / result["mb_per_s"] for result in results]
    report = {
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "references": references,
        "prepare": results,
        # Both fixed cost and cost per MB come out of two sizes.
        "extrapolated_to_otto": {
            "mb": OTTO_MB,
            "seconds": _line(sizes, taken, OTTO_MB),
            "peak_memory_mb": _line(sizes, [r["peak_memory_mb"] for r in results], OTTO_MB),
        },
    }
    print(json.dumps(report, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def _speeds(mb: float, runs: list[dict[str, float]]) -> dict[str, float]:
    return {
        "mb_per_s": mb / statistics.median(run["seconds"] for run in runs),
        "mb_per_cpu_s": mb / statistics.median(run["cpu_seconds"] for run in runs),
    }


def _line(x: list[float], y: list[float], at: float) -> float:
    return y[1] + (at - x[1]) * (y[1] - y[0]) / (x[1] - x[0])


if __name__ == "__main__":
    main()
