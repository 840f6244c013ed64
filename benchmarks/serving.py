"""Latency of `tron serve` under open arrivals, its start time and its memory.

    python -m benchmarks.serving [--items 1000000] [--dim 64] [--rate 500] [--seconds 20]
        [--sweep] [--uniform] [--empty] [--json] [--output FILE.json] [-- SERVE OPTIONS]

The checkpoint is TRON with random weights, made on the fly. Load and server share this machine; the
load is a process of its own (`benchmarks.open_arrivals`), latency counts from the intended time of
a request. --sweep looks for the highest rate with p90 <= 50 ms and without a failure. --empty
serves a model that computes nothing, which leaves the cost of HTTP.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.machine import ROOT, circumstances
from benchmarks.measure import parser
from tron_cli.checkpoint import save_checkpoint
from tron_cli.config import ExperimentConfig, load_config
from tron_cli.models.base import build_model
from tron_cli.text_table import format_table

P90_MS = 50.0
_PRECISION = 1.05  # ratio of rates at which --sweep ends
_EMPTY = "import benchmarks.serving as b, sys; b.serve_empty(int(sys.argv[1]))"


def random_checkpoint(file: Path, num_items: int, dim: int) -> ExperimentConfig:
    """Save TRON with random weights; item i has the id i, and low ids are popular."""
    config, _ = load_config("config_otto", [f"embedding_dim={dim}"])
    torch.manual_seed(0)
    model = build_model(config, num_items)
    save_checkpoint(
        file,
        config=config,
        model=model,
        step=0,
        epoch=0,
        metrics={},
        dataset={"name": "random", "num_items": num_items},
        item_ids=torch.arange(1, num_items + 1),
        training={},
        popularity=torch.arange(num_items, -1, -1).roll(1),
    )
    return config


class EmptyModel:
    """A recommender that always gives the same answer, as quickly as possible."""

    def __init__(self, num_items: int) -> None:
        from tron_cli.serving.recommender import Recommendation

        self.num_items = num_items
        self.item_ids = np.arange(1, num_items + 1)
        self.checkpoint = SimpleNamespace(path=Path("empty.pt"), step=0)
        self._answer = Recommendation(list(range(1, 21)), [0.123456789] * 20)

    def recommend(self, histories: list[list[int]], **_: Any) -> list[Any]:
        return [self._answer] * len(histories)


def serve_empty(num_items: int) -> None:
    """Serve an EmptyModel on a free port."""
    import logging

    from tron_cli.serving.server import serve
    from tron_cli.serving.settings import ServerSettings

    logging.basicConfig(level="INFO", format="%(message)s")
    serve(
        Path("empty.pt"),
        lambda path: EmptyModel(num_items),  # type: ignore[arg-type, return-value]
        host="127.0.0.1",
        port=0,
        settings=ServerSettings(access_log=False),
    )


@dataclass(frozen=True)
class Served:
    """A running server. start_s: until it answers its first request."""

    port: int
    pid: int
    start_s: float

    def memory_mb(self) -> dict[str, float]:
        """Return resident memory and its largest value; mapped files count where they are read."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = dict(re.findall(r"^(Vm\w+|Rss\w+):\s+(\d+) kB", status, re.MULTILINE))
        names = {"rss_mb": "VmRSS", "peak_rss_mb": "VmHWM", "anonymous_mb": "RssAnon"}
        return {name: int(found[field]) / 1024 for name, field in names.items()}

    def cpu_s(self) -> float:
        """Return the processor seconds of all its threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def served(command: list[str]) -> Iterator[Served]:
    """Run a server until the block ends."""
    clock = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            found = re.search(r"on http://[\d.]+:(\d+)", line)
            if not found:
                raise RuntimeError(f"no server: {line}{process.stderr.read()}")
            # Else it would wait when the pipe is full.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield Served(int(found[1]), process.pid, time.perf_counter() - clock)
        finally:
            process.terminate()


def measured(
    server: Served, num_items: int, rate: float, seconds: float, *, uniform: bool
) -> dict[str, Any]:
    """Return the figures of one load."""
    words = [sys.executable, "-m", "benchmarks.open_arrivals", str(server.port), "--items",
             str(num_items), "--rate", str(rate), "--seconds", str(seconds)]  # fmt: skip
    before = server.cpu_s()
    done = subprocess.run(
        [*words, "--uniform"] if uniform else words,
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    found |= {"rate": rate, "server_cpu_s": server.cpu_s() - before, **server.memory_mb()}
    p90 = found["p90_ms"]
    return found | {"kept": found["failed"] == 0 and p90 is not None and p90 <= P90_MS}


def highest_rate(
    server: Served, num_items: int, first: float, seconds: float, *, uniform: bool
) -> list[dict[str, Any]]:
    """Return the loads on the way to the highest rate that keeps the limit, which is `kept`."""
    loads: list[dict[str, Any]] = []
    low, high, rate = 0.0, float("inf"), first
    while high > max(low, 1.0) * _PRECISION:
        loads.append(measured(server, num_items, rate, seconds, uniform=uniform))
        if loads[-1]["kept"]:
            low = rate
        else:
            high = rate
        rate = low * 2 if high == float("inf") else (max(low, high / 4) * high) ** 0.5
    return loads


def table(loads: list[dict[str, Any]]) -> str:
    header = ["rate/s", "achieved/s", "p50 ms", "p90 ms", "p99 ms", "failed", "server CPU/request",
              "RSS MB"]  # fmt: skip
    rows = []
    for load in loads:
        shown = [
            "" if load[name] is None else f"{load[name]:.1f}"
            for name in ("p50_ms", "p90_ms", "p99_ms")
        ]
        cpu = load["server_cpu_s"] / max(1, load["sent"]) * 1000
        rows.append(
            [f"{load['rate']:,.0f}", f"{load['achieved_rate']:,.0f}", *shown, f"{load['failed']:,}",
             f"{cpu:.2f} ms", f"{load['rss_mb']:,.0f}"]
        )  # fmt: skip
    return format_table(header, rows)


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--items", type=int, default=1_000_000)
    options.add_argument("--dim", type=int, default=64)
    options.add_argument("--rate", type=float, default=500)
    options.add_argument("--seconds", type=float, default=20)
    options.add_argument("--warm-up", type=float, default=2, help="seconds before, not counted")
    options.add_argument("--sweep", action="store_true", help="find the highest rate")
    options.add_argument("--uniform", action="store_true", help="equal intervals, not Poisson")
    options.add_argument("--empty", action="store_true", help="serve a model without arithmetic")
    options.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options.add_argument("serve", nargs="*", help="options of `tron serve`, after --")
    arguments = options.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.empty:
            command = [sys.executable, "-c", _EMPTY, str(arguments.items)]
        else:
            file = Path(folder) / "random.pt"
            random_checkpoint(file, arguments.items, arguments.dim)
            command = [sys.executable, "-m", "tron_cli", "serve", str(file), "--port", "0",
                       "--no-access-log", *arguments.serve]  # fmt: skip
        with served(command) as server:
            at_start = server.memory_mb()
            if arguments.warm_up:
                measured(server, arguments.items, arguments.rate, arguments.warm_up, uniform=False)
            find = highest_rate if arguments.sweep else measured
            found = find(server, arguments.items, arguments.rate, arguments.seconds,
                         uniform=arguments.uniform)  # fmt: skip
    loads = found if isinstance(found, list) else [found]
    content = {
        **circumstances(),
        "items": arguments.items,
        "dim": None if arguments.empty else arguments.dim,
        "table_mb": None if arguments.empty else arguments.items * arguments.dim * 4 / 2**20,
        "start_s": server.start_s,
        "start_rss_mb": at_start["rss_mb"],
        "highest_rate": max((load["rate"] for load in loads if load["kept"]), default=None),
        "loads": loads,
    }
    if arguments.json:
        print(json.dumps(content))
    else:
        print(table(loads))
        print(
            f"\nstart {server.start_s:.1f} s, {at_start['rss_mb']:,.0f} MB after it; highest rate "
            f"with p90 <= {P90_MS:.0f} ms here: {content['highest_rate'] or 'none'}"
        )
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
