"""Steps along the gradients of several batches."""

from __future__ import annotations

import copy
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import random_sessions, tiny_settings, write_dataset
from helpers.networks import make_sessions
from helpers.runs import check_same_run, interrupt_at, resume, start, write_config

from tron_cli.checkpoint import load_checkpoint
from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import training_batch
from tron_cli.errors import InputError
from tron_cli.models.base import build_model
from tron_cli.sampling.negatives import Distribution
from tron_cli.training.loop import InterruptedRunError
from tron_cli.training.optim import optimizer_of
from tron_cli.training.step import accumulated_step, training_loss

CE = {"loss": "ce", "num_uniform_negatives": 0, "num_batch_negatives": 0, "topk_sampling": False}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("clip_norm", [0.0, 1e-3])
@pytest.mark.parametrize("optimizer", ["adam", "row_adam", "adagrad"])
def test_the_gradient_is_that_of_the_mean_over_the_events_of_all_batches(
    optimizer: str, clip_norm: float, padded: bool
) -> None:
    """Batches of 3, 23 and 8 events, with rows of the table in common, each with its negatives."""
    config = ExperimentConfig(
        **tiny_settings(optimizer=optimizer, clip_norm=clip_norm, dropout_rate=0.3, num_heads=2)
    )
    torch.manual_seed(0)
    model = build_model(config, num_items=30)
    sessions = make_sessions([2, 3, 9, 6, 7, 5, 5, 5], 30)
    chosen = [np.arange(2), np.arange(2, 6), np.arange(6, 8)]
    batches = [training_batch(sessions, rows, 6, padded=padded) for rows in chosen]
    counts = [int(np.minimum(sessions.lengths[rows] - 1, 6).sum()) for rows in chosen]
    twin, expected = copy.deepcopy(model), 0.0
    torch.manual_seed(7)
    for batch, count in zip(batches, counts, strict=True):
        loss = training_loss(twin, batch, config, Distribution(30)) * count / sum(counts)
        loss.backward()
        expected += loss.item()
    stepper = optimizer_of(config, model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    torch.manual_seed(7)
    arguments = (config, Distribution(30), torch.float32)
    found = accumulated_step(model, stepper, scaler, batches, *arguments)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    gradients = [weights.grad.to_dense() for weights in twin.parameters()]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    scale = min(1.0, clip_norm / (norm.item() + 1e-6)) if clip_norm else 1.0
    for weights, gradient in zip(model.parameters(), gradients, strict=True):
        if weights.grad.is_sparse:
            rows = weights.grad._indices()[0]
            assert len(rows) == len(rows.unique())
        torch.testing.assert_close(weights.grad.to_dense(), scale * gradient, rtol=1e-4, atol=1e-8)


def write_generated(folder: Path, sessions: int = 48) -> None:
    rng = np.random.default_rng(10)
    split = [random_sessions(rng, count, 300) for count in (sessions, 20)]
    write_dataset(folder, train=split[0], val=split[1], num_items=300)


@pytest.mark.parametrize("optimizer", ["adam", "row_adam"])
def test_two_batches_per_step_train_as_one_of_twice_the_size(
    optimizer: str, tmp_path: Path
) -> None:
    """The input table of row_adam has sparse gradients, of which the batches share rows."""
    write_generated(tmp_path / "data")
    models, losses = [], []
    for name, changes in (
        ("twice", {"train_batch_size": 16}),
        ("accumulated", {"train_batch_size": 8, "accumulate_batches": 2}),
    ):
        config = write_config(
            tmp_path, optimizer=optimizer, reuse_item_embeddings=False, dropout_rate=0.0,
            weight_decay=0.1, clip_norm=1.0, **CE, **changes,
        )  # fmt: skip
        start(config, tmp_path / "data", tmp_path / "runs", name)
        last = load_checkpoint(tmp_path / "runs" / name / "last.pt")
        assert last.step == 9  # three epochs of 48 sessions
        models.append(last.build_model(torch.device("cpu")))
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses.append([loss for line in lines if (loss := json.loads(line).get("loss"))])
    for name, values in models[0].named_parameters():
        if not name.endswith("query_key_value.bias"):  # a bias of keys follows its roundings
            found = models[1].get_parameter(name)
            torch.testing.assert_close(found, values, rtol=1e-3, atol=1e-4)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(losses[0]) >= 3


@pytest.mark.parametrize(
    "changes", [{"optimizer": "row_adam"}, {"model": "gru4rec", "session_parallel": True}]
)
def test_an_accumulated_run_stopped_and_resumed_ends_with_the_same_bits(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """45 sessions are 6 batches: two steps of 4 batches per epoch, which end in the next pass."""
    write_generated(tmp_path / "data", 45)
    config = write_config(
        tmp_path, accumulate_batches=4, save_every=0, max_epochs=4, max_batches_per_epoch=2,
        **changes,
    )  # fmt: skip
    runs = tmp_path / "runs"
    start(config, tmp_path / "data", runs, "whole")
    assert load_checkpoint(runs / "whole" / "last.pt").step == 8
    with monkeypatch.context() as patch:
        interrupt_at(patch, 11, signal.SIGINT)
        with pytest.raises(InterruptedRunError):
            start(config, tmp_path / "data", runs, "stopped")
    resume(tmp_path / "data", runs / "stopped")
    check_same_run(runs / "stopped", runs / "whole", same_log=False)


def test_more_batches_per_step_than_a_pass_has_are_refused(tmp_path: Path) -> None:
    """A step would go through all sessions more than once, and an epoch would hardly end."""
    write_generated(tmp_path / "data", 45)
    config = write_config(tmp_path, accumulate_batches=7)
    with pytest.raises(InputError) as caught:
        start(config, tmp_path / "data", tmp_path / "runs", "run")
    assert str(caught.value) == (
        "accumulate_batches=7 is more than the 6 batches of train_batch_size=8 that the 45 "
        "training sessions make; lower it to at most 6, or lower train_batch_size"
    )
    assert not (tmp_path / "runs" / "run").exists()
