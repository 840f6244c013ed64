"""`tron demo`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.command_lines import Command, is_one_sentence
from helpers.datasets import write_dataset

from tron_cli.data.dataset import Dataset


def test_demo_writes_its_results_and_fails_where_the_model_learned_nothing(
    command: Command, tmp_path: Path
) -> None:
    code, out, err = command(
        "demo", "--data-dir", tmp_path / "data", "--output-dir", tmp_path / "runs",
        "max_epochs=1", "max_batches_per_epoch=1", "embedding_dim=4", "limit_val_batches=1e-3",
    )  # fmt: skip
    assert code == 1
    assert "of the best possible R@20 instead of 90 %" in err
    found = json.loads((tmp_path / "runs" / "demo.json").read_text())
    assert list(found) == ["model", "best", "markov", "popularity"]
    info = json.loads((tmp_path / "data" / "demo" / "dataset.json").read_text())
    for name, figures in info["references"]["test"].items():
        assert found[name]["R@20"]["value"] == figures["R@20"]
    assert f"{found['model']['R@20']['value']:.4f}" in out


def test_demo_leaves_a_dataset_of_that_name_alone_which_it_did_not_make(
    command: Command, tmp_path: Path
) -> None:
    write_dataset(tmp_path, name="demo", train=[[2, 1, 2]], source="synthetic", options={"seed": 1})
    code, _, err = command("demo", "--data-dir", tmp_path, "--output-dir", tmp_path / "runs")
    assert code == 2
    assert "a dataset of your own" in err
    assert is_one_sentence(err)
    assert Dataset.open(tmp_path / "demo").split("train")[0].tolist() == [2, 1, 2]


@pytest.mark.parametrize("setting", ["model=nope", "learning_rat=1", "lr=fast"])
def test_demo_checks_its_settings_before_it_prepares(
    setting: str, command: Command, tmp_path: Path
) -> None:
    code, out, err = command(
        "demo", "--data-dir", tmp_path / "data", "--output-dir", tmp_path / "runs", setting
    )
    assert (code, out) == (2, "")
    assert is_one_sentence(err)
    assert setting.partition("=")[0] in err
    assert list(tmp_path.iterdir()) == []
