"""States of optimizers: saved, loaded, resumed, evaluated and refused; the choice of auto."""

from __future__ import annotations

import copy
import io
import json
import logging
import operator
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import random_sessions, write_dataset
from helpers.gradients import (
    random_rows,
    sparse_gradient,
    table,
)
from helpers.runs import check_same_run, interrupt_at, resume, same_values, start, write_config
from torch import nn

from tron_cli.checkpoint import best_checkpoint, load_checkpoint
from tron_cli.data.dataset import Dataset
from tron_cli.errors import InputError
from tron_cli.evaluation.evaluate import EvaluationOptions, assess
from tron_cli.training.loop import InterruptedRunError
from tron_cli.training.optim import (
    build_optimizer,
)

CPU = torch.device("cpu")
CATALOGUE = {
    "loss": "ce", "num_uniform_negatives": 0, "num_batch_negatives": 0, "topk_sampling": False,
}  # fmt: skip


def write_generated(folder: Path) -> Dataset:
    """Write 45 training sessions over 300 items: most rows of a table sleep in a step."""
    rng = np.random.default_rng(10)
    return write_dataset(
        folder,
        train=random_sessions(rng, 45, 300),
        val=random_sessions(rng, 20, 300),
        num_items=300,
    )


@pytest.mark.parametrize("name", ["adam", "row_adam", "adagrad"])
def test_a_saved_state_goes_on_with_the_same_bits(name: str) -> None:
    """Through a file, into a fresh optimizer; what was saved is a copy."""

    def gradients(weights: list[nn.Parameter], step: int) -> None:
        rng = np.random.default_rng([8, step])
        rows, values = random_rows(rng, (20, 3), 7)
        sparse = sparse_gradient(rows, values, weights[0].shape)
        weights[0].grad = sparse.to_dense() if name == "adam" else sparse
        weights[1].grad = torch.from_numpy(rng.standard_normal(6).astype(np.float32))

    rng = np.random.default_rng(9)
    whole = [table(rng, 20, 3), table(rng, 6)]
    optimizer = build_optimizer(name, whole, lr=0.1)
    for step in range(11):
        gradients(whole, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [weights.detach() for weights in whole]], file)
    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    resumed = [nn.Parameter(value) for value in values]
    second = build_optimizer(name, resumed, lr=0.1)
    second.load_state_dict(state)
    for step in range(11, 40):
        for weights, one in ((whole, optimizer), (resumed, second)):
            gradients(weights, step)
            one.step()
    assert all(map(torch.equal, whole, resumed))
    steps = [each.state_dict()["steps"] for each in (optimizer, second)]
    assert [count.unique().tolist() for count in steps] == [[40], [40]]


@pytest.mark.parametrize("step", [5, 13])
def test_a_run_with_row_adam_stopped_and_resumed_ends_with_the_same_bits(
    step: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_generated(tmp_path / "data")
    config = write_config(
        tmp_path, optimizer="row_adam", save_every=0, clip_norm=0.5, reuse_item_embeddings=False
    )
    start(config, tmp_path / "data", tmp_path / "runs", "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, 15)
        with pytest.raises(InterruptedRunError):
            start(config, tmp_path / "data", tmp_path / "runs", "stopped")
    resume(tmp_path / "data", tmp_path / "runs" / "stopped")
    check_same_run(tmp_path / "runs" / "stopped", tmp_path / "runs" / "whole", same_log=False)


def test_a_state_with_clocks_of_floats_goes_on() -> None:
    """Earlier checkpoints have such states."""
    rng = np.random.default_rng(31)
    ours = table(rng, 20, 3)
    theirs = nn.Parameter(ours.detach().clone())
    optimizer, resumed = (build_optimizer("row_adam", [each], lr=0.1) for each in (ours, theirs))
    for step in range(40):
        if step == 15:
            saved = copy.deepcopy(optimizer.state_dict())
            saved["steps"] = saved["steps"].double()
            saved["state"][0]["touched"] = saved["state"][0]["touched"].float()
            resumed.load_state_dict(saved)
            theirs.data.copy_(ours.detach())
        rows, values = random_rows(rng, (20, 3), 7)
        ours.grad = sparse_gradient(rows, values, ours.shape)
        optimizer.step()
        if step >= 15:
            theirs.grad = sparse_gradient(rows, values, ours.shape)
            resumed.step()
    assert torch.equal(ours, theirs)
    assert resumed.steps == 40
    assert resumed.steps.dtype == resumed.state[theirs]["touched"].dtype == torch.int64


@pytest.mark.parametrize("shares", [True, False])
def test_a_run_stopped_within_an_epoch_evaluates_with_the_weights_of_dense_adam(
    shares: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most rows sleep when last.pt is written, which keeps them as they are to be resumed."""
    data = write_generated(tmp_path / "data")
    reports, models = [], []
    for optimizer in ("row_adam", "adam"):
        config = write_config(
            tmp_path, optimizer=optimizer, save_every=0, reuse_item_embeddings=shares
        )
        with monkeypatch.context() as patch:
            interrupt_at(patch, 11, signal.SIGINT)
            with pytest.raises(InterruptedRunError):
                start(config, tmp_path / "data", tmp_path / "runs", optimizer)
        last = load_checkpoint(tmp_path / "runs" / optimizer / "last.pt")
        assert last.step == 11
        models.append(last.build_model(torch.device("cpu")))
        options = EvaluationOptions(split="val", metrics="R@5 RR@100")
        reports.append(assess(last, data, options, torch.device("cpu"))["metrics"])
        if optimizer == "row_adam":
            table = models[0].item_table.detach()
            behind = (table != last.weights["item_embedding.weight"]).any(dim=1)
            assert behind.sum() > 100 or not shares
    for name in ("item_table", "item_embedding.weight"):  # a bias of keys follows its roundings
        # Moves left out are of 1e-2; where gradients cancel, roundings of the two show.
        ours, dense = (operator.attrgetter(name)(model) for model in models)
        torch.testing.assert_close(ours, dense, rtol=1e-4, atol=3e-4)
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("num_items", "changes", "expected"),
    [
        (30, {}, "adam"),
        (12_000, {}, "row_adam"),
        # As large a table of which a step asks for many rows: 400 of each event, or all.
        (12_000, {"sampling_style": "eventwise", "num_uniform_negatives": 400}, "adam"),
        (12_000, CATALOGUE, "adam"),
        (12_000, {**CATALOGUE, "reuse_item_embeddings": False}, "adam"),
        (12_000, {"optimizer": "adagrad"}, "adagrad"),
    ],
)
def test_auto_takes_the_faster_adam_says_so_and_keeps_to_it(
    num_items: int, changes: dict[str, Any], expected: str, tmp_path: Path, caplog: Any
) -> None:
    rng = np.random.default_rng(13)
    rows = random_sessions(rng, 40, num_items)
    write_dataset(tmp_path / "data", train=rows, num_items=num_items)
    config = write_config(tmp_path, **{"optimizer": "auto", "max_epochs": 1, **changes})
    with caplog.at_level(logging.INFO, "tron"):
        start(config, tmp_path / "data", tmp_path / "runs", "a")
    run = tmp_path / "runs" / "a"
    said = f"optimizer=auto: {expected}" in (run / "train.log").read_text()
    assert said == ("optimizer" not in changes)
    for file in run.glob("*.pt"):
        assert load_checkpoint(file).config.optimizer == expected
    assert json.loads((run / "config.json").read_text())["optimizer"] == expected
    # Another choice must be no choice of the resumed run: its state is that of the first.
    resume(tmp_path / "data", run, "max_epochs=2")
    assert load_checkpoint(run / "last.pt").config.optimizer == expected
    named = write_config(tmp_path, **{"max_epochs": 1, **changes, "optimizer": expected})
    start(named, tmp_path / "data", tmp_path / "runs", "b")
    short = load_checkpoint(best_checkpoint(tmp_path / "runs" / "b"))
    assert short.step == 5
    start(config, tmp_path / "data", tmp_path / "runs", "c")
    again = load_checkpoint(best_checkpoint(tmp_path / "runs" / "c"))
    assert all(torch.equal(values, again.weights[name]) for name, values in short.weights.items())


def old_form(name: str, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state as older versions saved it: one count of steps, or clocks of floats."""
    if name == "adam":
        return {**state, "steps": torch.tensor(int(state["steps"].max()))}
    if name == "adagrad":
        return {**state, "steps": state["steps"].double()}
    tensors = [{**each, "touched": each["touched"].float()} for each in state["state"]]
    return {"steps": state["steps"].double(), "state": tensors, "moves": state["moves"]}


@pytest.mark.parametrize("name", ["adam", "row_adam", "adagrad"])
def test_a_last_pt_of_an_older_version_evaluates_and_resumes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_generated(tmp_path / "data")
    config = write_config(tmp_path, optimizer=name, save_every=0, clip_norm=0.5)
    runs = tmp_path / "runs"
    start(config, tmp_path / "data", runs, "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 11, signal.SIGINT)
        with pytest.raises(InterruptedRunError):
            start(config, tmp_path / "data", runs, "stopped")
    last = runs / "stopped" / "last.pt"
    expected = load_checkpoint(last).build_model(CPU).state_dict()
    content = torch.load(last, weights_only=True)
    content["training"]["optimizer"] = old_form(name, content["training"]["optimizer"])
    torch.save(content, last)
    checkpoint = load_checkpoint(last)
    for _ in range(2):  # the second finds the same state as the first
        assert same_values(dict(checkpoint.build_model(CPU).state_dict()), dict(expected))
    resume(tmp_path / "data", runs / "stopped")
    check_same_run(runs / "stopped", runs / "whole", same_log=False)


def test_a_last_pt_with_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    write_generated(tmp_path / "data")
    config = write_config(tmp_path, optimizer="row_adam", max_epochs=1)
    start(config, tmp_path / "data", tmp_path / "runs", "a")
    last = tmp_path / "runs" / "a" / "last.pt"
    content = torch.load(last, weights_only=True)
    del content["training"]["optimizer"]["moves"]
    torch.save(content, last)
    says = r"a/last\.pt: .* is that of another optimizer"
    with pytest.raises(InputError, match=says):
        load_checkpoint(last).build_model(CPU)
    with pytest.raises(InputError, match=says):
        resume(tmp_path / "data", last.parent, "max_epochs=2")


def test_the_state_of_another_optimizer_is_refused():
    weights = torch.nn.Parameter(torch.zeros(3, 2))
    adagrad = build_optimizer("adagrad", [weights], lr=0.1).state_dict()
    optimizer = build_optimizer("adam", [weights], lr=0.1)
    for saved in (adagrad, {"state": {}, "param_groups": []}, []):
        with pytest.raises(InputError, match="that of another optimizer"):
            optimizer.load_state_dict(saved)


def test_the_state_of_other_parameters_is_refused():
    """A version of tron with the same tables in another order would have such a state."""
    one, two = torch.nn.Parameter(torch.zeros(5, 2)), torch.nn.Parameter(torch.zeros(3, 2))
    saved = build_optimizer("row_adam", [one, two], 0.1).state_dict()
    build_optimizer("row_adam", [one, two], 0.1).load_state_dict(saved)
    with pytest.raises(InputError, match=r"another version of tron; start a new run"):
        build_optimizer("row_adam", [two, one], 0.1).load_state_dict(saved)
    with pytest.raises(InputError, match="that of another optimizer"):
        build_optimizer("row_adam", [one, two], 0.1).load_state_dict(
            {**saved, "moves": torch.zeros(7)}
        )
