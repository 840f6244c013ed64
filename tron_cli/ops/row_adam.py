"""Lazy Adam with the weights of dense Adam: pending updates of table rows, applied when needed.

In dense Adam a row without a gradient still moves along its mean, which decays. RowAdam leaves such
a row alone ("asleep"), and `catch_up` applies its pending updates, or moves, together. After i
steps of sleep the ratio of mean to root of the square is r^i times what it was, with
r = beta1 / sqrt(beta2), so the moves of one sleep differ by factors that all elements share. With
rate lr_t in step t, their sum is

    sum over t of lr_t sqrt(1 - beta2^t) / (1 - beta1^t) r^(t - touched)

times mean / (sqrt(square) + eps'). The one approximation is eps', which changes by half a percent
in ten steps, faster in the first thousand: it is taken at the mean age of the pending moves. The
sum of a sleep that began in step t grows for the _AGES steps in which r^i matters, and is kept at
place t modulo SLEEPS for SLEEPS steps. All pending moves must be applied within that time.

Shapes: V rows of a table, U rows given, D width, S places of sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
SLEEPS = 1 << 16
# Rows updated at once: few enough for their weights and state to fit a CPU's cache.
ROWS_AT_ONCE = {"cpu": 1024, "cuda": 1 << 22}

_AGES = 256
_RATIO = BETA1 / math.sqrt(BETA2)


def fresh_state(parameters: Iterable[torch.Tensor]) -> dict[str, Any]:
    """Return the state of RowAdam before the first step, in the form that a last.pt holds.

    steps: int64 (), steps taken. state: for each parameter, mean and square, shaped like the
    parameter; touched, int64 [V], the step of a row's last sparse gradient, 0 without one; and
    moved, float32 [V], how much of the sum of moves since then has been applied. moves: float32
    [S], the sum of the moves of a sleep that began at this place.
    """
    parameters = list(parameters)
    device = parameters[0].device
    return {
        "steps": torch.zeros((), dtype=torch.int64, device=device),
        "state": [
            {
                "mean": torch.zeros_like(weights),
                "square": torch.zeros_like(weights),
                "touched": torch.zeros(len(weights), dtype=torch.int64, device=device),
                "moved": torch.zeros(len(weights), device=device),
            }
            for weights in parameters
        ],
        "moves": torch.zeros(SLEEPS, device=device),
    }


def scale_and_rate(
    steps: torch.Tensor, lr: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bias corrections of a step, float64 (): the factor of the square's root, and the
    learning rate divided by that of the mean."""
    steps = steps.double()
    return (1 - BETA2**steps).sqrt(), lr / (1 - BETA1**steps)


def add_moves(moves_S: torch.Tensor, steps: torch.Tensor, lr: torch.Tensor | float) -> None:
    """Add the moves of a step to the sums of all sleeps, in place, and start the sum of a new one.

    steps: the number of this step, counted from 1. lr: its learning rate.
    """
    scale, rate = scale_and_rate(steps, lr)
    ages = torch.arange(1, _AGES + 1, device=moves_S.device)
    places = (steps - ages).remainder(len(moves_S))
    moves_S.index_add_(0, places, (rate * scale * _RATIO ** ages.double()).to(moves_S.dtype))
    moves_S.index_fill_(0, steps.remainder(len(moves_S)).view(1), 0.0)


@torch.no_grad()
def catch_up(
    weights_VD: torch.Tensor,
    ids_U: torch.Tensor,
    *,
    mean: torch.Tensor,
    square: torch.Tensor,
    touched: torch.Tensor,
    moved: torch.Tensor,
    moves: torch.Tensor,
    steps: torch.Tensor,
    leaves_out_rows: bool = True,
) -> None:
    """Apply the pending updates of some rows of weights_VD, in place, and note them in `moved`.

    mean, square, touched, moved, moves and steps are those of `fresh_state`. leaves_out_rows: skip
    rows with nothing pending, which waits for the device; otherwise they are written back
    unchanged.
    """
    for ids in ids_U.split(ROWS_AT_ONCE[weights_VD.device.type] * 4):
        touched_U = touched.index_select(0, ids)
        moved_U = moved.index_select(0, ids)
        moves_U = moves[touched_U.remainder(len(moves))]
        # Nothing is pending for rows that never had a sparse gradient, nor for those that have
        # slept so long that a later sleep has their place: all their moves were applied before.
        sleeping = (touched_U > 0) & (steps - touched_U < len(moves))
        moves_U = moves_U.where(sleeping, moved_U)
        due_U = moves_U - moved_U
        if leaves_out_rows:
            due = due_U.nonzero()[:, 0]
            if not len(due):
                continue
            ids, touched_U, moved_U, moves_U, due_U = (
                values[due] for values in (ids, touched_U, moved_U, moves_U, due_U)
            )
        eps_U = _eps_of_sleep(steps - touched_U, touched_U, moved_U, moves_U)
        root_UD = square.index_select(0, ids).sqrt_()
        root_UD.add_(eps_U.to(root_UD.dtype)[:, None])
        move_UD = mean.index_select(0, ids).div_(root_UD).mul_(due_U[:, None])
        weights_VD.index_copy_(0, ids, weights_VD.index_select(0, ids).sub_(move_UD))
        moved.index_copy_(0, ids, moves_U)


def _eps_of_sleep(
    age_U: torch.Tensor, touched_U: torch.Tensor, moved_U: torch.Tensor, moves_U: torch.Tensor
) -> torch.Tensor:
    """Return dense Adam's eps at the mean age of the pending moves, float64 [U].

    It is added to the root that the square had when the row fell asleep. Ages are computed for a
    constant rate: move i weighs ratio^i, and `moved` gives the age until which moves were applied.
    """
    age_U = age_U.clamp(1, _AGES).double()
    left_U = _RATIO**age_U
    done_U = moved_U / moves_U.double().clamp(min=1e-30)
    left_before_U = (1 - done_U * (1 - left_U)).clamp(min=left_U)
    age_before_U = left_before_U.log() / math.log(_RATIO)
    due_U = (left_before_U - left_U).clamp(min=1e-30)
    mean_age_U = (age_before_U * left_before_U - age_U * left_U) / due_U + 1 / (1 - _RATIO)
    mean_age_U = mean_age_U.clamp(1, _AGES)  # with almost nothing pending, rounding decides it
    correction_U = (1 - BETA2 ** (touched_U + mean_age_U)).sqrt()
    return EPS * correction_U / BETA2 ** (mean_age_U / 2)


def same_shapes(saved: Any, expected: Any) -> bool:
    """Return True if two states have tensors of the same names and shapes, and equal other data."""
    return bool(_shapes(saved) == _shapes(expected))


def _shapes(state: Any) -> Any:
    """Return a state with the shapes of its tensors in their places."""
    if isinstance(state, dict):
        return {name: _shapes(value) for name, value in state.items()}
    if isinstance(state, list):
        return [_shapes(value) for value in state]
    return state.shape if isinstance(state, torch.Tensor) else state
