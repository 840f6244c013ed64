"""Steps of fixed shapes, which a GPU can replay, against the steps that they stand for.

None of these tests needs CUDA; those that do are in test_cuda.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import pack_sessions
from helpers.fixed_shapes import CATALOGUE, ITEMS, LANES, build, settings, some_sessions, take
from helpers.recorders import CPU
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import Batch, training_batch
from tron_cli.sampling.negatives import Negatives, sample_negatives
from tron_cli.training import start
from tron_cli.training import step as training_steps
from tron_cli.training.feed import build_feed
from tron_cli.training.optim import build_optimizer, catch_up_all


def draw(batch: Batch, config: ExperimentConfig, num_items: int = ITEMS) -> Negatives:
    return sample_negatives(
        batch,
        start._distribution(config, some_sessions(), num_items, CPU),
        num_uniform=config.num_uniform_negatives,
        num_batch=config.num_batch_negatives,
        sampling_style=config.sampling_style,
        reject_uniform_session_items=config.reject_uniform_session_items,
        reject_in_batch_items=config.reject_in_batch_items,
    )


def padded_negatives(negatives: Negatives, events: int, padding: int) -> Negatives:
    """Those of events also for padding, which takes those of the first event."""

    def pad(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None or len(values) != events:
            return values
        return torch.cat([values, values[:1].repeat(padding, *[1] * (values.dim() - 1))])

    uniform = pad(negatives.uniform)
    assert uniform is not None
    return dataclasses.replace(
        negatives,
        uniform=uniform,
        uniform_keep=pad(negatives.uniform_keep),
        uniform_log_expected=pad(negatives.uniform_log_expected),
    )


# --- batches --------------------------------------------------------------------------------------


def test_a_padded_batch_holds_the_same_events_and_padding_of_item_zero() -> None:
    sessions = some_sessions()
    chosen = np.array([4, 0, 7, 7, 30])
    plain = training_batch(sessions, chosen, 6)
    padded = training_batch(sessions, chosen, 6, padded=True)
    events = len(plain.inputs_N)
    assert len(padded.inputs_N) == 128
    for name in ("inputs_N", "targets_N", "rows_N", "places_N"):
        values = getattr(padded, name)
        assert values[:events].tolist() == getattr(plain, name).tolist()
        assert values[events:].tolist() == [0] * (128 - events)
    assert padded.lengths_B.tolist() == plain.lengths_B.tolist()
    (group,) = padded.groups
    assert group.gather_RW.shape == (5, 6)
    assert group.keep is not None
    # Each event is found again at its place of the rows, and padding at the first.
    gathered = padded.inputs_N[group.gather_RW].flatten()[group.keep]
    assert gathered[:events].tolist() == padded.inputs_N[:events].tolist()
    assert group.keep[events:].tolist() == [0] * (128 - events)


def test_events_are_rounded_up_to_a_multiple_of_128() -> None:
    sessions = pack_sessions([[1] * 5] * 64)  # four inputs each
    assert len(training_batch(sessions, np.arange(32), 9, padded=True).inputs_N) == 128
    assert len(training_batch(sessions, np.arange(33), 9, padded=True).inputs_N) == 256


@pytest.mark.parametrize("padded", [False, True])
def test_one_piece_of_memory_holds_the_whole_batch(padded: bool) -> None:
    batch = training_batch(some_sessions(), np.arange(9), 6, padded=padded)
    whole = batch.in_one_piece(pinned=False)
    assert whole.memory is not None
    start = whole.memory.data_ptr()
    stop = start + whole.memory.nbytes
    pairs = [(getattr(batch, name), getattr(whole, name)) for name in (
        "inputs_N", "targets_N", "lengths_B", "rows_N", "places_N")]  # fmt: skip
    for group, other in zip(batch.groups, whole.groups, strict=True):
        assert (group.start, group.end) == (other.start, other.end)
        assert (group.keep is None) == (other.keep is None)
        pairs += [(group.gather_RW, other.gather_RW)]
        pairs += [] if group.keep is None else [(group.keep, other.keep)]
    for one, two in pairs:
        assert one.shape == two.shape
        assert one.tolist() == two.tolist()
        assert start <= two.data_ptr() < stop
    assert whole.padded is padded


# --- steps of fixed shapes ------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "row_adam", "adagrad"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "bpr-max", "bpr_penalty": 0.5, "clip_norm": 0.1, "positions": "start"},
        {"loss": "bce", "sampling_style": "eventwise", "topk_sampling": False,
         "reuse_item_embeddings": False, "reject_uniform_session_items": True},
        {"sampling_style": "sessionwise", "output_bias": True, "num_heads": 2,
         "mask_collisions": False, "num_batch_negatives": 0},
        {"num_uniform_negatives": 400},  # more ids than the table has rows
        {"num_uniform_negatives": 0, "num_batch_negatives": 30, "topk_sampling_k": 9},
        {"logq_correction": True, "topk_sampling": False, "sampling_style": "eventwise",
         "negative_sampler": "mixed"},
        CATALOGUE | {"loss": "ce", "reuse_item_embeddings": False, "output_bias": True},
        {"model": "gsasrec", "loss": "gbce", "sampling_style": "eventwise", "topk_sampling": False,
         "num_batch_negatives": 0},
        {"key_padding_mask": False, "block": "post-norm", "loss": "bpr"},
        {"score": "cosine", "learn_score_scale": True, "output_bias": True},
        {"relative_positions": True, "num_heads": 2},
    ],
    ids=["tron", "bpr-max", "eventwise", "sessionwise", "many", "in-batch", "logq", "ce", "gsasrec",
         "attended padding", "cosine", "relative"],
)  # fmt: skip
def test_a_padded_step_is_the_step(
    monkeypatch: pytest.MonkeyPatch, optimizer: str, changes: dict[str, Any]
) -> None:
    """Losses and, after three steps, weights are equal, given equal negatives."""
    config = settings(optimizer=optimizer, **changes)
    plain, padded = build(config), build(config)
    padded[1].leaves_out_rows = False
    sessions = some_sessions()
    given: list[Negatives] = []
    monkeypatch.setattr(training_steps, "sample_negatives", lambda *a, **k: given.pop())
    for step in range(3):
        chosen = np.arange(step, step + 8)
        batch = training_batch(sessions, chosen, config.sequence_length)
        events = len(batch.inputs_N)
        torch.manual_seed(step)
        negatives = draw(batch, config)
        other = training_batch(sessions, chosen, config.sequence_length, padded=True)
        assert events % 128
        given.append(negatives)
        loss = take(*plain, batch, config)
        given.append(padded_negatives(negatives, events, len(other.inputs_N) - events))
        padded_loss = take(*padded, other, config)
        torch.testing.assert_close(padded_loss, loss, rtol=1e-12, atol=0)
    for _, stepper in (plain, padded):
        catch_up_all(stepper)  # padding looks up row 0, whose decay is otherwise pending
    theirs = dict(plain[0].named_parameters())
    for name, weights in padded[0].named_parameters():
        # Adagrad makes moves of gradients that are zero but for rounding (those of key biases).
        torch.testing.assert_close(weights, theirs[name], rtol=0, atol=1e-7)
    states = (each[1].state.values() for each in (padded, plain))
    for one, two in zip(*states, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adam", "row_adam"])
def test_a_padded_step_with_weight_decay_is_the_step(
    monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    test_a_padded_step_is_the_step(monkeypatch, optimizer, {"weight_decay": 5.0})


@pytest.mark.parametrize("loss", ["ssm", "ce"])
def test_a_padded_step_of_prefixes_is_the_step(monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    config = settings(**(CATALOGUE if loss == "ce" else {}), loss=loss)
    plain, padded = build(config), build(config)
    batch, other = (
        training_batch(some_sessions(), np.arange(8), 6, padded=each, last_only=True)
        for each in (False, True)
    )
    torch.manual_seed(0)
    if loss == "ssm":
        negatives = draw(batch, config)
        monkeypatch.setattr(training_steps, "sample_negatives", lambda *a, **k: negatives)
    assert len(batch.targets_N) == len(other.targets_N) == 8
    expected = take(*plain, batch, config)
    torch.testing.assert_close(take(*padded, other, config), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("optimizer", ["row_adam", "adagrad"])
def test_rows_that_sleep_are_written_back_as_they_were(optimizer: str) -> None:
    """Row 0 several times and row 5 once, all without a gradient."""
    weights = torch.nn.Parameter(torch.arange(12.0).view(6, 2).double())
    stepper = build_optimizer(optimizer, [weights], lr=0.5)
    stepper.leaves_out_rows = False
    state = stepper.state[weights]
    for name in {"mean", "square"} & state.keys():
        state[name] += 0.25
    before = [weights.detach().clone(), *(values.clone() for values in state.values())]
    rows = torch.tensor([[2, 5, 0, 0, 0]])
    gradient = torch.zeros(5, 2, dtype=torch.float64)
    gradient[0, 1] = 1e-3
    weights.grad = torch.sparse_coo_tensor(rows, gradient, weights.shape, check_invariants=True)
    stepper.step()
    sleeping = [0, 1, 3, 4, 5]
    for now, then in zip([weights, *state.values()], before, strict=True):
        assert now[sleeping].tolist() == then[sleeping].tolist()
    assert weights[2, 1] < before[0][2, 1]


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("style", ["batchwise", "sessionwise", "eventwise"])
def test_padding_is_no_negative_and_rejects_nothing(style: str, last_only: bool) -> None:
    config = settings(sampling_style=style, reject_uniform_session_items=True,
                      num_uniform_negatives=2000, num_batch_negatives=60)  # fmt: skip
    num_items = 12
    sessions = pack_sessions([[1, 2, 3, 4], [5, 6, 7], [8, 9, 8, 9, 10]])
    batch = training_batch(sessions, np.arange(3), 6, padded=True, last_only=last_only)
    torch.manual_seed(0)
    negatives = draw(batch, config, num_items)
    rows = {0: {5, 6}, 1: {1, 2, 3}, 2: {8, 9}}
    every = set(range(1, num_items + 1))
    assert negatives.uniform_keep is None or negatives.uniform_keep.all()
    if style == "batchwise":
        assert set(negatives.uniform.tolist()) == every - set().union(*rows.values())
    elif style == "sessionwise":
        for row, rejected in rows.items():
            assert set(negatives.uniform[row].tolist()) == every - rejected
    else:
        for event, row in enumerate(batch.target_rows_P.tolist()[:9]):
            assert set(negatives.uniform[event].tolist()) == every - rows[row]
    # All occurrences of the other sessions, each once, and nothing else is kept.
    assert negatives.in_batch_keep_BM is not None
    occurrences = {0: [5, 6], 1: [1, 2, 3], 2: [8, 9, 8, 9]}
    for row in range(3):
        kept = negatives.in_batch_BM[row][negatives.in_batch_keep_BM[row]]
        others = [item for other in occurrences if other != row for item in occurrences[other]]
        assert sorted(batch.inputs_N[kept].tolist()) == sorted(others)


# --- nothing waits for the device -----------------------------------------------------------------


CHANGES_OF_SHAPES = [
    {"optimizer": "row_adam"},
    {"optimizer": "row_adam", "score": "cosine", "learn_score_scale": True,
     "normalize_inputs": True},
    {"optimizer": "adam", "clip_norm": 1.0},
    {"optimizer": "adagrad", "reuse_item_embeddings": False, "loss": "bpr-max"},
    {"optimizer": "row_adam", "sampling_style": "eventwise", "reject_uniform_session_items": True,
     "loss": "bce", "topk_sampling": False},
    {"optimizer": "row_adam", "sampling_style": "sessionwise", "reject_in_batch_items": False},
    {"optimizer": "row_adam", "negative_sampler": "popularity"},
    {"optimizer": "row_adam", "negative_sampler": "mixed", "sampling_style": "sessionwise",
     "reject_uniform_session_items": True, "loss": "bpr-max", "final_activation": True},
    {"optimizer": "adam", "negative_sampler": "popularity", "sampling_style": "eventwise",
     "reject_uniform_session_items": True, "loss": "bpr"},
    {"optimizer": "row_adam", "negative_sampler": "mixed", "logq_correction": True,
     "topk_sampling": False, "reject_in_batch_items": False},
    {"optimizer": "row_adam", "negative_sampler": "popularity", "logq_correction": True,
     "topk_sampling": False, "sampling_style": "eventwise"},
    CATALOGUE | {"optimizer": "adam", "loss": "ce"},
    CATALOGUE | {"optimizer": "row_adam", "loss": "ce", "reuse_item_embeddings": False},
    CATALOGUE | {"optimizer": "row_adam", "loss": "sce", "output_bias": True},
    CATALOGUE | {"optimizer": "adagrad", "loss": "sce", "sce_mix": True, "sce_bucket_items": 20,
                 "reuse_item_embeddings": False},
    {"optimizer": "row_adam", "model": "gsasrec", "loss": "gbce", "sampling_style": "eventwise",
     "topk_sampling": False, "num_batch_negatives": 0},
    {"optimizer": "row_adam", "model": "gsasrec", "key_padding_mask": False, "num_heads": 2},
    {"optimizer": "row_adam", "key_padding_mask": False, "positions": "none"},
    {"optimizer": "adam", "block": "post-norm", "activation": "gelu", "initialization": "normal",
     "key_padding_mask": False},
    {"optimizer": "adam", "block": "ligr", "activation": "swiglu", "feed_forward_dim": 12},
    {"optimizer": "row_adam", "relative_positions": True},
    {"optimizer": "row_adam", "block": "bsarec", "training_windows": "prefixes"},
    LANES | {"optimizer": "adagrad", "loss": "bpr-max", "output_bias": True},
    LANES | {"optimizer": "row_adam", "num_blocks": 2, "dropout_rate": 0.1,
             "reuse_item_embeddings": False},
    LANES | CATALOGUE | {"optimizer": "adam", "loss": "ce"},
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES_OF_SHAPES, ids=str)
def test_no_shape_of_a_step_depends_on_data(gpu_branches: None, changes: dict[str, Any]) -> None:
    """Fake tensors have shapes and no values: an operation that needs a value raises."""
    config = settings(**changes)
    model, optimizer = build(config)
    assert model.fixed_shapes
    optimizer.leaves_out_rows = False
    distribution = start._distribution(config, some_sessions(), ITEMS, CPU)
    batch = build_feed(config, some_sessions(), model, padded=True).batch(0)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        as_fake = {tensor: fake.from_tensor(tensor) for tensor in batch._tensors()}
        fake_batch = batch._over(torch.cat([as_fake[t].flatten() for t in batch._tensors()]))
        take(model, optimizer, fake_batch, config, distribution)


def test_the_check_of_shapes_finds_a_step_that_waits(gpu_branches: None) -> None:
    """Steps of the CPU do: their lookups ask how many ids are distinct."""
    config = settings(optimizer="row_adam")
    model, optimizer = build(config)
    batch = training_batch(some_sessions(), np.arange(8), config.sequence_length)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        memory = fake.from_tensor(batch.in_one_piece(pinned=False).memory)
        with pytest.raises(DynamicOutputShapeException):
            take(model, optimizer, batch._over(memory), config)
