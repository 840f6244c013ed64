"""The load of the serving benchmark: its schedule, its latencies, its search."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.servers import FakeRecommender, running_server

from benchmarks import serving
from benchmarks.open_arrivals import arrivals, load, requests


def test_arrivals_are_those_of_a_poisson_process() -> None:
    times = arrivals(1000, 20, uniform=False, seed=3)
    assert len(times) == pytest.approx(20_000, rel=0.03)
    gaps = np.diff(times)
    assert gaps.min() >= 0
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # as of an exponential law
    assert arrivals(10, 0.5, uniform=True, seed=3).tolist() == [0.0, 0.1, 0.2, 0.3, 0.4]


def test_latency_counts_from_the_intended_time() -> None:
    """A server that stalls for half a second delays all that were to be sent meanwhile."""
    model = FakeRecommender()
    intended = arrivals(100, 1.0, uniform=True, seed=0)
    with running_server(model) as server:
        model.gate.clear()
        threading.Timer(0.55, model.gate.set).start()
        found = asyncio.run(load(server.port, requests(50, 5, seed=1), intended))
    assert (found["sent"], found["failed"], found["failures"]) == (100, 0, {})
    assert 400 < found["max_ms"] < 1500
    assert found["p90_ms"] > 250
    assert found["connections"] > 30


def test_what_fails_is_counted() -> None:
    model = FakeRecommender()
    with running_server(model, timeout=0.1, max_waiting=3, max_histories=3) as server:
        model.gate.clear()
        intended = arrivals(100, 0.2, uniform=True, seed=0)
        found = asyncio.run(load(server.port, requests(50, 5, seed=1), intended))
        model.gate.set()
    assert (found["sent"], found["failed"]) == (20, 20)
    assert found["failures"] == {"503": 20}
    assert found["p90_ms"] is None


def test_the_search_finds_the_highest_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, first in ((730, 500), (30, 500), (5000, 500)):

        def measured(
            server: Any, num_items: int, rate: float, *_: Any, limit: int = limit, **__: Any
        ) -> dict[str, Any]:
            return {"rate": rate, "kept": rate <= limit}

        monkeypatch.setattr(serving, "measured", measured)
        loads = serving.highest_rate(None, 9, first, 1, uniform=False)  # type: ignore[arg-type]
        best = max(each["rate"] for each in loads if each["kept"])
        assert limit / 1.06 < best <= limit
        assert len(loads) < 15


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    words = ["--items=300", "--dim=8", "--rate=40", "--seconds=0.5", "--warm-up=0.1"]
    serving.main([*words, "--json", f"--output={output}", "--", "--max-batch", "8"])
    content = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out) == content
    (found,) = content["loads"]
    assert found["failed"] == 0
    assert 0 < found["p50_ms"] <= found["p90_ms"] <= found["p99_ms"]
    assert found["rss_mb"] > 50
    assert content["start_s"] > 0


def test_a_soak_replaces_the_file_and_measures_memory(tmp_path: Path) -> None:
    """One in seven files is damaged; the trend is that of the memory that was seen."""

    def read(path: Path) -> FakeRecommender:
        return FakeRecommender(num_items=100, name=path.read_text())

    file = tmp_path / "model.pt"
    file.write_text("one.pt")
    file.with_suffix(".other").write_text("two.pt")

    class Growing(serving.Served):
        def memory_mb(self) -> dict[str, float]:
            return {"anonymous_mb": 100 + self.reloads()["done"] * 2.0, "rss_mb": 0.0}

    with running_server(read, file, reload_every=0.02) as server:
        served = Growing(server.port, os.getpid(), 0.0)
        found = serving.soak(served, file, 100, rate=50, minutes=0.04, reload_every=0.2)
    assert (found["failed"], found["reloads"]) == (0, found["written"])
    assert found["written"]["failed"] == sum(found["written"].values()) // 7 > 0
    assert not found["flat"]
    assert found["growth_kb_per_reload"] == pytest.approx(2 * 1024, rel=0.35)
    assert "GROWS" in serving.soak_table(found)
