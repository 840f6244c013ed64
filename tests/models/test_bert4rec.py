"""BERT4Rec: the network, compared with torch's own transformer, and its training.

Shapes: N packed events, P of them with a target, B rows, W their window, D width.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.bert4rec import BLOCKS, ITEMS, LENGTH, MASK, cloze, make_model
from helpers.datasets import random_sessions, write_dataset
from helpers.networks import make_config, name_in_ours
from helpers.runs import (
    check_same_run,
    die_in_step,
    in_process,
    interrupt_at,
    resume,
    start,
    start_or_resume,
    write_config,
)
from helpers.steps import position_loss
from torch import nn

from tron_cli.data.batches import Batch
from tron_cli.models.base import build_model
from tron_cli.models.bert4rec import BERT4Rec
from tron_cli.sampling.negatives import Distribution, Negatives, sample_negatives
from tron_cli.training.loop import InterruptedRunError
from tron_cli.training.step import training_loss

STYLES = ("eventwise", "sessionwise", "batchwise")


def torch_encoder(model: BERT4Rec, block: str) -> nn.TransformerEncoder:
    """torch's encoder with the model's weights, in float64 and without dropout."""
    pre = block == "pre-norm"
    inner = model.blocks[0].feed_forward[0].out_features
    layer = nn.TransformerEncoderLayer(
        model.embedding_dim, 2, inner, dropout=0.0, activation="relu" if pre else "gelu",
        batch_first=True, norm_first=pre, layer_norm_eps=1e-5 if pre else 1e-12,
    )  # fmt: skip
    norm = nn.LayerNorm(model.embedding_dim) if pre else None
    encoder = nn.TransformerEncoder(layer, 2, norm=norm, enable_nested_tensor=False).double()
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.copy_(ours[name_in_ours(name)])
    return encoder


@pytest.mark.parametrize("positions", ["end", "start", "none"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("key_padding_mask", [True, False])
def test_hidden_states_are_those_of_torchs_encoder_in_both_directions(
    positions: str, block: str, key_padding_mask: bool, rng: np.random.Generator
) -> None:
    """Without key_padding_mask padding is attended to, zero at the input of every layer."""
    model = make_model(positions, block, key_padding_mask=key_padding_mask).double()
    batch = cloze(random_sessions(rng, 12, ITEMS))
    table_VD = model.item_embedding.weight.detach().clone().requires_grad_()
    window = LENGTH + 1
    missing_B1 = window - batch.lengths_B[:, None]
    # Padding in front with positions="end", else behind.
    if positions == "end":
        is_real_BW = torch.arange(window) >= missing_B1
    else:
        is_real_BW = torch.arange(window) < batch.lengths_B[:, None]
    inputs_BW = torch.zeros(is_real_BW.shape, dtype=torch.int64)
    inputs_BW[is_real_BW] = batch.inputs_N
    x_BWD = table_VD[inputs_BW]
    if block == "pre-norm":
        x_BWD = x_BWD * math.sqrt(8)
    if positions != "none":
        x_BWD = x_BWD + model.position_embedding.weight
    if block == "post-norm":
        normed = model.input_norm
        x_BWD = nn.functional.layer_norm(x_BWD, (8,), normed.weight, normed.bias, 1e-12)
    encoder = torch_encoder(model, block)
    final_norm = encoder.norm or nn.Identity()
    final_norm.load_state_dict(model.norm.state_dict())
    for layer in encoder.layers:
        hidden = ~is_real_BW if key_padding_mask else None
        x_BWD = layer(x_BWD * is_real_BW[:, :, None], src_key_padding_mask=hidden)
    expected_ND = final_norm(x_BWD)[is_real_BW]
    found_ND = model(batch)
    torch.testing.assert_close(found_ND, expected_ND, rtol=0, atol=1e-10)
    weights_ND = torch.randn_like(expected_ND)
    (found,) = torch.autograd.grad((found_ND * weights_ND).sum(), model.item_embedding.weight)
    (expected,) = torch.autograd.grad((expected_ND * weights_ND).sum(), table_VD)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("reuse", [True, False])
def test_the_head_is_the_originals(block: str, reuse: bool, rng: np.random.Generator) -> None:
    """FeiSun/BERT4Rec's get_masked_lm_output on the states of a model without a head."""
    plain = make_model(block=block, output_bias=True, reuse_item_embeddings=reuse).double()
    changes = {"output_bias": True, "reuse_item_embeddings": reuse, "prediction_head": True}
    model = make_model(block=block, **changes).double()
    (_, dense, _, norm) = (each for each in model.norm.modules() if not list(each.children()))
    assert isinstance(dense, nn.Linear)
    assert isinstance(norm, nn.LayerNorm)
    of_both = {name: value for name, value in model.state_dict().items() if "norm." not in name[:5]}
    plain.load_state_dict({**plain.state_dict(), **of_both})
    plain.norm.load_state_dict(model.norm[0].state_dict())
    batch = cloze(random_sessions(rng, 12, ITEMS))
    states_ND = plain(batch)[:, :8].detach()
    # gelu(x W + b) by the error function, normalized with an epsilon of 1e-12; then scores of the
    # items with a bias each.
    x_ND = states_ND @ dense.weight.T + dense.bias
    x_ND = x_ND * 0.5 * (1.0 + torch.erf(x_ND / math.sqrt(2.0)))
    centred_ND = x_ND - x_ND.mean(dim=1, keepdim=True)
    deviation_N1 = (centred_ND.square().mean(dim=1, keepdim=True) + 1e-12).sqrt()
    x_ND = centred_ND / deviation_N1 * norm.weight + norm.bias
    expected_NV = x_ND @ model.item_table[:, :8].T + model.item_table[:, 8]
    found_NV = model(batch) @ model.item_table.T
    torch.testing.assert_close(found_NV, expected_NV, rtol=0, atol=1e-10)


@pytest.mark.parametrize("initialization", ["default", "normal"])
def test_a_head_begins_as_in_the_original(initialization: str) -> None:
    config = make_config(
        model="bert4rec", prediction_head=True, output_bias=True, initialization=initialization,
        embedding_dim=64, num_heads=1,
    )  # fmt: skip
    model = build_model(config, 500)
    assert isinstance(model, BERT4Rec)
    assert not model.item_table[:, 64].any()
    assert model.item_table[:, :64].all(dim=1).all()
    dense = model.norm[1][0]
    if initialization == "normal":
        assert float(dense.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert not dense.bias.any()
    with torch.device("meta"):  # as checkpoints are loaded
        assert build_model(config, 500).state_dict().keys() == model.state_dict().keys()


def test_without_a_head_nothing_is_named_otherwise_than_before() -> None:
    """Checkpoints from before there was one have no such setting, and load."""
    names = set(make_model().state_dict())
    assert {name for name in names if name.startswith("norm")} == {"norm.weight", "norm.bias"}
    assert not [name for name in make_model(block="post-norm").state_dict() if name[:4] == "norm"]
    head = make_model(block="post-norm", prediction_head=True)
    assert len(head.state_dict()) == len(make_model(block="post-norm").state_dict()) + 4


def test_one_row_does_not_serve_all_and_steps_are_not_recorded() -> None:
    for positions in ("end", "start", "none"):
        model = make_model(positions)
        assert (model.one_row_serves_all, model.fixed_shapes) == (False, False)
        assert model.mask_item == MASK
        assert len(model.item_table) == len(model.item_embedding.weight) == ITEMS + 2


def by_hand(model: BERT4Rec, batch: Batch, negatives: Negatives, config: Any) -> torch.Tensor:
    """The loss, target by target, with whole tables."""
    hidden_ND = model(batch)
    table, inputs, total = model.item_table, batch.inputs_N.tolist(), 0.0
    for number, (event, target) in enumerate(
        zip(batch.predicting_P.tolist(), batch.targets_N.tolist(), strict=True)
    ):
        row = int(batch.rows_N[event])
        index = {"eventwise": number, "sessionwise": row, "batchwise": None}[config.sampling_style]
        drawn = negatives.uniform if index is None else negatives.uniform[index]
        keep = negatives.uniform_keep
        items = drawn.tolist() if keep is None or keep[index or 0] else []
        keep_BM = negatives.in_batch_keep_BM
        items += [
            inputs[other]
            for place, other in enumerate(negatives.in_batch_BM[row].tolist())
            if keep_BM is None or keep_BM[row, place]
        ]
        items = [item for item in items if item != target]
        logits = table[torch.tensor(items, dtype=torch.int64)] @ hidden_ND[event]
        if config.topk_sampling:
            logits = logits.topk(min(config.topk_sampling_k, len(items))).values
        total = total + position_loss(table[target] @ hidden_ND[event], logits, config)
    return total / len(batch.targets_N)


@pytest.mark.parametrize("num_items", [ITEMS, 2000])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("reuse", [True, False])
def test_loss_and_gradients_of_looked_up_rows_are_those_of_whole_tables(
    num_items: int, style: str, reuse: bool
) -> None:
    """Some events have a target and the others have none."""
    rng = np.random.default_rng(num_items)
    rows = random_sessions(rng, 8, num_items)
    for optimizer, loss, (topk, rejects) in zip(
        ("row_adam", "adam", "adagrad", "row_adam"),
        ("ssm", "bce", "bpr-max", "ssm"),
        itertools.product((False, True), repeat=2),
        strict=True,
    ):
        config = make_config(
            model="bert4rec", optimizer=optimizer, loss=loss, sampling_style=style,
            reuse_item_embeddings=reuse, topk_sampling=topk, topk_sampling_k=4,
            output_bias=topk, bpr_penalty=0.2, num_batch_negatives=3,
            reject_in_batch_items=rejects, reject_uniform_session_items=rejects,
        )  # fmt: skip
        torch.manual_seed(5)
        model = build_model(config, num_items).double()
        batch = cloze(rows, num_items=num_items, seed=len(loss))
        assert 0 < len(batch.targets_N) < len(batch.inputs_N)
        distribution = Distribution(num_items)
        torch.manual_seed(11)
        negatives = sample_negatives(
            batch,
            distribution,
            num_uniform=config.num_uniform_negatives,
            num_batch=config.num_batch_negatives,
            sampling_style=style,
            reject_uniform_session_items=rejects,
            reject_in_batch_items=rejects,
        )
        expected = by_hand(model, batch, negatives, config)
        names, weights = zip(*model.named_parameters(), strict=True)
        theirs = torch.autograd.grad(expected, weights)
        torch.manual_seed(11)
        found = training_loss(model, batch, config, distribution)
        found.backward()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        for name, parameter, gradient in zip(names, weights, theirs, strict=True):
            torch.testing.assert_close(
                parameter.grad.to_dense(), gradient, rtol=0, atol=1e-9,
                msg=lambda text, n=name: f"{n}: {text}",
            )  # fmt: skip


@pytest.mark.parametrize("reuse", [True, False])
def test_cross_entropy_is_among_the_items(reuse: bool, rng: np.random.Generator) -> None:
    """Not with the mask, whose row learns as an input only."""
    config = make_config(
        model="bert4rec", loss="ce", num_uniform_negatives=0, num_batch_negatives=0,
        reuse_item_embeddings=reuse,
    )  # fmt: skip
    torch.manual_seed(5)
    model = build_model(config, ITEMS).double()
    batch = cloze(random_sessions(rng, 8, ITEMS))
    logits_PI = model(batch)[batch.predicting_P] @ model.item_table[1 : ITEMS + 1].T
    expected = nn.functional.cross_entropy(logits_PI, batch.targets_N - 1)
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    found = training_loss(model, batch, config, Distribution(ITEMS))
    found.backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    for parameter, gradient in zip(model.parameters(), theirs, strict=True):
        torch.testing.assert_close(parameter.grad.to_dense(), gradient, rtol=0, atol=1e-9)
    assert bool(model.item_table.grad[MASK].any()) == reuse


RUN = {"model": "bert4rec", "mask_probability": 0.3, "optimizer": "row_adam"}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    rng = np.random.default_rng(5)
    splits = {name: random_sessions(rng, 45, 30) for name in ("train", "val", "test")}
    write_dataset(tmp_path / "data", **splits, num_items=30)
    return tmp_path / "data"


@pytest.mark.parametrize("step", [1, 7, 17])
def test_stopped_and_resumed_ends_the_same(
    step: int, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, save_every=0, **RUN)
    start(config, data_dir, tmp_path / "runs", "whole")
    interrupt_at(monkeypatch, step, 15)
    with pytest.raises(InterruptedRunError):
        start(config, data_dir, tmp_path / "runs", "stopped")
    monkeypatch.undo()
    resume(data_dir, tmp_path / "runs" / "stopped")
    check_same_run(tmp_path / "runs" / "stopped", tmp_path / "runs" / "whole", same_log=False)


@pytest.mark.slow
def test_killed_and_resumed_ends_the_same(data_dir: Path, tmp_path: Path) -> None:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs processes that can be killed")
    context = multiprocessing.get_context("forkserver")
    config = write_config(tmp_path, **RUN)  # saved after steps 4, 6, 8, 12, 16 and 18
    start(config, data_dir, tmp_path / "runs", "whole")
    run_dir = tmp_path / "runs" / "killed"
    assert in_process(context, die_in_step, 11, config, data_dir, run_dir) == -9
    start_or_resume(config, data_dir, run_dir)
    check_same_run(run_dir, tmp_path / "runs" / "whole")


def test_one_pass_is_refused(
    command: Callable[..., tuple[int, str, str]], data_dir: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, **{**RUN, "max_epochs": 1})
    place = ["--data-dir", data_dir, "--device", "cpu"]
    code, out, _ = command("train", "--config", config, "--output-dir", tmp_path / "runs", *place)
    assert code == 0
    best = out.split()[-1]
    lists = tmp_path / "run.txt"
    code, out, err = command("evaluate", best, *place, "--one-pass", "--run", lists)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert "--one-pass does not apply to model=bert4rec" in err
    assert not lists.exists()
    assert command("compare", best, best, *place, "--one-pass")[0] == 2  # it has no such option
    code, out, _ = command("evaluate", best, *place, "--full-sessions", "--json")
    assert code == 0
    assert "each event from its own history" in out
