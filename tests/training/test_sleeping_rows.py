"""RowAdam over many steps, in which most rows sleep, against dense Adam in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.gradients import (
    Gradients,
    sparse_gradient,
)
from torch import nn

from tron_cli.ops import row_adam
from tron_cli.training.optim import (
    build_optimizer,
    learning_rate,
    set_rate,
)

sparse_optimizers = pytest.mark.parametrize("name", ["row_adam", "adagrad"])

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
    first: float = 0.0,
    weight_decay: float = 0.0,
) -> float:
    """Largest difference from float64, by how far the row has ever been from zero.

    Weights start as `first`.
    """
    shape = (24, 2)
    met = rare_gradients(np.random.default_rng(30), shape, steps)
    weights = nn.Parameter(torch.full(shape, first))
    optimizer = build_optimizer("row_adam", [weights], lr=lr, weight_decay=weight_decay)
    optimizer.leaves_out_rows = leaves_out_rows
    none = sparse_gradient([0], np.zeros(2), weights.shape)
    expected, mean, square, farthest = np.zeros((4, *shape))
    expected += first
    farthest += abs(first)
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
        expected = expected * (1 - rate * weight_decay) - rate / (1 - 0.9**step) * mean / root
        np.maximum(farthest, np.abs(expected), out=farthest)
        if catch_up_every and step % catch_up_every == 0:
            optimizer.catch_up(weights)
    optimizer.catch_up(weights)
    error = np.abs(weights.detach().numpy() - expected).max(axis=1)
    if not first:
        assert (error[-1], expected[-1].any()) == (0, False)
        farthest[-1] = 1.0
    return float((error / farthest.max(axis=1)).max())


@pytest.mark.parametrize("catch_up_every", [0, 100])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_sleep_may_be_longer_than_it_is_kept(
    schedule: str, catch_up_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_adam, "SLEEPS", 700)
    options = {**SCHEDULES[schedule], "catch_up_every": catch_up_every}
    assert difference_from_dense_adam(5_000, 0.01, **options) < 1e-5


@pytest.mark.parametrize(
    ("weight_decay", "catch_up_every"), [(0.1, 0), (0.001, 100), (5.0, 0), (5.0, 100)]
)
@pytest.mark.parametrize("schedule", ["constant, warm-up of 0", "cosine, warm-up of 250"])
def test_rows_that_sleep_decay_as_in_dense_adamw(
    schedule: str, weight_decay: float, catch_up_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most sleep for longer than their start is kept; the last row is never looked up."""
    monkeypatch.setattr(row_adam, "SLEEPS", 700)
    options = {**SCHEDULES[schedule], "catch_up_every": catch_up_every}
    found = difference_from_dense_adam(2_000, 0.01, first=0.5, weight_decay=weight_decay, **options)
    assert found < 1e-5


def test_a_whole_sleep_within_what_is_kept_decays_as_in_dense_adamw() -> None:
    options = {**SCHEDULES["cosine, warm-up of 0"], "first": -0.5, "weight_decay": 0.1}
    assert difference_from_dense_adam(2_000, 0.01, **options) < 1e-5


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
    assert difference_from_dense_adam(1_500, 0.01, first=1.0, weight_decay=0.1, **options) < 1e-5


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
@pytest.mark.parametrize(("schedule", "steps"), [("constant", 100_000), ("cosine", 200_000)])
def test_row_adam_is_dense_adam_over_many_steps(schedule: str, steps: int) -> None:
    options = {"schedule": schedule, "warmup_steps": 5_000}
    assert difference_from_dense_adam(steps, 0.001, **options) < 1e-5


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
