"""A training step: random numbers, forward, backward, clip, update.

Every random number of a step comes from a generator seeded with (seed, step), so that a run that
was stopped and resumed ends with the weights of one that never was.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import Batch
from tron_cli.errors import InputError
from tron_cli.losses.sampled import build_loss
from tron_cli.models.base import Model
from tron_cli.registry import CATALOGUE_LOSSES
from tron_cli.sampling.logits import sampled_logits
from tron_cli.sampling.lookup import BeforeLookup, look_up, look_up_inputs
from tron_cli.sampling.negatives import Distribution, sample_negatives
from tron_cli.training.optim import RowAdam, clip_gradients, gradients_are_sparse
from tron_cli.training.profile import phase


def seed_generators(seed: int, *, step: int) -> None:
    """Seed torch's generators on all devices, as a function of the seed and the step alone."""
    mixed = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed >> np.uint64(1)))


def training_step(
    model: Model,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    config: ExperimentConfig,
    distribution: Distribution,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Take a step along the gradients of a batch; return its loss, without gradients."""
    return accumulated_step(model, optimizer, scaler, [batch], config, distribution, dtype)


def accumulated_step(
    model: Model,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Sequence[Batch],
    config: ExperimentConfig,
    distribution: Distribution,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Take a step along the gradients of the mean loss over the positions of some batches.

    Each batch draws its own negatives. Returns that loss, without gradients.
    """
    before_lookup = optimizer.catch_up if isinstance(optimizer, RowAdam) else None
    several = len(batches) > 1
    total = sum(map(_num_targets, batches)) if several else 1
    losses: list[torch.Tensor] = []
    for batch in batches:
        with torch.autocast(batch.inputs_N.device.type, dtype, enabled=dtype != torch.float32):
            loss = training_loss(model, batch, config, distribution, before_lookup=before_lookup)
        if several:
            loss = loss * (_num_targets(batch) / total)
        with phase("backward"):
            if not losses:
                optimizer.zero_grad()
            scaler.scale(loss).backward()
        losses.append(loss.detach())
    with phase("optimizer"):
        if several:
            _merge_rows(model)
        if config.clip_norm:
            scaler.unscale_(optimizer)
            clip_gradients(model.parameters(), config.clip_norm)
        scaler.step(optimizer)
        scaler.update()
    return torch.stack(losses).sum() if several else losses[0]


def _num_targets(batch: Batch) -> int | torch.Tensor:
    """Return the number of positions that have a target, on the device where it must be counted."""
    assert batch.targets_N is not None
    if not batch.padded or batch.predicting_P is not None:
        return len(batch.targets_N)
    return (batch.inputs_N != 0).sum()


def _merge_rows(model: Model) -> None:
    """Add up the gradients that several batches have left for the same row of a table."""
    for weights in model.parameters():
        if weights.grad is not None and weights.grad.is_sparse:
            weights.grad = weights.grad.coalesce()


def training_loss(
    model: Model,
    batch: Batch,
    config: ExperimentConfig,
    distribution: Distribution,
    *,
    before_lookup: BeforeLookup | None = None,
) -> torch.Tensor:
    """Return the mean loss over the positions of a batch that have a target.

    Draws the negatives. Raises InputError where the loss is not one number for each position.
    """
    if config.loss in CATALOGUE_LOSSES:
        loss_N = _catalogue_loss(model, batch, config, before_lookup)
    else:
        loss_N = _sampled_loss(model, batch, config, distribution, before_lookup)
    assert batch.targets_N is not None
    if loss_N.shape != batch.targets_N.shape:
        raise InputError(
            f"loss={config.loss} must give a number for each of {len(batch.targets_N):,} "
            f"positions, but gave a tensor of the shape {list(loss_N.shape)}; correct it"
        )
    if not batch.padded or batch.predicting_P is not None:
        return loss_N.mean()
    padding_N = batch.inputs_N == 0
    return loss_N.masked_fill(padding_N, 0.0).sum() / (~padding_N).sum()


def _sampled_loss(
    model: Model,
    batch: Batch,
    config: ExperimentConfig,
    distribution: Distribution,
    before_lookup: BeforeLookup | None,
) -> torch.Tensor:
    """Return the loss of each position with a target, among sampled negatives."""
    with phase("negatives"):
        negatives = sample_negatives(
            batch,
            distribution,
            num_uniform=config.num_uniform_negatives,
            num_batch=config.num_batch_negatives,
            sampling_style=config.sampling_style,
            reject_uniform_session_items=config.reject_uniform_session_items,
            reject_in_batch_items=config.reject_in_batch_items,
        )
    with phase("lookup"):
        sparse = gradients_are_sparse(config.optimizer)
        before = before_lookup if sparse else None
        looked = look_up(model.item_table, batch, negatives, sparse=sparse, before=before)
        inputs, rows_UD = looked.batch, looked.rows_UD
        if not config.shares_table:
            inputs, rows_UD = look_up_inputs(
                model.item_embedding.weight, batch, sparse=sparse, before=before
            )
    with phase("forward"):
        hidden_ND = _with_target(model(inputs, rows_UD), batch)
    with phase("logits"):
        positive_N, negative_NK, keep_NK = sampled_logits(
            hidden_ND,
            model.scored_rows(looked.rows_UD),
            looked.batch,
            looked.negatives,
            topk=config.topk_sampling_k if config.topk_sampling else None,
            mask_collisions=config.mask_collisions,
        )
    with phase("loss"):
        if config.final_activation:
            positive_N, negative_NK = F.elu(positive_N, 0.5), F.elu(negative_NK, 0.5)
        loss = build_loss(config, distribution.num_items)
        return loss(positive_N, negative_NK, keep_NK)


def _catalogue_loss(
    model: Model, batch: Batch, config: ExperimentConfig, before_lookup: BeforeLookup | None
) -> torch.Tensor:
    """Return the loss of each position with a target, among all items."""
    with phase("lookup"):
        sparse = gradients_are_sparse(config.optimizer) and not config.shares_table
        inputs, rows_UD = look_up_inputs(
            model.item_embedding.weight,
            batch,
            sparse=sparse,
            before=before_lookup if sparse else None,
        )
    with phase("forward"):
        hidden_ND = _with_target(model(inputs, rows_UD), batch)
    with phase("loss"):
        loss = build_loss(config, model.num_items)
        return loss(hidden_ND, model.scored_rows(model.item_table), batch.targets_N)


def _with_target(hidden_ND: torch.Tensor, batch: Batch) -> torch.Tensor:
    return hidden_ND if batch.predicting_P is None else hidden_ND[batch.predicting_P]
