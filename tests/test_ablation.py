"""The ablation runs, goes on where it ended, and its page and plot show the committed results."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.datasets import cyclic_sessions, write_dataset

from benchmarks import ablation, commands

FEW = ("embedding_dim=8", "num_blocks=1", "train_batch_size=32", "max_epochs=2")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs of a moment on 60 sessions, and a page of their own; the folder of all files."""
    sessions = {part: cyclic_sessions(60, seed) for seed, part in enumerate(("train", "val"))}
    write_dataset(tmp_path, **sessions, test=sessions["val"])
    runs = {
        "1e-bce": ablation.Run("bce", 1, "e"),
        "9b-ssm-top3": ablation.Run("ssm", 9, "b", 4, topk=3),
        "ce": ablation.Run("ce"),
    }
    (tmp_path / "ablation.md").write_text(f"Before\n{ablation.BEGIN}\n{ablation.END}\nAfter\n")
    for name, value in {
        "DATASET": "tiny",
        "COMMON": FEW,
        "RUNS": runs,
        "RESULTS": tmp_path / "results",
        "PAGE": tmp_path / "ablation.md",
        "PLOT": tmp_path / "ablation.svg",
    }.items():
        monkeypatch.setattr(ablation, name, value)
    return tmp_path


def test_the_ablation_runs(
    tiny: Path, command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands run in this process, and what they use is made up: starts use a second."""
    started = []

    def measured(words: list[str]) -> tuple[dict[str, Any], SimpleNamespace]:
        status, printed, _ = command(*words, "--json")
        assert status == 0
        seconds = 1 if "max_batches_per_epoch=1" in words else 73
        report = json.loads(printed[printed.index("{") :])  # after the path that a run prints
        return report, SimpleNamespace(ru_utime=seconds, ru_stime=0, ru_maxrss=1e6)

    monkeypatch.setattr(ablation, "measured", measured)
    words = ["run", "--data-dir", str(tiny)]
    ablation.main([*words, "1e-bce", "9b-ssm-top3"])
    results = {name: json.loads((tiny / "results" / f"{name}.json").read_text())
               for name in ("1e-bce", "9b-ssm-top3")}  # fmt: skip
    for result in results.values():
        assert result["test"]["metrics"]["R@20"]["value"] == 1  # of 20 items
        assert result["epochs_per_hour"] == 100  # two in 72 s
    (train, _) = results["9b-ssm-top3"]["commands"]
    assert "num_uniform_negatives=9" in train
    assert "topk_sampling=True topk_sampling_k=3" in train

    monkeypatch.setattr(ablation, "run", lambda name, _: started.append(name))
    ablation.main(words)
    assert started == ["ce"]

    ablation.main(["table"])
    page = (tiny / "ablation.md").read_text()
    rows = [line.split(" | ")[:3] for line in page.splitlines() if line.startswith(("| 1", "| 9"))]
    assert rows == [["| 1e", "bce", ""], ["| 9b+4s", "ssm", "3"]]
    assert page.startswith("Before\n")
    assert page.endswith("After\n")
    first = (tiny / "ablation.svg").read_bytes()
    assert b"9b+4s, top-3" in first
    ablation.main(["table"])
    assert (tiny / "ablation.svg").read_bytes() == first


def test_what_a_command_uses_is_measured() -> None:
    report, used = commands.measured(["config", "show", "config_yoochoose"])
    assert report["dataset_name"] == "yoochoose"
    assert 0.01 < used.ru_utime + used.ru_stime < 30
    assert used.ru_maxrss > 1000
    with pytest.raises(subprocess.CalledProcessError):
        commands.measured(["config", "show", "none_such"])


def test_the_ablation_names_its_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ablation.main(["run", "8192x"])
    assert "no run named 8192x; there are 1e-bce" in capsys.readouterr().err


def test_the_page_and_its_plot_show_the_committed_results() -> None:
    page, plot = ablation.PAGE.read_text(), ablation.PLOT.read_text()
    shown = page.partition(ablation.BEGIN)[2].partition(ablation.END)[0].strip()
    assert shown == ablation.table()
    for name in ablation.results():
        assert ablation.RUNS[name].negatives in plot
    assert "(ablation.svg)" in page
