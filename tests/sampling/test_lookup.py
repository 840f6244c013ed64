"""Lookups of a step have the loss and the gradients of a plain dense embedding.

The reference is that of test_training_step, padded, in float64, with whole tables and dense
gradients. Tables here have fewer rows than a step asks for (then a dense gradient needs no lookup),
or many more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from helpers.networks import make_config, make_sessions
from helpers.steps import LENGTHS, draw, step_of_both
from torch.utils._python_dispatch import TorchDispatchMode

from tron_cli.data.batches import Batch, training_batch
from tron_cli.models.base import build_model
from tron_cli.sampling.lookup import look_up, look_up_inputs
from tron_cli.sampling.negatives import Distribution, Negatives
from tron_cli.training.optim import build_optimizer, clip_gradients
from tron_cli.training.step import training_loss

OPTIMIZERS = ("row_adam", "adam", "adagrad")
STYLES = ("eventwise", "sessionwise", "batchwise")
TABLES = ("item_embedding.weight", "output_embedding.weight")


def make_batch(num_items: int, lengths: list[int] = LENGTHS, sequence_length: int = 6) -> Batch:
    sessions = make_sessions(lengths, num_items, seed=3)
    return training_batch(sessions, np.arange(len(lengths)), sequence_length)


@pytest.mark.parametrize("num_items", [45, 2000])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_loss_and_gradients_are_those_of_a_dense_embedding(
    optimizer: str, reuse: bool, style: str, num_items: int
) -> None:
    for (bias, topk), loss in zip(
        itertools.product([False, True], repeat=2),
        ("ssm", "bpr-max", "bpr-max", "ssm"),
        strict=True,
    ):
        config = make_config(
            optimizer=optimizer,
            reuse_item_embeddings=reuse,
            sampling_style=style,
            output_bias=bias,
            topk_sampling=topk,
            topk_sampling_k=4,
            loss=loss,
            bpr_penalty=0.2,
        )
        ours, theirs, batch, negatives = step_of_both(config, num_items)
        assert ours.keys() == theirs.keys()
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient.to_dense(), theirs[name], rtol=0, atol=1e-9)
            assert gradient.is_sparse == (name in TABLES and optimizer != "adam"), name
        check_rows(ours, batch, negatives, reuse=reuse)


def check_rows(
    gradients: dict[str, torch.Tensor], batch: Batch, negatives: Negatives, *, reuse: bool
) -> None:
    """Rows that the step does not need, the row of no item among them, have no gradient."""
    inputs = set(batch.inputs_N.tolist())
    scored = inputs | set(batch.targets_N.tolist()) | set(negatives.uniform.flatten().tolist())
    needed = dict(zip(TABLES, (scored, set()) if reuse else (inputs, scored), strict=True))
    for name in TABLES[: 1 if reuse else 2]:
        gradient = gradients[name]
        touched = gradient.to_dense().any(dim=1).nonzero()[:, 0].tolist()
        assert 0 not in touched
        assert set(touched) <= needed[name]
        if gradient.is_sparse:
            rows = gradient._indices()[0].tolist()
            assert len(set(rows)) == len(rows), "a row comes twice"
            assert rows == sorted(rows)
            assert set(rows) <= needed[name]


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("shape", ["batch", "sessions", "events", "none"])
def test_places_stand_for_the_ids(sparse: bool, shape: str) -> None:
    batch = make_batch(2000)
    sizes = {"batch": (9,), "sessions": (len(LENGTHS), 3), "none": (0,)}
    uniform = torch.randint(1, 2001, sizes.get(shape, (len(batch.inputs_N), 2)))
    uniform.flatten()[:4] = batch.targets_N[: uniform.numel()][:4]
    in_batch_BM = torch.randint(len(batch.inputs_N), (len(LENGTHS), 2))
    table_VD = torch.randn(2001, 3, requires_grad=True)
    looked = look_up(table_VD, batch, Negatives(uniform, None, in_batch_BM, None), sparse=sparse)
    assert looked.negatives.uniform.shape == uniform.shape
    assert looked.negatives.in_batch_BM is in_batch_BM
    for ids, place in (
        (batch.inputs_N, looked.batch.inputs_N),
        (batch.targets_N, looked.batch.targets_N),
        (uniform, looked.negatives.uniform),
    ):
        assert place is not None
        assert torch.equal(looked.rows_UD[place], table_VD[ids])
    only_inputs, rows_UD = look_up_inputs(table_VD, batch, sparse=sparse)
    assert torch.equal(rows_UD[only_inputs.inputs_N], table_VD[batch.inputs_N])
    assert len(rows_UD) == len(set(batch.inputs_N.tolist()))
    for unchanged in ("lengths_B", "rows_N", "places_N"):
        assert getattr(only_inputs, unchanged) is getattr(batch, unchanged)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("num_items", [1, 20, 60, 2000])
def test_no_more_rows_are_looked_up_than_the_table_has(num_items: int, sparse: bool) -> None:
    """In the fixed shapes of CUDA: as many rows as ids, or as the table has where it has fewer."""
    sessions = make_sessions(LENGTHS, num_items, seed=3)
    batch = training_batch(sessions, np.arange(len(LENGTHS)), 6, padded=True)
    uniform = torch.randint(1, num_items + 1, (len(batch.inputs_N), 3))
    table_VD = torch.randn(num_items + 1, 3, requires_grad=True)
    none = torch.zeros(len(LENGTHS), 0, dtype=torch.int64)
    looked = look_up(table_VD, batch, Negatives(uniform, None, none, None), sparse=sparse)
    assert len(looked.rows_UD) == min(5 * len(batch.inputs_N), num_items + 1)
    inputs, rows_UD = look_up_inputs(table_VD, batch, sparse=sparse)
    assert len(rows_UD) == min(len(batch.inputs_N), num_items + 1)
    assert torch.equal(rows_UD[inputs.inputs_N], table_VD[batch.inputs_N])
    for ids, place in (
        (batch.inputs_N, looked.batch.inputs_N),
        (batch.targets_N, looked.batch.targets_N),
        (uniform, looked.negatives.uniform),
    ):
        assert ids is not None
        assert torch.equal(looked.rows_UD[place], table_VD[ids])
    weight_NK1 = torch.arange(1.0, 1 + uniform.numel()).view(*uniform.shape, 1)
    (looked.rows_UD[looked.negatives.uniform] * weight_NK1).sum().backward()
    expected = torch.zeros(num_items + 1).index_add(0, uniform.flatten(), weight_NK1.flatten())
    assert table_VD.grad is not None
    assert torch.equal(table_VD.grad.to_dense(), expected[:, None].expand(-1, 3))


@pytest.mark.parametrize("sparse", [True, False])
def test_the_gradient_is_a_sum_over_all_that_refer_to_a_row(sparse: bool) -> None:
    """One item, as input, as target and as negative."""
    batch = make_batch(1)
    table_VD = torch.ones(20 + len(batch.inputs_N) * 3, 1, requires_grad=True)
    negatives = Negatives(torch.tensor([1, 1, 9]), None, torch.zeros(1, 0, dtype=torch.int64), None)
    looked = look_up(table_VD, batch, negatives, sparse=sparse)
    total = (
        looked.rows_UD[looked.batch.inputs_N].sum()
        + 10 * looked.rows_UD[looked.batch.targets_N].sum()
        + 1000 * looked.rows_UD[looked.negatives.uniform].sum()
    )
    total.backward()
    expected = torch.zeros_like(table_VD)
    expected[1] = 11 * len(batch.inputs_N) + 2000
    expected[9] = 1000
    assert torch.equal(table_VD.grad.to_dense(), expected)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_in_a_row_follow_those_of_a_dense_embedding(optimizer: str, reuse: bool) -> None:
    """Float32 as trained: rows that sleep stay where they began, to the bit."""
    num_items = 3000
    config = make_config(
        optimizer=optimizer,
        reuse_item_embeddings=reuse,
        topk_sampling=True,
        topk_sampling_k=4,
        clip_norm=1.0,
    )
    torch.manual_seed(0)
    model = build_model(config, num_items)
    first = {name: weights.detach().clone() for name, weights in model.named_parameters()}
    needed: set[int] = set()
    stepper = build_optimizer(optimizer, model.parameters(), lr=0.1)
    for step in range(4):
        batch = make_batch(num_items, [4 + step, 3, 9])
        torch.manual_seed(step)
        negatives = draw(batch, num_items, config)
        for ids in (batch.inputs_N, batch.targets_N, negatives.uniform):
            needed |= set(ids.tolist())
        torch.manual_seed(step)
        stepper.zero_grad()
        training_loss(model, batch, config, Distribution(num_items)).backward()
        clip_gradients(model.parameters(), config.clip_norm)
        stepper.step()
    asleep = sorted(set(range(num_items + 1)) - needed)
    for name, weights in model.named_parameters():
        if name in TABLES:
            assert torch.equal(weights[asleep], first[name][asleep])
            assert not torch.equal(weights, first[name])


# --- what a step allocates ------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most bytes that one new tensor held; views and results written in place are not new."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.bytes = max(self.bytes, storage.nbytes())
        return result


@contextmanager
def allocations_of_kernels() -> Iterator[list[int]]:
    """The bytes of each allocation, also of those that no operator returns."""
    sizes: list[int] = []
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        yield sizes
    pending = list(profile.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.name == "[memory]":
            sizes.append(event.extra_fields.alloc_size)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("optimizer", ["row_adam", "adagrad", "adam"])
def test_a_step_allocates_nothing_of_the_size_of_a_table(optimizer: str, reuse: bool) -> None:
    """Forward, backward, clipping and update; dense Adam shows that the watch would see it."""
    num_items, dim = 300_000, 64
    config = make_config(
        optimizer=optimizer,
        reuse_item_embeddings=reuse,
        embedding_dim=dim,
        num_blocks=1,
        num_uniform_negatives=512,
        topk_sampling=True,
        topk_sampling_k=10,
    )
    model = build_model(config, num_items)
    batch = make_batch(num_items)
    stepper = build_optimizer(optimizer, model.parameters(), lr=0.1)
    states = [value for state in stepper.state.values() for value in state.values()]
    known = [*model.parameters(), *states]
    with allocations_of_kernels() as sizes, Largest(known) as largest:
        for _ in range(2):
            stepper.zero_grad()
            training_loss(model, batch, config, Distribution(num_items)).backward()
            clip_gradients(model.parameters(), 1.0)
            stepper.step()
    assert sizes
    if optimizer == "adam":
        assert largest.bytes >= num_items * dim * 4
        assert max(sizes) >= num_items * dim * 4
    else:
        # Not even one number a row.
        assert largest.bytes < num_items
        assert max(sizes) < num_items
