"""Baselines through the commands: `tron train model=...`, then `tron evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import random_sessions, write_dataset

from tron_cli.baselines import build_baseline
from tron_cli.checkpoint import load_checkpoint
from tron_cli.config import ExperimentConfig
from tron_cli.data.dataset import Dataset
from tron_cli.errors import InputError
from tron_cli.evaluation.predict import predict
from tron_cli.registry import BASELINES
from tron_cli.training.fit import fit

Command = Callable[..., tuple[int, str, str]]

# After 1 came 2 twice and 3 once; 1..4 occur 3, 3, 2, 1 times.
TRAIN = [[1, 2], [1, 2], [1, 3, 4], [3, 2]]
SPLITS: dict[str, Any] = {
    "train": TRAIN,
    "val": [[1, 2], [1, 4]],
    "test": [[1, 2], [1, 3], [1, 4], [1, 3, 4]],
}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data", **SPLITS)
    return tmp_path / "data"


def settings(**changes: Any) -> list[str]:
    chosen = {
        "dataset_name": "tiny",
        "metrics": "R@1,RR@5",
        "val_metric": "R@1",
        "recommendation_limit": 3,
        **changes,
    }
    return [f"{key}={value}" for key, value in chosen.items()]


def train(command: Command, data_dir: Path, *words: object) -> tuple[int, str, str]:
    return command(
        *("train", "--config", "config_yoochoose", "--data-dir", data_dir),
        *("--output-dir", data_dir.parent / "runs", "--name", "it", *words),
    )


def test_markov_from_the_command_line(command: Command, data_dir: Path) -> None:
    code, out, err = train(command, data_dir, *settings(model="markov"), "--json")
    assert code == 0, err
    made = json.loads(out)
    # Ranks 1 and 4: item 4 never followed 1, and 2, 3 and the more popular 1 come before it.
    assert made["validation"] == {"R@1": 0.5, "RR@5": (1 + 1 / 4) / 2}
    run_dir = data_dir.parent / "runs" / "it"
    checkpoint = Path(made["checkpoint"])
    assert checkpoint == run_dir / "markov-tiny-R@1=0.5000.pt"
    assert {path.name for path in run_dir.iterdir()} == {
        *("config.json", "train.log", "metrics.jsonl", checkpoint.name)
    }
    assert json.loads((run_dir / "config.json").read_text())["model"] == "markov"
    (line,) = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["validation"] == made["validation"]
    assert "markov on tiny: 4 sessions, 4 items" in (run_dir / "train.log").read_text()

    trec = data_dir.parent / "run.trec"
    code, out, err = command("evaluate", run_dir, "--data-dir", data_dir, "--json", "--run", trec)
    assert code == 0, err
    report = json.loads(out)
    # Ranks 1, 2, 4, 2 and, after 3, where 2 and 4 followed once each and 2 is more popular, 2.
    assert report["metrics"]["R@1"]["value"] == pytest.approx(1 / 5)
    assert report["metrics"]["RR@5"]["value"] == pytest.approx((1 + 3 / 2 + 1 / 4) / 5)
    assert report["positions"] == "none, each event from its own history"
    # Original ids are 101..104.
    shown = [line.split()[2] for line in trec.read_text().splitlines() if "s3_e2 " in line]
    assert shown[:4] == ["102", "104", "101", "103"]


@pytest.mark.parametrize("name", BASELINES)
def test_a_checkpoint_gives_every_baseline_back(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows = random_sessions(rng, 40, 15)
    dataset = write_dataset(tmp_path, train=rows[:30], val=rows[30:], num_items=15)
    own = {"knn_neighbors": 4} if name == "session_knn" else {}
    config = ExperimentConfig(
        dataset_name="tiny", model=name, val_metric="R@5", sequence_length=3, **own
    )
    path = fit(config, dataset, tmp_path / "run")
    checkpoint = load_checkpoint(path)
    assert all(isinstance(array, torch.Tensor) for array in checkpoint.weights.values())
    validation = dataset.split("val")
    again = checkpoint.build_model(torch.device("cpu"))
    fresh = build_baseline(config, 15)
    fresh.fit(dataset.split("train"))
    found = [
        predict(baseline, validation, protocol="every-step", top_items=5)
        for baseline in (again, fresh)
    ]
    for attribute in ("session_E", "event_E", "target_E", "rank_E", "top_EK"):
        first, second = (getattr(one, attribute).tolist() for one in found)
        assert first == second
    assert checkpoint.metrics["R@5"] == np.mean(found[0].rank_E <= 5)
    assert path.name.startswith(f"{name}-tiny-")
    assert ("knn_neighbors=4-knn_sample_size=2500" in path.name) == (name == "session_knn")


def test_without_validation_nothing_is_selected(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, train=TRAIN)
    path = fit(ExperimentConfig(dataset_name="tiny", model="popular"), dataset, tmp_path / "run")
    assert path.name == "popular-tiny.pt"
    assert load_checkpoint(tmp_path / "run").metrics == {}


def test_overfitting_sees_the_first_sessions_only(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, train=TRAIN, val=[[3, 4]])
    for name in BASELINES:
        config = ExperimentConfig(
            dataset_name="tiny", model=name, overfit_batches=1, train_batch_size=2
        )
        path = fit(config, dataset, tmp_path / name)
        # Of 1 2, 1 2: items 1 and 2 twice each, the others never.
        assert load_checkpoint(path).weights["popularity"].tolist() == [0, 2, 2, 0, 0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model=markov", "--profile", "3"], "no steps to profile"),
        (["model=session_knn", "knn_neighbors=0"], "knn_neighbors"),
        (["model=session_knn", "knn_sample_size=2000000"], "knn_sample_size"),
        (["model=ease", "ease_l2=0"], "ease_l2"),
    ],
)
def test_what_makes_no_sense_is_refused(
    words: list[str], sentence: str, command: Command, data_dir: Path
) -> None:
    code, out, err = train(command, data_dir, *settings(), *words)
    assert (code, out) == (2, "")
    assert sentence in err
    assert "Traceback" not in err
    assert not (data_dir.parent / "runs").exists()


def test_a_baseline_is_not_resumed(command: Command, data_dir: Path) -> None:
    train(command, data_dir, *settings(model="popular"))
    run_dir = data_dir.parent / "runs" / "it"
    code, _, err = command("train", "--resume", run_dir, "--data-dir", data_dir)
    assert code == 2
    assert "baselines" in err
    code, _, err = train(command, data_dir, *settings(model="popular"))
    assert (code, "choose another --name" in err, "--resume" in err) == (2, True, False)


def test_fitting_needs_training_sessions(tmp_path: Path) -> None:
    dataset = Dataset.open(write_dataset(tmp_path, train=[], val=[[1, 2]]).path)
    with pytest.raises(InputError, match=r"training split .* is empty"):
        fit(ExperimentConfig(dataset_name="tiny", model="popular"), dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()
