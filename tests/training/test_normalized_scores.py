"""score=cosine in training: steps beside the padded float64 reference, and what it refuses."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import random_sessions, write_dataset
from helpers.networks import build_pair, make_config, make_sessions
from helpers.runs import check_same_run, interrupt_at, resume, start, write_config
from helpers.steps import LENGTHS, step_of_both
from torch.nn import functional as F

from tron_cli.checkpoint import load_checkpoint
from tron_cli.data.batches import training_batch
from tron_cli.errors import InputError
from tron_cli.models.base import build_model
from tron_cli.registry import LOSSES, MODELS
from tron_cli.sampling.negatives import Distribution
from tron_cli.training.loop import InterruptedRunError
from tron_cli.training.step import training_loss

TABLES = ("item_embedding.weight", "output_embedding.weight")
# Negatives that every loss can have.
PLAIN = {"num_batch_negatives": 0, "reject_in_batch_items": False}


@pytest.mark.parametrize("optimizer", ["adam", "row_adam", "adagrad"])
@pytest.mark.parametrize("loss", ["bce", "bpr-max", "ssm"])
@pytest.mark.parametrize("style", ["eventwise", "sessionwise", "batchwise"])
def test_loss_and_gradients_are_those_of_the_reference(
    style: str, loss: str, optimizer: str
) -> None:
    """Every kind of table, with and without top-k; gradients of tables stay sparse."""
    for (reuse, bias, topk), learned, num_items in zip(
        itertools.product([False, True], repeat=3),
        itertools.cycle([True, False, False]),
        itertools.cycle([45, 2000]),
        strict=False,
    ):
        config = make_config(
            score="cosine",
            score_scale=5.0,
            learn_score_scale=learned,
            normalize_inputs=not learned,
            loss=loss,
            sampling_style=style,
            optimizer=optimizer,
            reuse_item_embeddings=reuse,
            output_bias=bias,
            topk_sampling=topk,
            topk_sampling_k=4,
            bpr_penalty=0.2,
        )
        ours, theirs, _, _ = step_of_both(config, num_items)
        assert ours.keys() == theirs.keys()
        assert ("log_score_scale" in ours) == learned
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient.to_dense(), theirs[name], rtol=0, atol=1e-9)
            assert gradient.is_sparse == (name in TABLES and optimizer != "adam"), name


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_cross_entropy_is_that_of_all_cosines(reuse: bool, bias: bool) -> None:
    config = make_config(
        loss="ce", num_uniform_negatives=0, num_batch_negatives=0, score="cosine",
        learn_score_scale=True, reuse_item_embeddings=reuse, output_bias=bias,
    )  # fmt: skip
    model, reference = build_pair(config, 45)
    batch = training_batch(make_sessions(LENGTHS, 45), np.arange(len(LENGTHS)), 6)
    training_loss(model, batch, config, Distribution(45)).backward()
    histories = [row.tolist() for row in batch.inputs_N.split(batch.lengths_B.tolist())]
    logits_NI = torch.cat(reference(histories)) @ reference.output_rows()[1:].T
    F.cross_entropy(logits_NI, batch.targets_N - 1).backward()
    ours = dict(model.named_parameters())
    for name, weights in reference.named_parameters():
        gradient = ours[reference.name_in_model(name)].grad
        torch.testing.assert_close(gradient, weights.grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("network", MODELS)
def test_scores_are_cosines_times_the_scale(network: str, bias: bool) -> None:
    """The lengths of embeddings have no effect, and every score is within the scale."""
    config = make_config(
        model=network,
        score="cosine",
        score_scale=3.0,
        output_bias=bias,
        reuse_item_embeddings=False,
    )
    torch.manual_seed(2)
    model = build_model(config, 30).double().eval()
    with torch.no_grad():
        model.item_table.copy_(torch.randn_like(model.item_table))
    batch = training_batch(make_sessions(LENGTHS, 30), np.arange(len(LENGTHS)), 6)

    def scores_NI() -> torch.Tensor:
        return (model(batch) @ model.scored_table()[1:].T).detach()

    before_NI = scores_NI()
    bias_I = model.item_table[1:31, 8] if bias else torch.zeros(30)
    assert ((before_NI - bias_I).abs() <= 3 + 1e-9).all()
    with torch.no_grad():
        model.item_table[:, :8] *= torch.rand(len(model.item_table), 1) + 0.1
    torch.testing.assert_close(scores_NI(), before_NI)


@pytest.mark.parametrize("loss", LOSSES)
def test_embeddings_and_states_of_zeros_are_finite(loss: str) -> None:
    config = make_config(score="cosine", loss=loss, normalize_inputs=True, **PLAIN)
    model = build_model(config, 20)
    batch = training_batch(make_sessions(LENGTHS, 20), np.arange(len(LENGTHS)), 6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    value = training_loss(model, batch, config, Distribution(20))
    value.backward()
    assert value.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("loss", ["ssm", "bpr-max"])
def test_bf16_autocast_stays_near_float32(loss: str) -> None:
    config = make_config(loss=loss, score="cosine", topk_sampling=True, topk_sampling_k=4)
    model = build_pair(config, 45)[0].float()
    batch = training_batch(make_sessions(LENGTHS, 45), np.arange(len(LENGTHS)), 6)
    found = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(training_loss(model, batch, config, Distribution(45)))
    assert found[1].dtype == torch.float32
    assert found[1].item() == pytest.approx(found[0].item(), rel=0.03)


@pytest.mark.parametrize("changes", [{"score_scale": 12.0}, {"learn_score_scale": True}])
def test_a_scale_without_effect_is_refused(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(InputError, match=rf"unlike score=cosine, but got {name}="):
        make_config(**changes)


@pytest.mark.parametrize("optimizer", ["adam", "row_adam", "adagrad"])
def test_an_interrupted_run_goes_on_with_the_learned_scale(
    optimizer: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir, runs = tmp_path / "data", tmp_path / "runs"
    write_dataset(data_dir, train=random_sessions(rng, 45, 30), val=random_sessions(rng, 9, 30))
    config = write_config(
        tmp_path, score="cosine", score_scale=9.0, learn_score_scale=True, optimizer=optimizer
    )
    start(config, data_dir, runs, "whole")
    interrupt_at(monkeypatch, 8, signal.SIGINT)
    with pytest.raises(InterruptedRunError):
        start(config, data_dir, runs, "stopped")
    monkeypatch.undo()
    resume(data_dir, runs / "stopped")
    check_same_run(runs / "stopped", runs / "whole", same_log=False)
    (scale,) = load_checkpoint(runs / "stopped" / "last.pt").weights["log_score_scale"].exp()
    assert scale > 0
    assert abs(scale - 9.0) > 1e-2


def test_weights_of_dot_products_start_no_training_by_cosine(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    write_dataset(tmp_path, train=random_sessions(rng, 20, 30), val=[[1, 2]])
    old = start(write_config(tmp_path, max_epochs=1), tmp_path, tmp_path / "runs", "old")
    config = write_config(tmp_path, max_epochs=1, score="cosine")
    with pytest.raises(InputError, match="was trained with score=dot, but the new run has score="):
        start(config, tmp_path, tmp_path / "runs", "new", init_from=old)
