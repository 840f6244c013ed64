"""The benchmark of training from last week's model runs, and its page shows its figures."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.datasets import random_sessions

from benchmarks import fresh_models


def test_fresh_models_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(3)
    sessions = [" ".join(map(str, row)) for row in random_sessions(random, 90, 20)]
    days = ["2016-05-12..2016-05-13"] * 30 + ["2016-05-14..2016-05-20"] * 30 + ["2016-05-21"] * 30
    files = {"train_sessions": sessions, "train_dates_derived": days, "test_sessions": sessions[:9]}
    for name, lines in files.items():
        content = gzip.compress("".join(f"{line}\n" for line in lines).encode())
        (tmp_path / f"{name}.txt.gz").write_bytes(content)
    monkeypatch.setattr(fresh_models, "VALIDATION", 20)
    few = {"max_epochs": 2, "max_batches_per_epoch": 2, "train_batch_size": 8, "embedding_dim": 8,
           "num_uniform_negatives": 9, "num_batch_negatives": 2}  # fmt: skip
    monkeypatch.setattr(fresh_models, "SETTINGS", {**fresh_models.SETTINGS, **few})
    output = tmp_path / "fresh.json"
    fresh_models.main(["--raw", str(tmp_path), "--seeds", "1", "--output", str(output)])
    (found,) = json.loads(output.read_text())["figures"]
    assert found["kept_items"] > 0
    assert [step for step, _ in found["from scratch"]["curve"]] == [2, 4]
    assert "from last week's model" in capsys.readouterr().out


def test_the_page_shows_the_committed_figures() -> None:
    root = Path(__file__).parents[1]
    content = json.loads((root / "benchmarks/results/fresh_models.json").read_text())
    assert fresh_models.table(content) in (root / "docs/results.md").read_text()
