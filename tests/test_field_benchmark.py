"""benchmarks.field: a method's result file, and its row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.datasets import cyclic_sessions, write_dataset

from benchmarks import field

FEW = ("embedding_dim=8", "num_blocks=1", "num_uniform_negatives=9", "topk_sampling_k=3")


def test_a_method_is_trained_and_evaluated_and_its_processor_time_recorded(
    tmp_path: Path,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Commands run in this process, and what they use is made up."""
    sessions = {part: cyclic_sessions(40, seed) for seed, part in enumerate(("train", "val"))}
    write_dataset(tmp_path, **sessions, test=sessions["val"])

    def measured(words: list[str]) -> tuple[dict[str, Any], SimpleNamespace]:
        status, printed, err = command(*words, "--json")
        assert status == 0, err
        report = json.loads(printed[printed.index("{") :])
        return report, SimpleNamespace(ru_utime=1500 if words[0] == "train" else 7, ru_stime=0.5)

    monkeypatch.setattr(field, "measured", measured)
    monkeypatch.setattr(field, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(field, "DATASETS", {"tiny": ("config_yoochoose", 2, 0.05)})
    monkeypatch.setitem(field.METHODS, "tron", ("TRON", "", FEW))
    for method, epochs in (("tron", 2), ("popular", None)):
        path = field.run("tiny", method, tmp_path, tmp_path / "runs")
        result = json.loads(path.read_text())
        assert path.name == f"tiny-{method}.json"
        assert result["epochs"] == epochs
        assert ("max_epochs=2" in result["commands"][0]) == (method == "tron")
        assert result["test"]["split"] == "test"
        assert result["training_processor_seconds"] == 1500.5
        assert result["evaluation_processor_seconds"] == 7.5
    rows = [line for line in field.table(["tiny"]).splitlines() if "1,500 s | 8 s |" in line]
    assert {row.split(" | ")[0] for row in rows} == {"| TRON", "| most popular"}
