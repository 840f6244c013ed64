"""Latency of `tron serve` under open arrivals, its start time and its memory.

    python -m benchmarks.serving [--items 1000000] [--dim 64] [--rate 500] [--seconds 20]
        [--sweep] [--uniform] [--empty] [--json] [--output FILE.json] [-- SERVE OPTIONS]
    python -m benchmarks.serving --soak MINUTES [--reload-every 10] --items 20000 --rate 60

The checkpoint is TRON with random weights, made on the fly. Load and server share this machine; the
load is a process of its own (`benchmarks.open_arrivals`), latency counts from the intended time of
a request. --sweep looks for the highest rate with p90 <= 50 ms and without a failure. --empty
serves a model that computes nothing, which leaves the cost of HTTP. --soak sends one long load
while new checkpoints, one in seven of them damaged, take the place of the file, and tells whether
memory grows.
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
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
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
_DAMAGED = 7  # one in so many checkpoints of a soak
_LOOK_S = 0.5  # the server looks for a new checkpoint this often
_SETTLED = 0.5  # part of a soak after which the trend of memory counts
_FLAT = 0.01  # of the memory: what the trend may add from there to the end
_EMPTY = "import benchmarks.serving as b, sys; b.serve_empty(int(sys.argv[1]))"


def random_checkpoint(file: Path, num_items: int, dim: int, seed: int = 0) -> ExperimentConfig:
    """Save TRON with random weights; item i has the id i, and low ids are popular."""
    config, _ = load_config("config_otto", [f"embedding_dim={dim}"])
    torch.manual_seed(seed)
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

    def reloads(self) -> dict[str, int]:
        """Return how many checkpoints took the place of another, and how many could not."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            page = answer.read().decode()
        found = re.findall(r'^tron_reloads_total{outcome="(\w+)"} (\d+)', page, re.MULTILINE)
        return {"done": 0, "failed": 0} | {name: int(count) for name, count in found}


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


def soak(
    server: Served, file: Path, num_items: int, rate: float, minutes: float, reload_every: float
) -> dict[str, Any]:
    """Return the figures of one load while `file` is replaced, and the growth of memory."""
    good = [file.read_bytes(), file.with_suffix(".other").read_bytes()]
    memory = [{"minute": 0.0, **server.memory_mb()}]
    clock = time.perf_counter()
    written = {"done": 0, "failed": 0}
    with ThreadPoolExecutor(1) as thread:
        load = thread.submit(measured, server, num_items, rate, minutes * 60, uniform=False)
        while not wait([load], timeout=reload_every).done:
            content = bytearray(good[sum(written.values()) % 2])
            is_damaged = sum(written.values()) % _DAMAGED == _DAMAGED - 1
            if is_damaged:
                content[len(content) // 2] ^= 255
            file.with_suffix(".new").write_bytes(content)
            file.with_suffix(".new").replace(file)
            written["failed" if is_damaged else "done"] += 1
            minute = (time.perf_counter() - clock) / 60
            memory.append({"minute": minute, **server.memory_mb()})
    time.sleep(_LOOK_S * 4)  # for the last file to be read
    found = {**load.result(), "written": written, "reloads": server.reloads(), "memory": memory}
    settled = [at for at in memory if at["minute"] >= minutes * _SETTLED]
    anonymous = [at["anonymous_mb"] for at in settled]
    per_minute = float(np.polyfit([at["minute"] for at in settled], anonymous, 1)[0])
    return found | {
        "growth_mb_per_minute": per_minute,
        "growth_kb_per_reload": per_minute * 1024 / (60 / reload_every),
        "growth_bytes_per_request": per_minute * 2**20 / (60 * rate),
        "flat": per_minute * minutes * (1 - _SETTLED) <= _FLAT * anonymous[0],
    }


def soak_table(found: dict[str, Any]) -> str:
    """Return a line for each minute, and what became of the requests, reloads and memory."""
    lines = {int(at["minute"]): at for at in reversed(found["memory"])}
    lines[-1] = found["memory"][-1]
    rows = [
        [f"{at['minute']:.1f}", f"{at['anonymous_mb']:,.1f}", f"{at['rss_mb']:,.1f}"]
        for at in sorted(lines.values(), key=lambda at: at["minute"])
    ]
    return (
        f"{format_table(['minute', 'anonymous MB', 'RSS MB'], rows)}\n\n"
        f"{found['sent']:,} requests, {found['failed']:,} failed; p50 {found['p50_ms']:.1f} ms, "
        f"p90 {found['p90_ms']:.1f} ms, p99 {found['p99_ms']:.1f} ms; reloads {found['reloads']} "
        f"of {found['written']}; memory {'flat' if found['flat'] else 'GROWS'}: "
        f"{found['growth_mb_per_minute']:+.3f} MB per minute, {found['growth_kb_per_reload']:+.1f} "
        f"kB per reload, {found['growth_bytes_per_request']:+.1f} bytes per request"
    )


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
    options.add_argument("--soak", type=float, metavar="MINUTES", help="with new checkpoints")
    options.add_argument("--reload-every", type=float, default=10, metavar="SECONDS", help="soak")
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
            if arguments.soak:
                random_checkpoint(file.with_suffix(".other"), arguments.items, arguments.dim, 1)
                command += ["--reload-every", str(_LOOK_S)]
        with served(command) as server:
            at_start = server.memory_mb()
            if arguments.warm_up:
                measured(server, arguments.items, arguments.rate, arguments.warm_up, uniform=False)
            found: Any
            if arguments.soak:
                found = soak(server, file, arguments.items, arguments.rate, arguments.soak,
                             arguments.reload_every)  # fmt: skip
            else:
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
        print(soak_table(loads[0]) if arguments.soak else table(loads))
        print(
            f"\nstart {server.start_s:.1f} s, {at_start['rss_mb']:,.0f} MB after it; highest rate "
            f"with p90 <= {P90_MS:.0f} ms here: {content['highest_rate'] or 'none'}"
        )
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
