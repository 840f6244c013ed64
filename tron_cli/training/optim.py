"""Optimizers for dense and sparse gradients, clipping, and the learning rate of a step.

The gradient of a parameter is dense or, for a table, a sparse tensor of the rows touched. State and
learning rate are tensors on the device from the start, so that a step can be recorded and replayed
and a saved state can be copied into place.

Shapes: V rows of a table, U rows that a step touches, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tron_cli.config import ExperimentConfig
from tron_cli.distributed.tables import TableShard
from tron_cli.errors import InputError
from tron_cli.models.base import Model
from tron_cli.ops import row_adam
from tron_cli.registry import OPTIMIZERS, load, settings_of


class Adam(torch.optim.Adam):
    """torch.optim.Adam, fused, for dense gradients; with weight_decay, torch.optim.AdamW.

    weight_decay: decoupled, of matrices and tables; biases and norms, which are vectors, have none.
    bias_table: a table whose last column holds biases, which have none either.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        *,
        weight_decay: float = 0.0,
        bias_table: torch.Tensor | None = None,
    ) -> None:
        parameters = list(parameters)
        device = parameters[0].device
        on_gpu = device.type == "cuda"
        decayed = [
            weights
            for weights in parameters
            if weight_decay and weights.dim() > 1 and weights is not bias_table
        ]
        others = [weights for weights in parameters if not any(weights is one for one in decayed)]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": weight_decay, "decoupled_weight_decay": True},
            {"params": others},
        ]
        super().__init__(
            [group for group in groups if group["params"]],
            lr=_on_device(lr, device),
            fused=True,
            capturable=on_gpu,
        )
        self._parameters = parameters
        self._weight_decay = weight_decay
        self._bias_table = bias_table if weight_decay else None
        # torch would warn, but some steps are not recorded on purpose: the first of each size, and
        # those of odd sizes.
        self._warned_capturable_if_run_uncaptured = True
        for weights in parameters:
            self.state[weights] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(weights),
                "exp_avg_sq": torch.zeros_like(weights),
            }

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters that have a gradient."""
        table = self._bias_table
        if table is not None and table.grad is not None:
            decay = 1 - self.param_groups[0]["lr"] * self._weight_decay
            overflow = getattr(self, "found_inf", None)  # a GradScaler's, if it skips the step
            if overflow is not None:
                decay = decay.where(overflow == 0, 1.0)
            table[:, :-1].mul_(decay.to(table.dtype))
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        """Return the steps of each parameter, and the tensors of each, which are no copies."""
        states = [self.state[weights] for weights in self._parameters]
        return {
            "steps": torch.stack([state["step"] for state in states]),
            "state": [
                {"mean": state["exp_avg"], "square": state["exp_avg_sq"]} for state in states
            ],
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Copy a saved state; in older checkpoints all parameters share one count of steps.

        Raises InputError where the state is that of another optimizer.
        """
        own = self.state_dict()
        if isinstance(saved, dict) and getattr(saved.get("steps"), "ndim", None) == 0:
            saved = {**saved, "steps": saved["steps"].expand(len(own["steps"]))}
        _copy_state(saved, own)
        for weights, steps in zip(self._parameters, own["steps"], strict=True):
            self.state[weights]["step"].copy_(steps)


class RowOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that update the rows of a sparse gradient, and no others.

    leaves_out_rows: True if rows of a sparse gradient that are all zero are left out. Otherwise
    they are written back unchanged, since counting them would mean waiting for the GPU; rows must
    then be distinct, except for those that are zero.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        parameters = list(parameters)
        device = parameters[0].device
        super().__init__(parameters, {"lr": _on_device(lr, device)})
        self.leaves_out_rows = device.type == "cpu"
        self._saved = self._fresh_state(parameters)
        self.steps: torch.Tensor = self._saved["steps"]
        self.state.update(zip(parameters, self._saved["state"], strict=True))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        lr = self.param_groups[0]["lr"]
        dense: list[torch.Tensor] = []
        rows: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = []
        for weights in self.param_groups[0]["params"]:
            gradient = weights.grad
            if gradient is None:
                continue
            if not gradient.is_sparse:
                dense.append(weights)
            elif self.leaves_out_rows:
                rows.append((weights, *_touched_rows(gradient)))
            else:
                rows.append((weights, gradient._indices()[0], gradient._values()))
        for weights, ids_U, _ in rows:
            self._wake(weights, ids_U)
        self.steps += 1
        self._begin_step(lr)
        for weights, ids_U, gradient_UD in rows:
            size = row_adam.ROWS_AT_ONCE[weights.device.type]
            for ids, part in zip(ids_U.split(size), gradient_UD.split(size), strict=True):
                if len(ids):
                    self._step_rows(weights, ids, part, lr)
        if dense:
            self._step_dense(dense, lr)

    def state_dict(self) -> dict[str, Any]:
        """Return the steps taken and the tensors of each parameter, which are no copies."""
        return self._saved

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Copy a saved state, whose counts of steps are floats in older checkpoints.

        Raises InputError where the state is that of another optimizer.
        """
        _copy_state(saved, self._saved)

    def _fresh_state(self, parameters: list[nn.Parameter]) -> dict[str, Any]:
        """Return steps, the tensors of each parameter as `state`, and what else is saved."""
        raise NotImplementedError

    def _wake(self, weights: torch.Tensor, ids_U: torch.Tensor) -> None:
        """Prepare the rows of a table that a step is about to update."""

    def _begin_step(self, lr: torch.Tensor) -> None:
        """Do what a step does before it looks at gradients."""

    def _step_dense(self, parameters: list[torch.Tensor], lr: torch.Tensor) -> None:
        raise NotImplementedError

    def _step_rows(
        self,
        weights_VD: nn.Parameter,
        ids_U: torch.Tensor,
        gradient_UD: torch.Tensor,
        lr: torch.Tensor,
    ) -> None:
        raise NotImplementedError

    def _write(
        self,
        table: torch.Tensor,
        ids_U: torch.Tensor,
        values: torch.Tensor,
        gradient_UD: torch.Tensor,
    ) -> None:
        """Write values into rows of a table of weights or state that have a gradient."""
        if not self.leaves_out_rows:
            awake = (gradient_UD.norm(dim=1) != 0).view(-1, *[1] * (values.dim() - 1))
            values = values.where(awake, table.index_select(0, ids_U))
        table.index_copy_(0, ids_U, values)


class RowAdam(RowOptimizer):
    """Adam on sparse gradients of tables, with the weights of dense Adam at the cost of rows.

    A row that is not looked up sleeps, and `catch_up` applies the updates of dense Adam that are
    pending for it (ops/row_adam.py). Each step also catches up a few rows of a table in turn, so
    that no sum of pending updates is overwritten before it is applied.

    weight_decay: decoupled, with the weights of torch.optim.AdamW; vectors have none. shards: for
    tables of which other processes have other rows, those of this one. Rows have their turn in the
    same step with any number of processes.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        *,
        weight_decay: float = 0.0,
        shards: Mapping[torch.Tensor, TableShard] | None = None,
    ) -> None:
        self._weight_decay = weight_decay
        self._shards = shards or {}
        super().__init__(parameters, lr)

    def _fresh_state(self, parameters: list[nn.Parameter]) -> dict[str, Any]:
        return row_adam.fresh_state(parameters, decays=self._weight_decay > 0)

    def catch_up(self, weights: torch.Tensor, ids_U: torch.Tensor | None = None) -> None:
        """Apply all pending updates of rows of a table (None: of all its rows)."""
        if ids_U is None:
            ids_U = torch.arange(len(weights), device=weights.device)
        row_adam.catch_up(
            weights,
            ids_U,
            **self.state[weights],
            moves=self._saved["moves"],
            steps=self.steps,
            **self._log_decays,
            leaves_out_rows=self.leaves_out_rows,
        )

    def _wake(self, weights: torch.Tensor, ids_U: torch.Tensor) -> None:
        """Catch up these rows, if the lookup has not done so, and those whose turn it is."""
        # Every row has its turn in half the time for which sums are kept.
        shard = self._shards.get(weights)
        rows = len(weights) if shard is None else shard.num_rows
        count = math.ceil(2 * rows / len(self._saved["moves"]))
        turn = torch.arange(count, device=ids_U.device).add_(self.steps * count).remainder_(rows)
        self.catch_up(weights, torch.cat([ids_U, turn if shard is None else shard.held(turn)]))

    @property
    def _log_decays(self) -> dict[str, torch.Tensor]:
        names = ("log_decay", "log_decays") if self._weight_decay else ()
        return {name: self._saved[name] for name in names}

    def _begin_step(self, lr: torch.Tensor) -> None:
        if self._weight_decay:
            of_step = torch.log1p(-lr.double() * self._weight_decay)
            self._saved["log_decay"] += of_step
            for weights in self.param_groups[0]["params"]:
                if weights.grad is None and "decayed" in self.state[weights]:
                    self.state[weights]["decayed"] += of_step  # it stays as it is
        row_adam.add_moves(self._saved["moves"], self.steps, lr, **self._log_decays)

    def _step_dense(self, parameters: list[torch.Tensor], lr: torch.Tensor) -> None:
        decayed = [weights for weights in parameters if "decayed" in self.state[weights]]
        others = [weights for weights in parameters if "decayed" not in self.state[weights]]
        if decayed:
            self._fused(torch._fused_adamw_, decayed, lr, self._weight_decay)
            for weights in decayed:
                self.state[weights]["decayed"].copy_(self._saved["log_decay"])
        if others:
            self._fused(torch._fused_adam_, others, lr, 0.0)

    def _fused(
        self,
        step: Callable[..., None],
        parameters: list[torch.Tensor],
        lr: torch.Tensor,
        weight_decay: float,
    ) -> None:
        step(
            parameters,
            [weights.grad for weights in parameters if weights.grad is not None],
            [self.state[weights]["mean"] for weights in parameters],
            [self.state[weights]["square"] for weights in parameters],
            [],
            # Above 2^24 float32 rounds the step, when the bias corrections are 1 in any case.
            [self.steps.to(lr.dtype)] * len(parameters),
            lr=lr,
            beta1=row_adam.BETA1,
            beta2=row_adam.BETA2,
            weight_decay=weight_decay,
            eps=row_adam.EPS,
            amsgrad=False,
            maximize=False,
        )

    def _step_rows(
        self,
        weights_VD: nn.Parameter,
        ids_U: torch.Tensor,
        gradient_UD: torch.Tensor,
        lr: torch.Tensor,
    ) -> None:
        state = self.state[weights_VD]
        # In float64: the rounding error of a float32 beta2 would grow with the age.
        age_U1 = (self.steps - state["touched"][ids_U])[:, None].double()
        dtype = gradient_UD.dtype
        mean_UD = state["mean"].index_select(0, ids_U).mul_((row_adam.BETA1**age_U1).to(dtype))
        mean_UD.add_(gradient_UD, alpha=1 - row_adam.BETA1)
        square_UD = state["square"].index_select(0, ids_U).mul_((row_adam.BETA2**age_U1).to(dtype))
        square_UD.addcmul_(gradient_UD, gradient_UD, value=1 - row_adam.BETA2)
        self._write(state["touched"], ids_U, self.steps.expand(len(ids_U)), gradient_UD)
        moved_U = torch.zeros(len(ids_U), device=ids_U.device)
        self._write(state["moved"], ids_U, moved_U, gradient_UD)
        self._write(state["mean"], ids_U, mean_UD, gradient_UD)
        self._write(state["square"], ids_U, square_UD, gradient_UD)
        scale, rate = row_adam.scale_and_rate(self.steps, lr)
        root_UD = square_UD.sqrt_().div_(scale).add_(row_adam.EPS)
        move_UD = mean_UD.mul_(-rate).div_(root_UD)
        weights_UD = weights_VD.index_select(0, ids_U)
        if "decayed" in state:  # until the step before: these rows are awake
            weights_UD *= 1 - (lr * self._weight_decay).to(dtype)
            log_decay_U = self._saved["log_decay"].expand(len(ids_U))
            self._write(state["decayed"], ids_U, log_decay_U, gradient_UD)
        self._write(weights_VD, ids_U, weights_UD + move_UD, gradient_UD)


class Adagrad(RowOptimizer):
    """Duchi et al. (2011), with torch.optim.Adagrad's defaults; rows without a gradient stay.

    torch.optim.Adagrad cannot be recorded as a CUDA graph, since it reads the learning rate and
    counts the distinct rows of a sparse gradient on the host.
    """

    eps = 1e-10

    def _fresh_state(self, parameters: list[nn.Parameter]) -> dict[str, Any]:
        return {
            "steps": torch.zeros((), dtype=torch.int64, device=parameters[0].device),
            "state": [{"square": torch.zeros_like(weights)} for weights in parameters],
        }

    def _step_dense(self, parameters: list[torch.Tensor], lr: torch.Tensor) -> None:
        for weights in parameters:
            square, gradient = self.state[weights]["square"], weights.grad
            assert gradient is not None
            square.addcmul_(gradient, gradient)
            weights.sub_(lr * gradient / (square.sqrt() + self.eps))

    def _step_rows(
        self,
        weights_VD: nn.Parameter,
        ids_U: torch.Tensor,
        gradient_UD: torch.Tensor,
        lr: torch.Tensor,
    ) -> None:
        square = self.state[weights_VD]["square"]
        square_UD = square.index_select(0, ids_U).addcmul_(gradient_UD, gradient_UD)
        self._write(square, ids_U, square_UD, gradient_UD)
        move_UD = (gradient_UD * -lr).div_(square_UD.sqrt_().add_(self.eps))
        self._write(weights_VD, ids_U, weights_VD.index_select(0, ids_U) + move_UD, gradient_UD)


def _on_device(lr: float, device: torch.device) -> torch.Tensor:
    """Return a learning rate as a tensor; torch's CUDA kernel needs a float32 one."""
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    return torch.full((), lr, dtype=dtype, device=device)


def _copy_state(saved: Any, own: dict[str, Any]) -> None:
    """Copy a saved state into tensors; torch's load_state_dict would make step counts floats."""
    if not row_adam.same_shapes(saved, own):
        raise InputError(
            "the saved state of the optimizer is that of another optimizer or of another "
            "version of tron; start a new run"
        )
    pairs = [(own, saved), *zip(own["state"], saved["state"], strict=True)]
    for values, saved_values in pairs:
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                value.copy_(saved_values[name])


def _touched_rows(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and values of a sparse gradient, each row once, without those that are zero."""
    ids_U = gradient._indices()[0]
    # Gradients of lookups have each row once, but autograd drops the flag that says so.
    if bool((ids_U[1:] <= ids_U[:-1]).any()):
        gradient = gradient.coalesce()
    ids_U, values_UD = gradient._indices()[0], gradient._values()
    # Most negatives that were looked up are not among the top-k.
    touched = (values_UD.norm(dim=1) != 0).nonzero()[:, 0]
    return ids_U[touched], values_UD.index_select(0, touched)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step on the device, where a recorded step finds it."""
    for group in optimizer.param_groups:
        group["lr"].fill_(lr)


def catch_up_all(optimizer: torch.optim.Optimizer) -> None:
    """Apply all pending updates, so that the parameters can be evaluated or saved."""
    if isinstance(optimizer, RowAdam):
        for weights in optimizer.param_groups[0]["params"]:
            if weights.dim() > 1:  # vectors have dense gradients, and nothing is pending
                optimizer.catch_up(weights)


def faster_adam(num_items: int, rows: float, *, topk: bool) -> str:
    """Return adam or row_adam, whichever takes less time on a table of `num_items` rows.

    rows: how many of them a step looks up; topk: True if most of those have no gradient. Dense Adam
    takes time for each row of the table, RowAdam for each row looked up, more where it has a
    gradient, and for its own operations. `python -m benchmarks.optimizers` on a CPU finds them
    equal without top-k at 2,334 rows and 20,000 items, or 6,316 rows and 75,000 items; with top-k
    at 3,300 rows and 28,000 items, or 17,000 rows and 50,000 to 60,000 items. Near these points
    they differ by a few percent.
    """
    return "row_adam" if num_items > 10_000 + rows * (3 if topk else 10) else "adam"


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, **settings: Any
) -> torch.optim.Optimizer:
    """Return the optimizer of a name, with its settings; dense Adam for an unresolved `auto`."""
    return load(OPTIMIZERS[name])(parameters, lr, **settings)


def optimizer_of(config: ExperimentConfig, model: Model) -> torch.optim.Optimizer:
    """Return the optimizer that a config names, with its settings, for a model's parameters."""
    bias_table = model.item_table if config.output_bias else None
    shards = dict.fromkeys(model.divided_tables, model.shard)
    settings = settings_of(
        OPTIMIZERS[config.optimizer], config, bias_table=bias_table, shards=shards
    )
    return build_optimizer(config.optimizer, model.parameters(), config.lr, **settings)


def gradients_are_sparse(optimizer: str) -> bool:
    """Return True if the gradients of tables hold only the rows touched."""
    return OPTIMIZERS[optimizer].sparse_gradients


def clip_gradients(
    parameters: Iterable[nn.Parameter],
    clip_norm: float,
    divided: Sequence[torch.Tensor] = (),
    add_up: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.clone,
) -> None:
    """Scale all gradients so that their joint norm is at most clip_norm.

    divided: tables of which other processes have other rows; add_up sums over the processes.
    """
    values: list[torch.Tensor] = []  # of distinct rows
    norms: list[torch.Tensor] = []
    norms_of_divided: list[torch.Tensor] = []
    for weights in parameters:
        if weights.grad is None:
            continue
        values.append(weights.grad._values() if weights.grad.is_sparse else weights.grad)
        is_divided = any(weights is table for table in divided)
        (norms_of_divided if is_divided else norms).append(values[-1].norm())
    if norms_of_divided:
        norms.append(add_up(torch.stack(norms_of_divided).square().sum()).sqrt())
    scale = (clip_norm / (torch.stack(norms).norm() + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(scale)


def learning_rate(
    step: int, *, lr: float, schedule: str, warmup_steps: int, total_steps: int
) -> float:
    """Return the rate of step 0, 1, ...: linear warm-up, then constant or a half cosine to 0."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
