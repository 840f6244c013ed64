"""The benchmark of the commands' peak memory, with few items and in this process."""

from __future__ import annotations

import io
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import memory
from tron_cli.cli import app


def test_a_command_is_measured() -> None:
    found = memory.measured(["--version"])
    # Linux counts the memory of the process that started it.
    own_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    assert 0.005 < found["peak_gb"] < own_gb + 0.5
    assert 0 < found["seconds"] < 60
    with pytest.raises(RuntimeError, match=r"tron evaluate missing\.pt ended with 2"):
        memory.measured(["evaluate", "missing.pt"])


def test_all_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []

    def in_this_process(words: list[str]) -> dict[str, float]:
        seen.append(words)
        with redirect_stdout(io.StringIO()):
            app(words, standalone_mode=False)
        return {"peak_gb": 0.5, "seconds": 2.0}

    @contextmanager
    def not_served(words: list[str]) -> Iterator[Any]:
        assert Path(words[4]).exists()
        yield SimpleNamespace(memory_mb=lambda: {"peak_rss_mb": 953.67}, start_s=3.0)

    monkeypatch.setattr(memory, "measured", in_this_process)
    monkeypatch.setattr(memory, "served", not_served)
    monkeypatch.setattr(memory, "FORMATS", ("safetensors",))
    monkeypatch.setattr(memory, "HELD_OUT", 5)
    output = tmp_path / "result.json"
    small = ["embedding_dim=8", "num_uniform_negatives=16", "topk_sampling=False"]
    words = [str(tmp_path), "--items=1500", "--sessions=60", f"--output={output}"]
    memory.main([*words, "--settings", *small])
    figures = json.loads(output.read_text())["figures"]
    assert len(figures) == len(seen) + 1
    assert {words[0] for words in seen} == {
        "train", "evaluate", "compare", "recommend", "similar", "export"
    }  # fmt: skip
    output.write_text(json.dumps({"figures": [each for each in figures if each != figures[4]]}))
    seen.clear()
    memory.main([*words, "--settings", *small])  # only what is missing
    assert [words[0] for words in seen] == ["compare"]
    assert figures[-1]["what"] == "serve, start"
    assert figures[-1]["peak_gb"] == pytest.approx(1, abs=1e-3)
    assert "serve, start" in capsys.readouterr().out
