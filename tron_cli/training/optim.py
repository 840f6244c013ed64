"""Optimizers whose cost follows the rows that a step touches, and the learning rate of a step.

The gradient of a parameter is dense, or of a table a sparse tensor of the rows touched. torch.optim
is not used: its SparseAdam keeps the moments of rows that sleep, and building any of its optimizers
imports torch's compiler, which takes a second.

Shapes: V rows of a table, U rows that a step touches, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tron_cli.errors import InputError
from tron_cli.registry import OPTIMIZERS, load

# Rows updated at once: few enough for a CPU's cache to hold what belongs to them.
_ROWS_AT_ONCE = {"cpu": 1024, "cuda": 1 << 22}
# Of RowAdam: the moves of a sleep that count, and how many steps the sum of a sleep is kept.
_MOVES = 256
_SLEEPS = 1 << 16


class Optimizer:
    """The interface of an optimizer to the training loop and to torch's GradScaler.

    param_groups: one group, whose "lr" is the rate of the next step. state: tensors of each
    parameter, in their order. leaves_out_rows: whether rows of a sparse gradient that are all zero
    are left out, or else written back as they were: a GPU would have to be waited for to say how
    many they are. Rows must then be distinct, but for those that are zero.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        self.parameters = list(parameters)
        self.param_groups: list[dict[str, Any]] = [{"params": self.parameters, "lr": lr}]
        self.state: list[dict[str, torch.Tensor]] = [
            self._fresh_state(weights) for weights in self.parameters
        ]
        device = self.parameters[0].device
        # On the device, so that a step waits for nothing; torch's CUDA kernel wants a narrow rate.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self._lr = torch.full((), lr, dtype=dtype, device=device)
        self._loaded_lr = lr
        self.leaves_out_rows = device.type == "cpu"

    def set_rate(self, lr: float) -> None:
        """Set the learning rate of the next step, also where a recorded step finds it."""
        self.param_groups[0]["lr"] = lr
        self.load_lr()

    def load_lr(self) -> None:
        """Put the rate of the next step on the device: what a recorded `step` has to find there."""
        if self.param_groups[0]["lr"] != self._loaded_lr:
            self._loaded_lr = self.param_groups[0]["lr"]
            self._lr.fill_(self._loaded_lr)

    @torch.no_grad()
    def step(self) -> None:
        """Step along the gradients; a parameter without one stays as it is."""
        self.load_lr()
        dense, rows = [], []
        for weights, state in zip(self.parameters, self.state, strict=True):
            gradient = weights.grad
            if gradient is None:
                continue
            if not gradient.is_sparse:
                dense.append((weights, gradient, state))
                continue
            if self.leaves_out_rows:
                ids_U, gradient_UD = _touched_rows(gradient)
            else:
                ids_U, gradient_UD = gradient._indices()[0], gradient._values()
            rows.append((weights, state, ids_U, gradient_UD))
        for weights, _, ids_U, _ in rows:
            self._wake(weights, ids_U)
        self.steps += 1
        self._begin_step()
        for weights, state, ids_U, gradient_UD in rows:
            size = _ROWS_AT_ONCE[weights.device.type]
            for ids, part in zip(ids_U.split(size), gradient_UD.split(size), strict=True):
                if len(ids):
                    self._step_rows(weights, state, ids, part)
        if dense:
            self._step_dense(*(list(column) for column in zip(*dense, strict=True)))

    def catch_up(self, weights: torch.Tensor, ids_U: torch.Tensor | None = None) -> None:
        """Bring rows of a table (None: all) to where the steps so far put them."""

    def catch_up_all(self) -> None:
        """Bring all parameters to where the steps so far put them, to evaluate with them."""
        for weights in self.parameters:
            self.catch_up(weights)

    def zero_grad(self) -> None:
        for weights in self.parameters:
            weights.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "state": self.state}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Copy a saved state, whose clocks may be floats, as earlier versions wrote them.

        Raises InputError where the state is that of another optimizer.
        """
        if _shapes(saved) != _shapes(self.state_dict()):
            raise InputError(
                "the saved state of the optimizer is that of another optimizer or of another "
                "version of tron; start a new run"
            )
        self.steps.copy_(saved["steps"])
        for state, values in zip(self.state, saved["state"], strict=True):
            for name, value in values.items():
                state[name].copy_(value)

    def _fresh_state(self, weights: nn.Parameter) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def _wake(self, weights: torch.Tensor, ids_U: torch.Tensor) -> None:
        """Prepare the rows of a table that a step is about to update."""

    def _begin_step(self) -> None:
        """Do what a step does before it looks at gradients."""

    def _step_dense(
        self,
        weights: list[torch.Tensor],
        gradients: list[torch.Tensor],
        states: list[dict[str, torch.Tensor]],
    ) -> None:
        raise NotImplementedError

    def _step_rows(
        self,
        weights_VD: torch.Tensor,
        state: dict[str, torch.Tensor],
        ids_U: torch.Tensor,
        gradient_UD: torch.Tensor,
    ) -> None:
        raise NotImplementedError

    def _write(
        self,
        table: torch.Tensor,
        ids_U: torch.Tensor,
        values: torch.Tensor,
        gradient_UD: torch.Tensor,
    ) -> None:
        """Put values into rows of a table of weights or state, but for rows that sleep."""
        if not self.leaves_out_rows:
            awake = (gradient_UD.norm(dim=1) != 0).view(-1, *[1] * (values.dim() - 1))
            values = values.where(awake, table.index_select(0, ids_U))
        table.index_copy_(0, ids_U, values)


class Adam(Optimizer):
    """Kingma and Ba (2015), with torch.optim.Adam's defaults, for dense gradients."""

    beta1, beta2, eps = 0.9, 0.999, 1e-8

    def _fresh_state(self, weights: nn.Parameter) -> dict[str, torch.Tensor]:
        return {"mean": torch.zeros_like(weights), "square": torch.zeros_like(weights)}

    def _step_dense(
        self,
        weights: list[torch.Tensor],
        gradients: list[torch.Tensor],
        states: list[dict[str, torch.Tensor]],
    ) -> None:
        torch._fused_adam_(
            weights,
            gradients,
            [state["mean"] for state in states],
            [state["square"] for state in states],
            [],
            # Above 2^24 float32 rounds the step, of which nothing is felt any more by then.
            [self.steps.to(self._lr.dtype)] * len(weights),
            lr=self._lr,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=0.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )


class RowAdam(Adam):
    """Adam on sparse gradients of tables, with the weights of dense Adam at the cost of rows.

    In dense Adam a row without a gradient goes on along its mean, which decays. Here it sleeps, and
    `catch_up` makes all the moves that it missed when it is next looked at. After i steps of sleep
    the ratio of mean and root of the square is r^i times what it was, r = beta1 / sqrt(beta2), so
    the moves of one sleep differ by factors that all elements share: with rate lr_t in step t

        sum over t of lr_t sqrt(1 - beta2^t) / (1 - beta1^t) r^(t - touched)

    times mean / (sqrt(square) + eps'). The one approximation is eps', which changes by half a
    percent in ten steps, faster in the first thousand: it is taken at the mean age of a sleep's
    moves. The sum of a sleep that began in step t grows for the _MOVES steps in which r^i counts,
    and is kept in `_moves`, at t modulo its length, for _SLEEPS steps. Each step catches up a few
    rows of a table in turn, so that all have made their moves by then.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, lr)
        device = self.parameters[0].device
        self._moves = torch.zeros(_SLEEPS, device=device)
        self._ages = torch.arange(1, _MOVES + 1, device=device)
        self._ratios = (self.beta1 / math.sqrt(self.beta2)) ** self._ages.double()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "moves": self._moves}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        self._moves.copy_(saved["moves"])

    def _fresh_state(self, weights: nn.Parameter) -> dict[str, torch.Tensor]:
        state = super()._fresh_state(weights)
        # The step of a row's last gradient, and how much of the moves since it has made.
        state["touched"] = torch.zeros(len(weights), dtype=torch.int64, device=weights.device)
        state["moved"] = torch.zeros(len(weights), device=weights.device)
        return state

    def _wake(self, weights: torch.Tensor, ids_U: torch.Tensor) -> None:
        """Catch up these rows, which have nothing due if they were looked up, and those in turn."""
        count = math.ceil(2 * len(weights) / _SLEEPS)  # all rows in half the time that there is
        turn = torch.arange(count, device=ids_U.device).add_(self.steps * count)
        self.catch_up(weights, torch.cat([ids_U, turn.remainder_(len(weights))]))

    def _begin_step(self) -> None:
        """Add this step to the moves of all who sleep; a sleep may begin now."""
        scale, rate = self._scale_and_rate()
        sleeps = (self.steps - self._ages).remainder(_SLEEPS)
        self._moves.index_add_(0, sleeps, (rate * scale * self._ratios).to(self._moves.dtype))
        now = self.steps.remainder(_SLEEPS).view(1)
        self._moves.index_fill_(0, now, 0.0)

    def _scale_and_rate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Bias corrections of this step: the root of the square's, and the mean's with the rate."""
        steps = self.steps.double()
        return (1 - self.beta2**steps).sqrt(), self._lr / (1 - self.beta1**steps)

    @torch.no_grad()
    def catch_up(self, weights: torch.Tensor, ids_U: torch.Tensor | None = None) -> None:
        state = next(
            state
            for parameter, state in zip(self.parameters, self.state, strict=True)
            if parameter is weights
        )
        if ids_U is None:
            ids_U = torch.arange(len(weights), device=weights.device)
        for ids in ids_U.split(_ROWS_AT_ONCE[weights.device.type] * 4):
            touched_U = state["touched"].index_select(0, ids)
            moved_U = state["moved"].index_select(0, ids)
            moves_U = self._moves[touched_U.remainder(_SLEEPS)]
            # Nothing is due of rows that never had a sparse gradient, nor of those that slept so
            # long that a later sleep has their place: they have made all moves.
            sleeping = (touched_U > 0) & (self.steps - touched_U < _SLEEPS)
            moves_U = moves_U.where(sleeping, moved_U)
            due_U = moves_U - moved_U
            if self.leaves_out_rows:
                due = due_U.nonzero()[:, 0]
                if not len(due):
                    continue
                ids, touched_U, moved_U, moves_U, due_U = (
                    values[due] for values in (ids, touched_U, moved_U, moves_U, due_U)
                )
            eps_U = self._eps_of_sleep(touched_U, moved_U, moves_U)
            root_UD = state["square"].index_select(0, ids).sqrt_()
            root_UD.add_(eps_U.to(root_UD.dtype)[:, None])
            move_UD = state["mean"].index_select(0, ids).div_(root_UD).mul_(due_U[:, None])
            weights.index_copy_(0, ids, weights.index_select(0, ids).sub_(move_UD))
            state["moved"].index_copy_(0, ids, moves_U)

    def _eps_of_sleep(
        self, touched_U: torch.Tensor, moved_U: torch.Tensor, moves_U: torch.Tensor
    ) -> torch.Tensor:
        """Dense Adam's eps at the mean age of the moves that are due, float64 [U].

        It is what stands beside the root that the square had when the row fell asleep. Ages are
        those of a constant rate: move i counts ratio^i, and what was moved tells until which age.
        """
        ratio = self.beta1 / math.sqrt(self.beta2)
        age_U = (self.steps - touched_U).clamp(1, _MOVES).double()
        left_U = ratio**age_U
        done_U = moved_U / moves_U.double().clamp(min=1e-30)
        left_before_U = (1 - done_U * (1 - left_U)).clamp(min=left_U)
        age_before_U = left_before_U.log() / math.log(ratio)
        due_U = (left_before_U - left_U).clamp(min=1e-30)
        mean_age_U = (age_before_U * left_before_U - age_U * left_U) / due_U + 1 / (1 - ratio)
        mean_age_U = mean_age_U.clamp(1, _MOVES)  # where next to nothing is due it is rounding's
        correction_U = (1 - self.beta2 ** (touched_U + mean_age_U)).sqrt()
        return self.eps * correction_U / self.beta2 ** (mean_age_U / 2)

    def _step_rows(
        self,
        weights_VD: torch.Tensor,
        state: dict[str, torch.Tensor],
        ids_U: torch.Tensor,
        gradient_UD: torch.Tensor,
    ) -> None:
        # In float64: of a float32 beta2 the rounding grows with the age.
        age_U1 = (self.steps - state["touched"][ids_U])[:, None].double()
        dtype = gradient_UD.dtype
        mean_UD = state["mean"].index_select(0, ids_U).mul_((self.beta1**age_U1).to(dtype))
        mean_UD.add_(gradient_UD, alpha=1 - self.beta1)
        square_UD = state["square"].index_select(0, ids_U).mul_((self.beta2**age_U1).to(dtype))
        square_UD.addcmul_(gradient_UD, gradient_UD, value=1 - self.beta2)
        self._write(state["touched"], ids_U, self.steps.expand(len(ids_U)), gradient_UD)
        moved_U = torch.zeros(len(ids_U), device=ids_U.device)
        self._write(state["moved"], ids_U, moved_U, gradient_UD)
        self._write(state["mean"], ids_U, mean_UD, gradient_UD)
        self._write(state["square"], ids_U, square_UD, gradient_UD)
        scale, rate = self._scale_and_rate()
        move_UD = mean_UD.mul_(-rate).div_(square_UD.sqrt_().div_(scale).add_(self.eps))
        self._write(weights_VD, ids_U, weights_VD.index_select(0, ids_U) + move_UD, gradient_UD)


class Adagrad(Optimizer):
    """Duchi et al. (2011), with torch.optim.Adagrad's defaults. Sleeping rows lose nothing."""

    eps = 1e-10

    def _fresh_state(self, weights: nn.Parameter) -> dict[str, torch.Tensor]:
        return {"square": torch.zeros_like(weights)}

    def _step_dense(
        self,
        weights: list[torch.Tensor],
        gradients: list[torch.Tensor],
        states: list[dict[str, torch.Tensor]],
    ) -> None:
        for parameter, gradient, state in zip(weights, gradients, states, strict=True):
            state["square"].addcmul_(gradient, gradient)
            parameter.sub_(self._lr * gradient / (state["square"].sqrt() + self.eps))

    def _step_rows(
        self,
        weights_VD: torch.Tensor,
        state: dict[str, torch.Tensor],
        ids_U: torch.Tensor,
        gradient_UD: torch.Tensor,
    ) -> None:
        square_UD = state["square"].index_select(0, ids_U).addcmul_(gradient_UD, gradient_UD)
        self._write(state["square"], ids_U, square_UD, gradient_UD)
        move_UD = (gradient_UD * -self._lr).div_(square_UD.sqrt_().add_(self.eps))
        self._write(weights_VD, ids_U, weights_VD.index_select(0, ids_U) + move_UD, gradient_UD)


def _shapes(saved: Any) -> Any:
    """Plain data with the shapes of its tensors in their places."""
    if isinstance(saved, dict):
        return {name: _shapes(value) for name, value in saved.items()}
    if isinstance(saved, list):
        return [_shapes(value) for value in saved]
    return saved.shape if isinstance(saved, torch.Tensor) else saved


def _touched_rows(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and values of a sparse gradient, each row once, without those that are all zero."""
    ids_U = gradient._indices()[0]
    # Gradients of lookups have each row once, but autograd drops the mark that says it.
    if bool((ids_U[1:] <= ids_U[:-1]).any()):
        gradient = gradient.coalesce()
    ids_U, values_UD = gradient._indices()[0], gradient._values()
    # Most negatives that were looked up are not among the top-k.
    touched = (values_UD.norm(dim=1) != 0).nonzero()[:, 0]
    return ids_U[touched], values_UD.index_select(0, touched)


def faster_adam(num_items: int, rows: float, *, topk: bool) -> str:
    """Return adam or row_adam, whichever takes less time on a table of `num_items` rows.

    rows: how many of them a step looks up; topk: whether most of those have no gradient. Dense Adam
    takes time for each row of the table, RowAdam for each row looked up, more where it has a
    gradient, and for its own operations. As measured by `python -m benchmarks.optimizers` on a CPU:
    at 2,334 rows without top-k they are even at 20,000 items, at 6,316 at 75,000; with top-k at
    3,300 rows at 28,000, at 17,000 at 50,000 to 60,000. Near the line they differ by a few percent.
    """
    return "row_adam" if num_items > 10_000 + rows * (3 if topk else 10) else "adam"


def build_optimizer(name: str, parameters: Iterable[nn.Parameter], lr: float) -> Optimizer:
    """Return the optimizer of a config's `optimizer`; dense Adam for auto that nobody resolved."""
    return load(OPTIMIZERS[name])(parameters, lr)


def gradients_are_sparse(optimizer: str) -> bool:
    """Say whether the gradients of tables hold only the rows touched."""
    return OPTIMIZERS[optimizer].sparse_gradients


def clip_gradients(parameters: Iterable[nn.Parameter], clip_norm: float) -> None:
    """Scale all gradients so that their norm together is at most clip_norm."""
    gradients = [weights.grad for weights in parameters if weights.grad is not None]
    values = [
        gradient._values() if gradient.is_sparse else gradient for gradient in gradients
    ]  # of distinct rows
    norm = torch.stack([value.norm() for value in values]).norm()
    scale = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(scale)


def learning_rate(
    step: int, *, lr: float, schedule: str, warmup_steps: int, total_steps: int
) -> float:
    """The rate of step 0, 1, ...: linear warm-up to `lr`, then constant or a half cosine to 0."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
