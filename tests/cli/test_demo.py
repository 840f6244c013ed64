"""`tron demo`."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from helpers.command_lines import Command, is_one_sentence
from helpers.datasets import write_dataset

from tron_cli.data.dataset import Dataset
from tron_cli.prepare.sources.synthetic import make_shop


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
    check_visitor(command, out, Dataset.open(tmp_path / "data" / "demo"))


def check_visitor(command: Command, out: str, dataset: Dataset) -> None:
    """Check the table of recommendations against `tron recommend` and the shop's formula."""
    (line,) = re.findall(r"^\$ tron (recommend .*)$", out, flags=re.MULTILINE)
    words = shlex.split(line)
    shown = re.findall(r"^(\d+) +(\d+) +(-?[\d.]+) +([\d.]+) +([\d,]+)$", out, flags=re.MULTILINE)
    code, printed, err = command(*words, "--scores", "--json")
    assert code == 0, err
    recommended = json.loads(printed)
    assert [int(item) for _, item, *_ in shown] == recommended["items"]
    assert [float(score) for _, _, score, *_ in shown] == [
        round(score, 2) for score in recommended["scores"]
    ]
    history = [int(item) for item in words[words.index("--history") + 1].split()]
    number_of = {item: number for number, item in enumerate(dataset.item_ids.tolist(), start=1)}
    numbers = [number_of[item] for item in history]
    assert dataset.split("test").items.tobytes().find(np.array(numbers, np.int32).tobytes()) >= 0
    shop = make_shop(np.random.default_rng(42))
    category, brand = numbers[-1] - 1, numbers[-2] - 1
    probability_I = shop.next_item(category // len(shop.brand_share))[brand % len(shop.brand_share)]
    for _, item, _, probability, place in shown:
        expected = probability_I[number_of[int(item)] - 1]
        assert float(probability) == pytest.approx(expected, abs=5e-5)
        better = int((probability_I > expected).sum())
        equal = int((probability_I == expected).sum())
        assert better < int(place.replace(",", "")) <= better + equal


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
