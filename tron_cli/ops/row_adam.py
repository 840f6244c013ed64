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

With decoupled weight decay d (AdamW), step t first multiplies the weights with 1 - lr_t d. Let P(t)
be the product of these factors until step t. Divided by P, weights do not decay, and the move of
step t is divided by P(t); sums therefore hold moves times P(step of falling asleep) / P(t). Of P
only the logarithm is kept, with its value at the start of each sleep and at each row's last update.

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


def fresh_state(parameters: Iterable[torch.Tensor], *, decays: bool = False) -> dict[str, Any]:
    """Return the state of RowAdam before the first step, in the form that a last.pt holds.

    steps: int64 (), steps taken. state: for each parameter, mean and square, shaped like the
    parameter; touched, int64 [V], the step of a row's last sparse gradient, 0 without one; and
    moved, float32 [V], how much of the sum of moves since then has been applied. moves: float32
    [S], the sum of the moves of a sleep that began at this place.

    decays: with weight decay. The state then has log_decay, float64 (), the logarithm of P; and
    log_decays, float64 [S], its value when a sleep began at this place. Parameters that are no
    vectors, which do not decay, have decayed, float64 [V], the logarithm of P applied to each row.
    """
    parameters = list(parameters)
    device = parameters[0].device
    state: dict[str, Any] = {
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
    if decays:
        state["log_decay"] = torch.zeros((), dtype=torch.float64, device=device)
        state["log_decays"] = torch.zeros(SLEEPS, dtype=torch.float64, device=device)
        for weights, tensors in zip(parameters, state["state"], strict=True):
            if weights.dim() > 1:
                tensors["decayed"] = torch.zeros(len(weights), dtype=torch.float64, device=device)
    return state


def scale_and_rate(
    steps: torch.Tensor, lr: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bias corrections of a step, float64 (): the factor of the square's root, and the
    learning rate divided by that of the mean."""
    steps = steps.double()
    return (1 - BETA2**steps).sqrt(), lr / (1 - BETA1**steps)


def add_moves(
    moves_S: torch.Tensor,
    steps: torch.Tensor,
    lr: torch.Tensor | float,
    *,
    log_decay: torch.Tensor | None = None,
    log_decays: torch.Tensor | None = None,
) -> None:
    """Add the moves of a step to the sums of all sleeps, in place, and start the sum of a new one.

    steps: the number of this step, counted from 1. lr: its learning rate. log_decay and log_decays:
    those of the state, the former with the decay of this step.
    """
    scale, rate = scale_and_rate(steps, lr)
    ages = torch.arange(1, _AGES + 1, device=moves_S.device)
    places = (steps - ages).remainder(len(moves_S))
    move = rate * scale * _RATIO ** ages.double()
    if log_decay is not None and log_decays is not None:
        move *= (log_decays[places] - log_decay).exp()
        log_decays.index_copy_(0, steps.remainder(len(moves_S)).view(1), log_decay.view(1))
    moves_S.index_add_(0, places, move.to(moves_S.dtype))
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
    decayed: torch.Tensor | None = None,
    log_decay: torch.Tensor | None = None,
    log_decays: torch.Tensor | None = None,
    leaves_out_rows: bool = True,
) -> None:
    """Apply the pending updates of some rows of weights_VD, in place.

    Notes them in `moved` and `decayed`. The tensors are those of `fresh_state`. leaves_out_rows:
    skip rows with nothing pending, which waits for the device; otherwise they are written back
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
            pending_U = due_U != 0
            if decayed is not None:
                pending_U |= decayed.index_select(0, ids) != log_decay
            due = pending_U.nonzero()[:, 0]
            if not len(due):
                continue
            ids, touched_U, moved_U, moves_U, due_U = (
                values[due] for values in (ids, touched_U, moved_U, moves_U, due_U)
            )
        eps_U = _eps_of_sleep(steps - touched_U, touched_U, moved_U, moves_U)
        root_UD = square.index_select(0, ids).sqrt_()
        root_UD.add_(eps_U.to(root_UD.dtype)[:, None])
        weights_UD = weights_VD.index_select(0, ids)
        if decayed is not None and log_decay is not None and log_decays is not None:
            weights_UD.mul_(_factor(log_decay - decayed.index_select(0, ids), weights_UD))
            since_U = log_decay - log_decays[touched_U.remainder(len(moves))]
            due_U = due_U * _factor(since_U, weights_UD)[:, 0]
            decayed.index_copy_(0, ids, log_decay.expand(len(ids)))
        move_UD = mean.index_select(0, ids).div_(root_UD).mul_(due_U[:, None])
        weights_VD.index_copy_(0, ids, weights_UD.sub_(move_UD))
        moved.index_copy_(0, ids, moves_U)


def _factor(logarithm_U: torch.Tensor, weights_UD: torch.Tensor) -> torch.Tensor:
    """Return exponentials [U, 1] of logarithms, in the dtype of weights."""
    return logarithm_U.exp().to(weights_UD.dtype)[:, None]


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
