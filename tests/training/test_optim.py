"""Optimizers against loops over rows in float64, and against torch.optim.

The gradient of a table is sparse: the rows of a step, in any order, repeated or not.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import operator
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import random_sessions, write_dataset
from helpers.runs import check_same_run, interrupt_at, resume, start, write_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tron_cli.checkpoint import best_checkpoint, load_checkpoint
from tron_cli.errors import InputError
from tron_cli.evaluation.evaluate import EvaluationOptions, assess
from tron_cli.ops import row_adam
from tron_cli.training.loop import InterruptedRunError
from tron_cli.training.optim import (
    build_optimizer,
    catch_up_all,
    clip_gradients,
    learning_rate,
    set_rate,
)

Gradients = dict[int, np.ndarray]  # row -> what its gradients add up to
CATALOGUE = {
    "loss": "ce", "num_uniform_negatives": 0, "num_batch_negatives": 0, "topk_sampling": False,
}  # fmt: skip
sparse_optimizers = pytest.mark.parametrize("name", ["row_adam", "adagrad"])


def sparse_gradient(
    rows: list[int], values: np.ndarray, shape: torch.Size, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Rows as they come: not sorted, not summed, not marked as coalesced."""
    return torch.sparse_coo_tensor(
        torch.tensor([rows], dtype=torch.int64),
        torch.as_tensor(values, dtype=dtype).reshape(len(rows), *shape[1:]),
        shape,
        check_invariants=True,
    )


def random_rows(
    rng: np.random.Generator, shape: tuple[int, ...], count: int
) -> tuple[list[int], np.ndarray]:
    """Distinct rows in no order, with gradients of many magnitudes, a few elements zero."""
    rows = rng.permutation(shape[0])[:count].tolist()
    values = rng.standard_normal((count, *shape[1:])) * 10.0 ** rng.integers(-4, 2, (count, 1))
    values[:, 1:][rng.random((count, shape[1] - 1)) < 0.2] = 0.0
    return rows, values.astype(np.float32)


class RowAdam:
    """Dense Adam: rows without a gradient go on along their mean."""

    def __init__(self, weights_VD: np.ndarray) -> None:
        self.weights = weights_VD.astype(np.float64)
        self.mean = np.zeros_like(self.weights)
        self.square = np.zeros_like(self.weights)
        self.steps = 0

    def step(self, gradients: Gradients, lr: float) -> None:
        self.steps += 1
        for row in range(len(self.weights)):
            gradient = np.zeros_like(self.weights[row])
            if row in gradients:
                gradient = gradients[row].astype(np.float64)
            self.mean[row] += (1 - 0.9) * (gradient - self.mean[row])
            self.square[row] += (1 - 0.999) * (gradient**2 - self.square[row])
            mean = self.mean[row] / (1 - 0.9**self.steps)
            square = self.square[row] / (1 - 0.999**self.steps)
            self.weights[row] -= lr * mean / (np.sqrt(square) + 1e-8)


class RowAdagrad:
    def __init__(self, weights_VD: np.ndarray) -> None:
        self.weights = weights_VD.astype(np.float64)
        self.square = np.zeros_like(self.weights)

    def step(self, gradients: Gradients, lr: float) -> None:
        for row, values in gradients.items():
            gradient = values.astype(np.float64)
            self.square[row] += gradient**2
            self.weights[row] -= lr * gradient / (np.sqrt(self.square[row]) + 1e-10)


ORACLES = {"row_adam": RowAdam, "adagrad": RowAdagrad}


def table(rng: np.random.Generator, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(rng.standard_normal(shape).astype(np.float32)))


def check_close(weights: torch.Tensor, expected: np.ndarray, *, moves: float) -> None:
    """Within float32's rounding of weights of order 1, and of moves that add up to `moves`."""
    np.testing.assert_allclose(
        weights.detach().double().numpy(), expected, rtol=1e-6, atol=2e-6 * max(moves, 0.1)
    )


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


# --- sleeps longer than they are kept apart -------------------------------------------------------

SCHEDULES = {
    f"{schedule}, warm-up of {warmup}": {"schedule": schedule, "warmup_steps": warmup}
    for schedule in ("constant", "cosine")
    for warmup in (0, 250)
}


def rare_gradients(
    rng: np.random.Generator, shape: tuple[int, int], steps: int
) -> dict[int, Gradients]:
    """Step -> gradients; row after row is met more rarely, the last ones once or never."""
    met: dict[int, Gradients] = {}
    for row in range(shape[0] - 1):
        step = int(rng.integers(1, steps // 2))
        while step <= steps:
            # None in a row: what is measured is sleeping, not how float32 adds up.
            met.setdefault(step, {})[row] = rng.uniform(0.1, 1) * rng.standard_normal(shape[1])
            step += int(rng.exponential(300 * 1.35**row)) + 2
    return met


def difference_from_dense_adam(
    steps: int,
    lr: float,
    *,
    schedule: str,
    warmup_steps: int,
    catch_up_every: int = 0,
    leaves_out_rows: bool = True,
) -> float:
    """Largest difference from float64, by how far the row has ever been from zero, its start."""
    shape = (24, 2)
    met = rare_gradients(np.random.default_rng(30), shape, steps)
    weights = nn.Parameter(torch.zeros(shape))
    optimizer = build_optimizer("row_adam", [weights], lr=lr)
    optimizer.leaves_out_rows = leaves_out_rows
    none = sparse_gradient([0], np.zeros(2), weights.shape)
    expected, mean, square, farthest = np.zeros((4, *shape))
    for step in range(1, steps + 1):
        rate = learning_rate(
            step - 1, lr=lr, schedule=schedule, warmup_steps=warmup_steps, total_steps=steps
        )
        set_rate(optimizer, rate)
        weights.grad = none
        mean *= 0.9
        square *= 0.999
        if step in met:
            rows, values = list(met[step]), np.array([*met[step].values()], np.float32)
            weights.grad = sparse_gradient(rows, values, weights.shape)
            mean[rows] += 0.1 * values
            square[rows] += 0.001 * values.astype(np.float64) ** 2
        optimizer.step()
        root = np.sqrt(square / (1 - 0.999**step)) + 1e-8
        expected -= rate / (1 - 0.9**step) * mean / root
        np.maximum(farthest, np.abs(expected), out=farthest)
        if catch_up_every and step % catch_up_every == 0:
            optimizer.catch_up(weights)
    optimizer.catch_up(weights)
    error = np.abs(weights.detach().numpy() - expected).max(axis=1)
    assert (error[-1], expected[-1].any()) == (0, False)
    return float((error[:-1] / farthest[:-1].max(axis=1)).max())


@pytest.mark.parametrize("catch_up_every", [0, 100])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_sleep_may_be_longer_than_it_is_kept(
    schedule: str, catch_up_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_adam, "SLEEPS", 700)
    options = {**SCHEDULES[schedule], "catch_up_every": catch_up_every}
    assert difference_from_dense_adam(5_000, 0.01, **options) < 1e-5


@pytest.mark.parametrize("catch_up_every", [1, 3, 100, 10_000])
@pytest.mark.parametrize("touched", [30, 2_000])
def test_gradients_near_eps_sleep_as_in_dense_adam(touched: int, catch_up_every: int) -> None:
    """A sampled negative's gradient is about 1e-6, whose root of the square is some 3e-8."""
    sizes = np.array([1.0, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8])
    weights = nn.Parameter(torch.zeros(70_000, len(sizes)))  # its turn does not come every step
    dense = nn.Parameter(torch.zeros(1, len(sizes), dtype=torch.float64))
    optimizer = build_optimizer("row_adam", [weights], lr=1e-3)
    oracle = torch.optim.Adam([dense], lr=1e-3)
    for step in range(1, touched + 300):
        rows, values = ([9], sizes[None]) if step == touched else ([], np.zeros((0, len(sizes))))
        weights.grad = sparse_gradient(rows, values, weights.shape)
        dense.grad = torch.from_numpy(values.sum(axis=0, keepdims=True))
        optimizer.step()
        oracle.step()
        if step % catch_up_every == 0:
            optimizer.catch_up(weights, torch.tensor([9]))
    optimizer.catch_up(weights)
    found, expected = weights[9].detach().double(), dense[0].detach()
    accuracy = 5e-3 if touched < 100 else 2e-5
    torch.testing.assert_close(found, expected, rtol=accuracy, atol=0)


def test_sleeps_on_a_device_that_is_never_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without a gradient are written back as they were, as in a recorded step."""
    monkeypatch.setattr(row_adam, "SLEEPS", 700)
    options = {**SCHEDULES["cosine, warm-up of 0"], "leaves_out_rows": False}
    assert difference_from_dense_adam(3_000, 0.01, **options) < 1e-5


def test_each_row_of_a_table_larger_than_the_sleeps_has_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """5,000 rows with one gradient each in steps 1 to 5, then 2,000 steps without any."""
    monkeypatch.setattr(row_adam, "SLEEPS", 600)
    weights = nn.Parameter(torch.zeros(5_000, 1))
    optimizer = build_optimizer("row_adam", [weights], lr=0.1)
    dense = np.zeros(5)
    for step in range(1, 2_001):
        rate = 0.1 if step < 900 else 1e-4
        set_rate(optimizer, rate)
        rows = list(range(step - 1, 5_000, 5)) if step <= 5 else []
        weights.grad = sparse_gradient(rows, np.ones(len(rows)), weights.shape)
        optimizer.step()
        for first in range(min(step, 5)):
            age = step - first - 1
            move = rate * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
            dense[first] -= move * 0.1 / np.sqrt(0.001) * (0.9 / np.sqrt(0.999)) ** age
    # Without a catch-up at the end: all have had their turn.
    np.testing.assert_allclose(weights.detach()[:, 0], np.tile(dense, 1_000), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_row_adam_is_dense_adam_over_200_000_steps(schedule: str) -> None:
    options = {"schedule": schedule, "warmup_steps": 5_000}
    assert difference_from_dense_adam(200_000, 0.001, **options) < 1e-5


def test_a_row_that_has_made_its_moves_has_nothing_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """One gradient in step 5,000 of 90,000, a catch-up every 10,000, a rate that falls to zero."""
    weights = nn.Parameter(torch.zeros(1, 1))
    optimizer = build_optimizer("row_adam", [weights], lr=0.01)
    gradient = {5_000: sparse_gradient([0], np.ones(1), weights.shape)}
    for step in range(1, 90_001):
        set_rate(optimizer, 0.01 * 0.5 * (1 + math.cos(math.pi * (step - 1) / 90_000)))
        weights.grad = gradient.get(step)
        optimizer.step()
        if step % 10_000 == 0:
            optimizer.catch_up(weights)
    # Dense: each move is rate * m / sqrt(v), m = 0.1 * 0.9^i and v = 0.001 * 0.999^i.
    rates = 0.005 * (1 + np.cos(np.pi * np.arange(4_999, 90_000) / 90_000))
    ages = np.arange(len(rates))
    corrections = np.sqrt(1 - 0.999 ** (5_000 + ages))
    expected = -(rates * corrections * 0.1 / np.sqrt(0.001) * (0.9 / np.sqrt(0.999)) ** ages).sum()
    assert weights.item() == pytest.approx(expected, rel=1e-5)


@sparse_optimizers
def test_a_clock_does_not_stop_at_two_to_the_24(name: str) -> None:
    weights = nn.Parameter(torch.ones(3, 2))
    optimizer = build_optimizer(name, [weights], lr=0.1)
    optimizer.steps.fill_(2**24)
    for step in range(1, 4):
        weights.grad = sparse_gradient([1], np.ones(2), weights.shape)
        optimizer.step()
        assert optimizer.steps == 2**24 + step
        if name == "row_adam":
            assert optimizer.state[weights]["touched"][1] == 2**24 + step


def test_dense_adam_goes_on_when_float32_counts_no_more_steps() -> None:
    """torch's clock stops at 2^24, where both bias corrections have long been 1."""
    weights = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = build_optimizer("adam", [weights], lr=0.1)
    weights.grad = torch.zeros(1, dtype=torch.float64)
    saved = optimizer.state_dict()
    saved["steps"].fill_(2**24)
    saved["state"][0]["mean"].fill_(0.5)
    saved["state"][0]["square"].fill_(0.25)
    optimizer.load_state_dict(saved)
    expected = 1.0
    for step in range(1, 4):
        optimizer.step()
        expected -= 0.1 * 0.5 * 0.9**step / (0.5 * 0.999 ** (step / 2) + 1e-8)
    assert weights.item() == pytest.approx(expected, rel=1e-12)


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


# --- state ----------------------------------------------------------------------------------------


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
    rng = np.random.default_rng(10)
    write_dataset(
        tmp_path / "data",
        train=random_sessions(rng, 45, 300),
        val=random_sessions(rng, 20, 300),
        num_items=300,
    )
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
    """As earlier checkpoints have them."""
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
    rng = np.random.default_rng(12)
    data = write_dataset(
        tmp_path / "data",
        train=random_sessions(rng, 45, 300),
        val=random_sessions(rng, 20, 300),
        num_items=300,
    )
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


def test_the_state_of_another_optimizer_is_refused():
    weights = torch.nn.Parameter(torch.zeros(3, 2))
    adagrad = build_optimizer("adagrad", [weights], lr=0.1).state_dict()
    optimizer = build_optimizer("adam", [weights], lr=0.1)
    for saved in (adagrad, {"state": {}, "param_groups": []}, []):
        with pytest.raises(InputError, match="that of another optimizer"):
            optimizer.load_state_dict(saved)


def test_the_state_of_other_parameters_is_refused():
    """As that of a version of tron which had the same tables in another order."""
    one, two = torch.nn.Parameter(torch.zeros(5, 2)), torch.nn.Parameter(torch.zeros(3, 2))
    saved = build_optimizer("row_adam", [one, two], 0.1).state_dict()
    build_optimizer("row_adam", [one, two], 0.1).load_state_dict(saved)
    with pytest.raises(InputError, match=r"another version of tron; start a new run"):
        build_optimizer("row_adam", [two, one], 0.1).load_state_dict(saved)
    with pytest.raises(InputError, match="that of another optimizer"):
        build_optimizer("row_adam", [one, two], 0.1).load_state_dict(
            {**saved, "moves": torch.zeros(7)}
        )
