"""Optimizers against loops over rows in float64, and against torch.optim; clipping.

The gradient of a table is sparse: the rows of a step, in any order, repeated or not.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.gradients import (
    ORACLES,
    Gradients,
    check_close,
    random_rows,
    sparse_gradient,
    table,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tron_cli.ops import row_adam
from tron_cli.training.optim import (
    build_optimizer,
    catch_up_all,
    clip_gradients,
    set_rate,
)

sparse_optimizers = pytest.mark.parametrize("name", ["row_adam", "adagrad"])


# --- rows -----------------------------------------------------------------------------------------


@sparse_optimizers
def test_rows_follow_a_loop_with_a_clock_for_each_row(name: str) -> None:
    """Some rows in each step, some once and again 60 steps later, some never; the rate changes."""
    rng = np.random.default_rng(0)
    weights = table(rng, 12, 3)
    oracle = ORACLES[name](weights.detach().numpy())
    optimizer = build_optimizer(name, [weights], lr=9.0)
    for step in range(80):
        rows, values = random_rows(rng, (8, 3), int(rng.integers(1, 8)))
        if step in (0, 60):
            rows, values = [*rows, 9, 10], np.concatenate([values, rng.standard_normal((2, 3))])
        lr = 0.01 * (1 + step % 3)
        set_rate(optimizer, lr)
        weights.grad = sparse_gradient(rows, values, weights.shape)
        optimizer.step()
        gradients = dict(zip(rows, weights.grad.to_dense()[rows].numpy(), strict=True))
        oracle.step(gradients, lr)
        if step % 7 == 0 or step == 79:
            catch_up_all(optimizer)
            check_close(weights, oracle.weights, moves=0.2 * (step + 1))


@given(data=st.data())
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("name", ["row_adam", "adagrad"])
def test_any_rows_in_any_order_and_repeated(name: str, data: Any) -> None:
    """A gradient that was not summed up counts as the sum of its rows."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    weights = table(rng, 6, 2)
    oracle = ORACLES[name](weights.detach().numpy())
    optimizer = build_optimizer(name, [weights], lr=0.05)
    for step in range(data.draw(st.integers(1, 6))):
        rows = data.draw(st.lists(st.integers(0, 5), max_size=8))
        # Eighths add up exactly in any order.
        values = rng.integers(-20, 21, (len(rows), 2)).astype(np.float32) / 8
        weights.grad = sparse_gradient(rows, values, weights.shape)
        optimizer.step()
        gradients: Gradients = {}
        for row, value in zip(rows, values, strict=True):
            gradients[row] = gradients.get(row, 0) + value
        oracle.step(gradients, 0.05)
        catch_up_all(optimizer)
        check_close(weights, oracle.weights, moves=0.05 * (step + 1))


@sparse_optimizers
def test_sleeping_rows_and_their_state_are_left_alone(name: str) -> None:
    rng = np.random.default_rng(1)
    weights = table(rng, 10, 4)
    optimizer = build_optimizer(name, [weights], lr=0.1)
    for rows in ([1, 2, 3, 7], [2, 9], [3]):
        before = weights.detach().clone(), copy.deepcopy(optimizer.state[weights])
        weights.grad = sparse_gradient(rows, rng.standard_normal((len(rows), 4)), weights.shape)
        optimizer.step()
        asleep = [row for row in range(10) if row not in rows]
        assert torch.equal(weights[asleep], before[0][asleep])
        assert (weights[rows] != before[0][rows]).all()
        for key, value in optimizer.state[weights].items():
            assert torch.equal(value[asleep], before[1][key][asleep])


@sparse_optimizers
def test_a_row_whose_gradient_is_zero_sleeps(name: str) -> None:
    """Top-k leaves most of the negatives that are looked up without a gradient."""
    optimizers, tables = [], []
    for with_zeros in (True, False):
        rng = np.random.default_rng(20)
        weights = table(rng, 7, 2)
        optimizer = build_optimizer(name, [weights], lr=0.1)
        for _ in range(10):
            rows, values = random_rows(rng, (7, 2), 3)
            if with_zeros:
                idle = sorted(set(range(7)) - set(rows))
                rows, values = [*rows, *idle], np.concatenate([values, np.zeros((len(idle), 2))])
            weights.grad = sparse_gradient(rows, values, weights.shape)
            optimizer.step()
        optimizers.append(optimizer)
        tables.append(weights)
    assert torch.equal(*tables)
    first, second = (next(iter(optimizer.state.values())) for optimizer in optimizers)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_an_element_of_zero_in_a_touched_row_goes_on_along_its_moments() -> None:
    weights = nn.Parameter(torch.ones(1, 2))
    optimizer = build_optimizer("row_adam", [weights], lr=0.1)
    weights.grad = sparse_gradient([0], np.ones(2), weights.shape)
    optimizer.step()
    before = weights.detach().clone()
    weights.grad = sparse_gradient([0], np.array([0.0, 1.0]), weights.shape)
    optimizer.step()
    # m = 0.9 * 0.1 / (1 - 0.9^2), v = 0.999 * 0.001 / (1 - 0.999^2)
    expected = -0.1 * (0.09 / (1 - 0.81)) / math.sqrt(0.000999 / (1 - 0.998001))
    moved = (weights.detach() - before)[0, 0].item()
    assert moved == pytest.approx(expected, rel=1e-5)


@sparse_optimizers
def test_a_gradient_that_is_not_a_number_is_not_a_gradient_of_zero(name: str) -> None:
    weights = nn.Parameter(torch.ones(3, 2))
    optimizer = build_optimizer(name, [weights], lr=0.1)
    weights.grad = sparse_gradient([1], np.array([0.0, np.nan]), weights.shape)
    optimizer.step()
    assert weights[1, 1].isnan()


@sparse_optimizers
@pytest.mark.parametrize("at_once", [1, 7, 64])
def test_parts_give_the_bits_of_the_whole(
    name: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    finals = []
    for size in (at_once, 1000):
        monkeypatch.setitem(row_adam.ROWS_AT_ONCE, "cpu", size)
        rng = np.random.default_rng(2)
        weights = table(rng, 90, 5)
        optimizer = build_optimizer(name, [weights], lr=0.1)
        for count in (64, 90, 13, 0, 65):
            weights.grad = sparse_gradient(*random_rows(rng, (90, 5), count), weights.shape)
            optimizer.step()
        finals.append([weights.detach(), *optimizer.state[weights].values()])
    assert all(map(torch.equal, *finals))


@sparse_optimizers
def test_more_rows_than_are_updated_at_once(name: str) -> None:
    rng = np.random.default_rng(3)
    shape = (4000, 2)
    weights = table(rng, *shape)
    oracle = ORACLES[name](weights.detach().numpy())
    optimizer = build_optimizer(name, [weights], lr=0.1)
    for count in (3500, 1024, 1025):
        rows, values = random_rows(rng, shape, count)
        assert max(count, 3500) > 3 * row_adam.ROWS_AT_ONCE["cpu"]
        values = np.copysign(np.maximum(np.abs(values), 0.05), values)  # far above eps
        weights.grad = sparse_gradient(rows, values, weights.shape)
        optimizer.step()
        oracle.step(dict(zip(rows, values, strict=True)), 0.1)
    catch_up_all(optimizer)
    check_close(weights, oracle.weights, moves=0.3)


# --- torch.optim ----------------------------------------------------------------------------------


def test_dense_adam_has_the_bits_of_torchs() -> None:
    rng = np.random.default_rng(4)
    ours = [table(rng, 50, 7), table(rng, 3), table(rng, 4, 4)]
    theirs = copy.deepcopy(ours)
    optimizer = build_optimizer("adam", ours, lr=0.01)
    reference = torch.optim.Adam(theirs, lr=0.01, fused=True)
    for step in range(30):
        rate = 0.01 / (1 + step)
        set_rate(optimizer, rate)
        reference.param_groups[0]["lr"] = rate
        for weights, twin in zip(ours, theirs, strict=True):
            weights.grad = torch.randn(weights.shape)
            twin.grad = weights.grad.clone()
        optimizer.step()
        reference.step()
        assert all(map(torch.equal, ours, theirs))


def test_rows_that_are_touched_in_each_step_are_dense_adams() -> None:
    rng = np.random.default_rng(5)
    ours = table(rng, 40, 6)
    theirs = nn.Parameter(ours.detach().clone())
    exact = nn.Parameter(ours.detach().double())
    optimizer = build_optimizer("row_adam", [ours], lr=0.01)
    references = [torch.optim.Adam([theirs], lr=0.01), torch.optim.Adam([exact], lr=0.01)]
    for _ in range(200):
        rows, values = random_rows(rng, (40, 6), 40)
        ours.grad = sparse_gradient(rows, values, ours.shape)
        theirs.grad = ours.grad.to_dense()
        exact.grad = theirs.grad.double()
        optimizer.step()
        for reference in references:
            reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-6)
    # As near to the exact result as torch's own float32 is, give or take a few roundings.
    error, torchs_error = ((twin - exact).abs().max().item() for twin in (ours, theirs))
    assert error <= 2 * torchs_error + 1e-7


@pytest.mark.parametrize("dense", [False, True])
def test_adagrad_is_torchs_on_dense_gradients(dense: bool) -> None:
    """Rows without a gradient stay in both, so every choice of rows must agree."""
    rng = np.random.default_rng(6)
    ours = table(rng, 30, 5)
    theirs = nn.Parameter(ours.detach().clone())
    optimizer = build_optimizer("adagrad", [ours], lr=0.05)
    reference = torch.optim.Adagrad([theirs], lr=0.05)
    for _ in range(40):
        rows, values = random_rows(rng, (30, 5), int(rng.integers(0, 31)))
        gradient = sparse_gradient(rows, values, ours.shape)
        ours.grad = gradient.to_dense() if dense else gradient
        theirs.grad = gradient.to_dense()
        before = ours.detach().clone()
        with torch.no_grad():
            theirs.copy_(before)  # one step at a time: roundings do not add up
        optimizer.step()
        reference.step()
        one_ulp = torch.nextafter(theirs.abs(), torch.tensor(torch.inf)) - theirs.abs()
        # A move that cancels most of a weight shows its own roundings, at the scale of the move.
        assert ((ours - theirs).abs() <= one_ulp + 3e-7 * (theirs - before).abs()).all()
        state = next(iter(reference.state.values()))["sum"]
        torch.testing.assert_close(optimizer.state[ours]["square"], state, rtol=2e-7, atol=0)


@sparse_optimizers
def test_sparse_and_dense_parameters_share_one_optimizer(name: str) -> None:
    """Each follows its own reference; one without a gradient stays as it is."""
    rng = np.random.default_rng(7)
    rows_only, dense, idle = table(rng, 9, 4), table(rng, 5, 4), table(rng, 2)
    oracle = ORACLES[name](rows_only.detach().numpy())
    twin = nn.Parameter(dense.detach().clone())
    kind = torch.optim.Adam if name == "row_adam" else torch.optim.Adagrad
    reference = kind([twin], lr=0.02)
    optimizer = build_optimizer(name, [dense, rows_only, idle], lr=0.02)
    before = idle.detach().clone()
    for step in range(20):
        rows, values = random_rows(rng, (9, 4), 4)
        rows_only.grad = sparse_gradient(rows, values, rows_only.shape)
        dense.grad = torch.from_numpy(rng.standard_normal((5, 4)).astype(np.float32))
        twin.grad = dense.grad.clone()
        optimizer.step()
        reference.step()
        oracle.step(dict(zip(rows, values, strict=True)), 0.02)
        catch_up_all(optimizer)
        check_close(rows_only, oracle.weights, moves=0.2 * (step + 1))
        torch.testing.assert_close(dense, twin, rtol=1e-6, atol=2e-6)
    assert torch.equal(idle, before)
    optimizer.zero_grad()
    assert rows_only.grad is dense.grad is None


# --- clipping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [1e-3, 1.0, 5.0, 1e6])
def test_clipping_is_torchs_on_dense_gradients(clip_norm: float) -> None:
    """Sparse and dense gradients and none; norms above and below the limit."""
    rng = np.random.default_rng(11)
    parameters = [table(rng, 15, 4), table(rng, 8), table(rng, 3, 3), table(rng, 15, 2)]
    rows, values = random_rows(rng, (15, 4), 6)
    others, other_values = random_rows(rng, (15, 2), 15)
    parameters[0].grad = sparse_gradient(rows, values, parameters[0].shape)
    parameters[1].grad = torch.randn(8)
    parameters[3].grad = sparse_gradient(others, other_values, parameters[3].shape)
    dense = copy.deepcopy(parameters)
    for weights, twin in zip(parameters, dense, strict=True):
        twin.grad = None if weights.grad is None else weights.grad.to_dense().clone()
    nn.utils.clip_grad_norm_(dense, clip_norm)
    clip_gradients(iter(parameters), clip_norm)
    for weights, twin in zip(parameters, dense, strict=True):
        if weights.grad is None:
            assert twin.grad is None
            continue
        torch.testing.assert_close(weights.grad.to_dense(), twin.grad, rtol=1e-6, atol=0)


def test_gradients_below_the_limit_keep_their_bits() -> None:
    weights = nn.Parameter(torch.zeros(4, 1))
    weights.grad = sparse_gradient([2, 0], np.array([0.3, 0.4]), weights.shape)
    clip_gradients([weights], 0.51)
    assert torch.equal(weights.grad.to_dense(), torch.tensor([[0.4], [0.0], [0.3], [0.0]]))
