"""The moves that are made up for, against dense Adam in a loop of float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from tron_cli.ops import row_adam

# Rates of a warm-up, a constant stretch and a fall to nearly nothing.
RATES = [*np.linspace(1e-4, 1e-2, 60), *[1e-2] * 200, *np.geomspace(1e-2, 1e-5, 340)]


class Dense:
    """Dense Adam in float64; rows without a gradient go on along their mean."""

    def __init__(self, rows: int, dim: int) -> None:
        self.weights, self.mean, self.square = np.zeros((3, rows, dim))
        self.steps = 0

    def step(self, gradient: np.ndarray, lr: float) -> None:
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        root = np.sqrt(self.square / (1 - 0.999**self.steps)) + 1e-8
        self.weights -= lr * self.mean / (1 - 0.9**self.steps) / root


def table_and_dense(steps: int, *, seed: int = 0) -> tuple[torch.Tensor, dict[str, Any], Dense]:
    """Return float64 weights whose rows slept after one or a few gradients, their state, and dense
    Adam after `steps` steps. The last row never had a gradient."""
    random = np.random.default_rng(seed)
    rows, dim = 9, 3
    last = np.array([*random.integers(1, 400, rows - 1), 0])  # the step of the last gradient
    first = np.maximum(last - 2, 1)
    dense = Dense(rows, dim)
    weights = torch.zeros(rows, dim, dtype=torch.float64)
    state = row_adam.fresh_state([weights])
    tensors = state["state"][0]
    for step in range(1, steps + 1):
        awake = (first <= step) & (step <= last)
        gradient = random.standard_normal((rows, dim)) * awake[:, None]
        dense.step(gradient, RATES[step - 1])
        state["steps"] += 1
        row_adam.add_moves(state["moves"], state["steps"], RATES[step - 1])
        for name in ("mean", "square"):
            tensors[name][awake] = torch.from_numpy(getattr(dense, name)[awake])
        weights[awake] = torch.from_numpy(dense.weights[awake])
        tensors["touched"][awake] = step
        tensors["moved"][awake] = 0.0
    return weights, state, dense


def catch_up(weights: torch.Tensor, state: dict[str, Any], rows: list[int], **more: Any) -> None:
    row_adam.catch_up(
        weights,
        torch.tensor(rows, dtype=torch.int64),
        **state["state"][0],
        moves=state["moves"],
        steps=state["steps"],
        **more,
    )


@pytest.mark.parametrize("leaves_out_rows", [True, False])
@pytest.mark.parametrize("steps", [402, 450, 600])
def test_rows_that_slept_come_to_where_dense_adam_has_them(
    steps: int, leaves_out_rows: bool
) -> None:
    weights, state, dense = table_and_dense(steps)
    assert np.abs(weights.numpy() - dense.weights).max() > 1e-3
    catch_up(weights, state, [*range(9)], leaves_out_rows=leaves_out_rows)
    np.testing.assert_allclose(weights.numpy(), dense.weights, rtol=1e-5, atol=1e-6)
    assert not weights[8].any()


def test_only_the_rows_given_and_their_count_of_moves_change() -> None:
    weights, state, dense = table_and_dense(420)
    before, state_before = weights.clone(), copy.deepcopy(state)
    catch_up(weights, state, [6, 0, 3])
    others = [1, 2, 4, 5, 7, 8]
    assert torch.equal(weights[others], before[others])
    np.testing.assert_allclose(weights[[0, 3, 6]], dense.weights[[0, 3, 6]], rtol=1e-5, atol=1e-6)
    moved = state["state"][0].pop("moved")
    assert torch.equal(moved[others], state_before["state"][0].pop("moved")[others])
    assert moved[[0, 3, 6]].all()
    for name, values in state["state"][0].items():
        assert torch.equal(values, state_before["state"][0][name])
    assert torch.equal(state["moves"], state_before["moves"])
    assert state["steps"] == state_before["steps"]


def test_a_row_that_has_caught_up_has_nothing_due() -> None:
    weights, state, _ = table_and_dense(420)
    catch_up(weights, state, [*range(9)])
    before = weights.clone()
    catch_up(weights, state, [*range(9)])
    assert torch.equal(weights, before)


def test_a_sleep_may_be_caught_up_in_stretches() -> None:
    """Each state is that of the step in which a part of the moves was made."""
    weights, state, _ = table_and_dense(402)
    catch_up(weights, state, [*range(9)])
    for steps in (403, 410, 500):
        _, later, dense = table_and_dense(steps)
        later["state"][0]["moved"] = state["state"][0]["moved"]
        catch_up(weights, later, [*range(9)])
        np.testing.assert_allclose(weights.numpy(), dense.weights, rtol=1e-5, atol=1e-6)


def test_a_place_that_a_later_sleep_took_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have made their moves by then; sums of another sleep are not theirs."""
    monkeypatch.setattr(row_adam, "SLEEPS", 200)
    weights, state, _ = table_and_dense(600)
    before = weights.clone()
    catch_up(weights, state, [*range(9)])
    assert torch.equal(weights, before)


def test_states_differ_by_the_shape_of_any_tensor() -> None:
    weights = [torch.zeros(4, 2), torch.zeros(3, 2)]
    fresh = row_adam.fresh_state(weights)
    on_meta = row_adam.fresh_state(values.to("meta") for values in weights)
    assert row_adam.same_shapes(fresh, on_meta)
    assert not row_adam.same_shapes(fresh, row_adam.fresh_state(weights[::-1]))
    assert not row_adam.same_shapes({**fresh, "moves": torch.zeros(7)}, fresh)
    assert not row_adam.same_shapes({"steps": fresh["steps"], "state": {}}, fresh)
