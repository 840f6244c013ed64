"""Averaged weights: their values, what is kept of them, and runs that are resumed."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import random_sessions, tiny_settings, write_dataset
from helpers.runs import check_same_run, interrupt_at, resume, start, write_config

import tron_cli.training.start as module
from tron_cli.checkpoint import best_checkpoint, load_checkpoint
from tron_cli.config import ExperimentConfig
from tron_cli.data.dataset import Dataset
from tron_cli.errors import InputError
from tron_cli.evaluation.evaluate import EvaluationOptions, assess
from tron_cli.training.loop import InterruptedRunError

CPU = torch.device("cpu")
DECAY = 0.9


def write_generated(folder: Path, *, num_items: int = 300) -> Dataset:
    rng = np.random.default_rng(10)
    sessions = [random_sessions(rng, count, num_items) for count in (45, 20)]
    return write_dataset(folder, train=sessions[0], val=sessions[1], num_items=num_items)


@pytest.fixture
def weights_of_steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Copies of the weights after each step."""
    steps: list[dict[str, torch.Tensor]] = []
    original = module.training_step

    def watched(model: Any, *arguments: Any) -> torch.Tensor:
        loss = original(model, *arguments)
        steps.append({name: values.clone() for name, values in model.state_dict().items()})
        return loss

    monkeypatch.setattr(module, "training_step", watched)
    return steps


def check_average(found: dict[str, torch.Tensor], steps: list[dict[str, torch.Tensor]]) -> None:
    """Compare with the mean in which each step weighs 0.9 times as much as the next one."""
    share_S = DECAY ** torch.arange(len(steps) - 1, -1, -1, dtype=torch.float64)
    share_S /= share_S.sum()
    for name, values in found.items():
        each = torch.stack([step[name].double() for step in steps], dim=-1)
        torch.testing.assert_close(values.double(), each @ share_S, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", ["sasrec", "gsasrec"])
def test_what_is_kept_and_evaluated_is_the_mean_of_the_weights_of_all_steps(
    model: str, tmp_path: Path, weights_of_steps: list[dict[str, torch.Tensor]]
) -> None:
    data = write_generated(tmp_path / "data")
    config = write_config(tmp_path, model=model, ema_decay=DECAY, optimizer="auto", lr=1e-2)
    start(config, tmp_path / "data", tmp_path / "runs", "a")
    best = load_checkpoint(best_checkpoint(tmp_path / "runs" / "a"))
    check_average(best.weights, weights_of_steps[: best.step])
    moved = weights_of_steps[best.step - 1]["item_embedding.weight"]
    assert (best.weights["item_embedding.weight"] - moved).abs().max() > 1e-3
    options = EvaluationOptions(split="val", metrics="R@5 RR@100")
    report = assess(best, data, options, CPU)
    assert report["metrics"]["R@5"]["value"] == best.metrics["R@5"]

    last = load_checkpoint(tmp_path / "runs" / "a" / "last.pt")
    assert (last.step, len(weights_of_steps)) == (18, 18)
    check_average(last.weights, weights_of_steps)
    check_average(dict(last.build_model(CPU).state_dict()), weights_of_steps)
    for name, values in weights_of_steps[-1].items():
        assert torch.equal(last.training["weights"][name], values)


def test_averaging_changes_no_weights_of_the_training(
    tmp_path: Path, weights_of_steps: list[dict[str, torch.Tensor]]
) -> None:
    write_generated(tmp_path / "data")
    for name, decay in (("plain", 0.0), ("averaged", DECAY)):
        config = write_config(tmp_path, ema_decay=decay, optimizer="adam", max_epochs=1)
        start(config, tmp_path / "data", tmp_path / "runs", name)
    plain, averaged = weights_of_steps[:6], weights_of_steps[6:]
    for one, other in zip(plain, averaged, strict=True):
        assert all(torch.equal(values, other[name]) for name, values in one.items())


@pytest.mark.parametrize(
    "changes", [{}, {"model": "gru4rec", "session_parallel": True, "weight_decay": 0.1}]
)
def test_an_averaged_run_stopped_and_resumed_ends_with_the_same_bits(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_generated(tmp_path / "data")
    config = write_config(
        tmp_path,
        ema_decay=DECAY,
        optimizer="adam",
        save_every=0,
        max_batches_per_epoch=6,
        **changes,
    )
    runs = tmp_path / "runs"
    start(config, tmp_path / "data", runs, "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 11, signal.SIGINT)
        with pytest.raises(InterruptedRunError):
            start(config, tmp_path / "data", runs, "stopped")
    resume(tmp_path / "data", runs / "stopped")
    check_same_run(runs / "stopped", runs / "whole", same_log=False)


def test_auto_takes_the_optimizer_that_can_be_averaged(tmp_path: Path) -> None:
    """A table of 12,000 items would have row_adam."""
    write_generated(tmp_path / "data", num_items=12_000)
    config = write_config(tmp_path, ema_decay=DECAY, optimizer="auto", max_epochs=1)
    start(config, tmp_path / "data", tmp_path / "runs", "a")
    assert load_checkpoint(best_checkpoint(tmp_path / "runs" / "a")).config.optimizer == "adam"


@pytest.mark.parametrize("optimizer", ["row_adam", "adagrad"])
def test_averages_of_rows_that_sleep_are_refused(optimizer: str) -> None:
    with pytest.raises(InputError, match=r"ema_decay averages .* add optimizer=adam$"):
        ExperimentConfig(**tiny_settings(ema_decay=0.9, optimizer=optimizer))


@pytest.mark.parametrize("damage", ["gone", "other", "none"])
def test_a_last_pt_without_the_weights_to_resume_from_is_refused(
    damage: str, tmp_path: Path
) -> None:
    write_generated(tmp_path / "data")
    config = write_config(tmp_path, ema_decay=DECAY, optimizer="adam", max_epochs=1)
    start(config, tmp_path / "data", tmp_path / "runs", "a")
    last = tmp_path / "runs" / "a" / "last.pt"
    content = torch.load(last, weights_only=True)
    if damage == "gone":
        del content["training"]["weights"]
    elif damage == "other":
        content["training"]["weights"]["norm.weight"] = torch.zeros(3)
    else:
        content["training"]["weights"] = None
    torch.save(content, last)
    with pytest.raises(InputError, match=r"last\.pt"):
        resume(tmp_path / "data", last.parent, "max_epochs=2")
