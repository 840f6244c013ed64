"""Decoupled weight decay against loops in float64, and in whole trainings."""

from __future__ import annotations

import copy
import operator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import random_sessions, tiny_settings, write_dataset
from helpers.gradients import random_rows, sparse_gradient, table
from helpers.runs import check_same_run, interrupt_at, resume, start, write_config

from tron_cli.checkpoint import load_checkpoint
from tron_cli.config import ExperimentConfig
from tron_cli.data.dataset import Dataset
from tron_cli.errors import InputError
from tron_cli.models.base import build_model
from tron_cli.training.loop import InterruptedRunError
from tron_cli.training.optim import build_optimizer, catch_up_all, optimizer_of, set_rate


class DenseAdamW:
    """Adam with decoupled weight decay in float64 (Loshchilov and Hutter, 2019, algorithm 2)."""

    def __init__(self, weights: np.ndarray, decays: np.ndarray | float) -> None:
        self.weights = weights.astype(np.float64)
        self.decays = decays
        self.mean, self.square = np.zeros((2, *weights.shape))
        self.steps = 0

    def step(self, gradient: np.ndarray, lr: float) -> None:
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient.astype(np.float64) ** 2
        mean, square = self.mean / (1 - 0.9**self.steps), self.square / (1 - 0.999**self.steps)
        move = lr * mean / (np.sqrt(square) + 1e-8)
        self.weights = self.weights * (1 - lr * self.decays) - move


def rate_of(step: int) -> float:
    return 0.01 * (1 + step % 3)


def test_adam_decays_matrices_but_no_vectors_nor_the_biases_of_a_table() -> None:
    rng = np.random.default_rng(0)
    parameters = [table(rng, 5, 4), table(rng, 6), table(rng, 7, 3)]
    decays: list[Any] = [0.3, 0.0, np.array([0.3, 0.3, 0.0])]
    oracles = [
        DenseAdamW(weights.detach().numpy(), decay)
        for weights, decay in zip(parameters, decays, strict=True)
    ]
    optimizer = build_optimizer("adam", parameters, 9.0, weight_decay=0.3, bias_table=parameters[2])
    for step in range(60):
        set_rate(optimizer, rate_of(step))
        for weights, oracle in zip(parameters, oracles, strict=True):
            gradient = rng.standard_normal(weights.shape).astype(np.float32)
            weights.grad = torch.from_numpy(gradient)
            oracle.step(gradient, rate_of(step))
        optimizer.step()
    for weights, oracle in zip(parameters, oracles, strict=True):
        np.testing.assert_allclose(weights.detach().numpy(), oracle.weights, rtol=1e-5, atol=1e-5)


def test_adam_with_decay_has_the_bits_of_torchs_adamw() -> None:
    rng = np.random.default_rng(1)
    ours = [table(rng, 50, 7), table(rng, 4, 4)]
    theirs = copy.deepcopy(ours)
    optimizer = build_optimizer("adam", ours, lr=0.01, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, fused=True)
    for step in range(30):
        set_rate(optimizer, rate_of(step))
        reference.param_groups[0]["lr"] = rate_of(step)
        for weights, twin in zip(ours, theirs, strict=True):
            weights.grad = torch.randn(weights.shape)
            twin.grad = weights.grad.clone()
        optimizer.step()
        reference.step()
        assert all(map(torch.equal, ours, theirs))


def test_a_step_that_a_scaler_skips_decays_nothing() -> None:
    """In fp16 training the first steps overflow."""
    rng = np.random.default_rng(2)
    parameters = [table(rng, 5, 4), table(rng, 7, 3)]
    before = copy.deepcopy(parameters)
    optimizer = build_optimizer(
        "adam", parameters, lr=0.1, weight_decay=0.5, bias_table=parameters[1]
    )
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    loss = scaler.scale(sum((weights * torch.inf).sum() for weights in parameters))
    loss.backward()
    scaler.step(optimizer)
    assert all(map(torch.equal, parameters, before))


@pytest.mark.parametrize("model", ["sasrec", "gsasrec", "bert4rec", "gru4rec"])
@pytest.mark.parametrize("reuse", [True, False])
def test_decay_reaches_all_of_a_network_but_biases_and_norms(model: str, reuse: bool) -> None:
    """Gradients of zero, so that a step is the decay alone."""
    config = ExperimentConfig(
        **tiny_settings(
            model=model, optimizer="adam", weight_decay=0.5, lr=0.1, output_bias=True,
            reuse_item_embeddings=reuse,
        )
    )  # fmt: skip
    network = build_model(config, num_items=9)
    with torch.no_grad():
        for weights in network.parameters():
            weights.fill_(1.0)
    optimizer = optimizer_of(config, network)
    for weights in network.parameters():
        weights.grad = torch.zeros_like(weights)
    optimizer.step()
    for name, weights in network.named_parameters():
        if "bias" in name or "norm" in name:
            assert (weights == 1).all(), name
        elif weights is network.item_table:
            assert (weights[:, -1] == 1).all(), name
            assert (weights[:, :-1] == 0.95).all(), name
        else:
            assert (weights == 0.95).all(), name


def test_row_adam_decays_rows_and_dense_matrices_but_no_vectors_nor_what_has_no_gradient() -> None:
    rng = np.random.default_rng(3)
    rows_only, dense, vector, idle = (
        table(rng, 9, 4),
        table(rng, 5, 4),
        table(rng, 3),
        table(rng, 2, 2),
    )
    oracles = [
        DenseAdamW(weights.detach().numpy(), decay)
        for weights, decay in ((rows_only, 0.4), (dense, 0.4), (vector, 0.0))
    ]
    before = idle.detach().clone()
    optimizer = build_optimizer("row_adam", [dense, rows_only, vector, idle], 9.0, weight_decay=0.4)
    for step in range(40):
        set_rate(optimizer, rate_of(step))
        rows, values = random_rows(rng, (9, 4), int(rng.integers(0, 4)))
        rows_only.grad = sparse_gradient(rows, values, rows_only.shape)
        for weights in (dense, vector):
            weights.grad = torch.from_numpy(rng.standard_normal(weights.shape).astype(np.float32))
        optimizer.step()
        for weights, oracle in zip((rows_only, dense, vector), oracles, strict=True):
            gradient = weights.grad.to_dense() if weights is rows_only else weights.grad
            oracle.step(gradient.numpy(), rate_of(step))
        if step % 7 == 4 or step == 39:
            catch_up_all(optimizer)
            for weights, oracle in zip((rows_only, dense, vector), oracles, strict=True):
                found = weights.detach().numpy()
                np.testing.assert_allclose(found, oracle.weights, rtol=1e-5, atol=1e-5)
    assert torch.equal(idle, before)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_vectors_have_nothing_to_catch_up_on_a_device_that_is_never_waited_for(
    weight_decay: float,
) -> None:
    weights = [table(np.random.default_rng(5), 4), table(np.random.default_rng(5), 4, 3)]
    before = [each.detach().clone() for each in weights]
    optimizer = build_optimizer("row_adam", weights, 0.1, weight_decay=weight_decay)
    optimizer.leaves_out_rows = False
    for each in weights:
        each.grad = torch.ones_like(each)
    optimizer.step()
    catch_up_all(optimizer)
    for each, old, decay in zip(weights, before, (0.0, weight_decay), strict=True):
        torch.testing.assert_close(each.detach(), old * (1 - 0.1 * decay) - 0.1)


def test_row_adam_without_decay_has_the_state_of_earlier_versions() -> None:
    weights = table(np.random.default_rng(4), 5, 2)
    state = build_optimizer("row_adam", [weights], 0.1).state_dict()
    assert state.keys() == {"steps", "state", "moves"}
    assert state["state"][0].keys() == {"mean", "square", "touched", "moved"}


def write_generated(folder: Path) -> Dataset:
    rng = np.random.default_rng(10)
    sessions = [random_sessions(rng, count, 300) for count in (45, 20)]
    return write_dataset(folder, train=sessions[0], val=sessions[1], num_items=300)


@pytest.mark.parametrize("shares", [True, False])
def test_a_run_of_row_adam_decays_as_one_of_adam(
    shares: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last.pt, written while most rows slept, evaluates with their decay and stays as it is."""
    write_generated(tmp_path / "data")
    models = []
    for optimizer in ("row_adam", "adam"):
        config = write_config(
            tmp_path, optimizer=optimizer, weight_decay=2.0, lr=1e-2, save_every=0,
            reuse_item_embeddings=shares,
        )  # fmt: skip
        with monkeypatch.context() as patch:
            interrupt_at(patch, 11, 15)
            with pytest.raises(InterruptedRunError):
                start(config, tmp_path / "data", tmp_path / "runs", optimizer)
        last = load_checkpoint(tmp_path / "runs" / optimizer / "last.pt")
        models.append(last.build_model(torch.device("cpu")))
        again = last.build_model(torch.device("cpu"))
        assert all(map(torch.equal, models[-1].parameters(), again.parameters()))
    for name in ("item_table", "item_embedding.weight", "blocks.0.feed_forward.0.weight"):
        ours, dense = (operator.attrgetter(name)(model) for model in models)
        torch.testing.assert_close(ours, dense, rtol=1e-3, atol=1e-3)


def test_auto_takes_adam_for_the_biases_of_a_large_table(tmp_path: Path) -> None:
    """12,000 items would have row_adam, whose rows decay as a whole."""
    rows = random_sessions(np.random.default_rng(13), 40, 12_000)
    write_dataset(tmp_path / "data", train=rows, num_items=12_000)
    for output_bias, expected in ((True, "adam"), (False, "row_adam")):
        config = write_config(
            tmp_path, optimizer="auto", weight_decay=0.1, output_bias=output_bias, max_epochs=1
        )
        best = start(config, tmp_path / "data", tmp_path / "runs", expected)
        assert load_checkpoint(best).config.optimizer == expected
    with pytest.raises(InputError, match=r"output_bias=True, .* add optimizer=adam$"):
        ExperimentConfig(**tiny_settings(optimizer="row_adam", weight_decay=0.1, output_bias=True))


def test_a_decay_of_a_tenth_in_each_step_is_refused() -> None:
    with pytest.raises(InputError, match=r"lr=0\.01 and weight_decay=10 would take a tenth"):
        ExperimentConfig(**tiny_settings(lr=0.01, weight_decay=10))


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adam", "output_bias": True},
        {"optimizer": "row_adam", "reuse_item_embeddings": False},
        {"optimizer": "row_adam", "clip_norm": 0.5},
    ],
)
def test_a_run_with_decay_stopped_and_resumed_ends_with_the_same_bits(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_generated(tmp_path / "data")
    config = write_config(tmp_path, weight_decay=0.1, save_every=0, **changes)
    runs = tmp_path / "runs"
    start(config, tmp_path / "data", runs, "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 11, 15)
        with pytest.raises(InterruptedRunError):
            start(config, tmp_path / "data", runs, "stopped")
    resume(tmp_path / "data", runs / "stopped")
    check_same_run(runs / "stopped", runs / "whole", same_log=False)
