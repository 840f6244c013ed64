"""A training step: random numbers, forward, backward, clip, update.

Every random number of a step comes from a generator seeded with (seed, step), so that a run that
was stopped and resumed ends with the weights of one that never was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import Batch, Share, whole
from tron_cli.distributed.cross_entropy import sharded_ce
from tron_cli.distributed.gradients import add_up_gradients
from tron_cli.distributed.processes import ALONE, Processes
from tron_cli.errors import InputError
from tron_cli.losses.sampled import build_loss
from tron_cli.models.base import Model
from tron_cli.ops.dropout import dropping_as_part
from tron_cli.registry import CATALOGUE_LOSSES
from tron_cli.sampling.logits import sampled_logits
from tron_cli.sampling.lookup import BeforeLookup, look_up, look_up_inputs
from tron_cli.sampling.negatives import Distribution, Negatives, sample_negatives
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
    processes: Processes = ALONE,
) -> torch.Tensor:
    """Take a step along the gradients of the mean loss over the positions of some batches.

    Each batch draws its own negatives. Returns that loss, without gradients. With several
    processes, batches are this one's shares of them; all take the same step, and the losses that
    they return add up to that of the batches.
    """
    before_lookup = optimizer.catch_up if isinstance(optimizer, RowAdam) else None
    several = len(batches) > 1 or processes.count > 1
    total = sum(_num_targets(whole(batch)) for batch in batches) if several else 1
    losses: list[torch.Tensor] = []
    for batch in batches:
        with torch.autocast(batch.inputs_N.device.type, dtype, enabled=dtype != torch.float32):
            loss = training_loss(
                model, batch, config, distribution,
                before_lookup=before_lookup, processes=processes,
            )  # fmt: skip
        if several:
            counts = batch.share is None or batch.share.counts
            loss = loss * (_num_targets(batch) / total * counts)
        with phase("backward"):
            if not losses:
                optimizer.zero_grad()
            scaler.scale(loss).backward()
        losses.append(loss.detach())
    if processes.count > 1:
        with phase("exchange"):
            sparse = gradients_are_sparse(config.optimizer)
            add_up_gradients(
                model.parameters(), processes, sparse=sparse, divided=model.divided_tables
            )
    with phase("optimizer"):
        if several:
            _merge_rows(model)
        if config.clip_norm:
            scaler.unscale_(optimizer)
            clip_gradients(
                model.parameters(), config.clip_norm, model.divided_tables, processes.add_up
            )
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
    processes: Processes = ALONE,
) -> torch.Tensor:
    """Return the mean loss over the positions of a batch that have a target.

    Draws the negatives. processes: those that have the other shares of the batch. Raises InputError
    where the loss is not one number for each position.
    """
    if config.loss in CATALOGUE_LOSSES:
        loss_N = _catalogue_loss(model, batch, config, before_lookup, processes)
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
            whole(batch),
            distribution,
            num_uniform=config.num_uniform_negatives,
            num_batch=config.num_batch_negatives,
            sampling_style=config.sampling_style,
            reject_uniform_session_items=config.reject_uniform_session_items,
            reject_in_batch_items=config.reject_in_batch_items,
        )
    with phase("lookup"):
        # Of a dense gradient, processes would exchange all rows.
        sparse = gradients_are_sparse(config.optimizer) or batch.share is not None
        before = before_lookup if sparse else None
        if batch.share is not None:
            # Rows have the same pending updates in every process, to the last digit.
            _catch_up_whole(model, batch.share.whole, negatives, config, before)
            negatives, before = negatives.of_share(batch.share), None
        shard = model.shard
        looked = look_up(
            model.item_table, batch, negatives, sparse=sparse, before=before, shard=shard
        )
        inputs, rows_UD = looked.batch, looked.rows_UD
        if not config.shares_table:
            inputs, rows_UD = look_up_inputs(
                model.item_embedding.weight, batch, sparse=sparse, before=before, shard=shard
            )
    hidden_ND = _hidden(model, inputs, rows_UD)
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
    model: Model,
    batch: Batch,
    config: ExperimentConfig,
    before_lookup: BeforeLookup | None,
    processes: Processes,
) -> torch.Tensor:
    """Return the loss of each position with a target, among all items."""
    with phase("lookup"):
        sparse = gradients_are_sparse(config.optimizer) or batch.share is not None
        sparse = sparse and not config.shares_table
        before = before_lookup if sparse else None
        if batch.share is not None and before is not None:
            _catch_up(model, model.item_embedding.weight, batch.share.whole.inputs_N, before)
            before = None
        inputs, rows_UD = look_up_inputs(
            model.item_embedding.weight, batch, sparse=sparse, before=before, shard=model.shard
        )
    hidden_ND = _hidden(model, inputs, rows_UD)
    with phase("loss"):
        loss = build_loss(config, model.num_items)
        table_VD = model.scored_rows(model.item_table)
        assert batch.targets_N is not None
        if model.shard is not None:
            return sharded_ce(
                hidden_ND, table_VD, batch.targets_N, model.shard, model.num_items,
                config.label_smoothing,
            )  # fmt: skip
        if config.loss == "sce" and batch.share is not None:
            # Buckets are chosen among all positions; each process computes the loss of all.
            hidden_ND = _of_whole(hidden_ND.to(table_VD.dtype), batch.share, processes)
            loss_N = loss(hidden_ND, table_VD, batch.share.whole.targets_N)
            return loss_N[batch.share.targets_P]
        return loss(hidden_ND, table_VD, batch.targets_N)


def _of_whole(hidden_ND: torch.Tensor, share: Share, processes: Processes) -> torch.Tensor:
    """Return the hidden states of the whole batch; those of this share alone have gradients."""
    own = slice(None) if share.counts else slice(0)
    places, values = processes.gathered(share.targets_P[own], hidden_ND.detach()[own])
    return (
        torch.empty_like(values)
        .index_copy_(0, places, values)
        .index_copy(0, share.targets_P, hidden_ND)
    )


def _catch_up_whole(
    model: Model,
    whole: Batch,
    negatives: Negatives,
    config: ExperimentConfig,
    before: BeforeLookup | None,
) -> None:
    """Do for the rows that a whole batch needs what a step does before it looks them up."""
    if before is None:
        return
    assert whole.targets_N is not None
    ids = torch.cat([whole.inputs_N, whole.targets_N, negatives.uniform.flatten()])
    _catch_up(model, model.item_table, ids, before)
    if not config.shares_table:
        _catch_up(model, model.item_embedding.weight, whole.inputs_N, before)


def _catch_up(model: Model, table: torch.Tensor, ids: torch.Tensor, before: BeforeLookup) -> None:
    """Do for some rows of a table, or those of them that it has, what precedes a lookup."""
    ids_U = ids.unique()
    before(table, ids_U if model.shard is None else model.shard.held(ids_U))


def _hidden(model: Model, inputs: Batch, rows_UD: torch.Tensor) -> torch.Tensor:
    """Return the hidden states of the events with a target."""
    with phase("forward"), _dropout_of(inputs, model):
        hidden_ND = model(inputs, rows_UD)
        return hidden_ND if inputs.predicting_P is None else hidden_ND[inputs.predicting_P]


@contextmanager
def _dropout_of(batch: Batch, model: Model) -> Iterator[None]:
    """Let a share of a batch drop what it would in the whole, where dropout is ours, on the CPU.

    On CUDA, and between the layers of torch's GRU, each process draws its own random numbers, and
    then goes on with those of all.
    """
    share = batch.share
    if share is None:
        yield
        return
    device = batch.inputs_N.device
    drops_inside = any(isinstance(each, nn.GRU) and each.dropout for each in model.modules())
    if device.type == "cpu" and not drops_inside:
        with dropping_as_part((len(share.whole.inputs_N), share.events_N)):
            yield
        return
    seed = int(torch.randint(1 << 62, (), device=device)) + int(share.rows_B[0])
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
