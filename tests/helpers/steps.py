"""Loss of a step by its formula, and the gradients of a step beside those of the reference."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from helpers.networks import build_pair, make_sessions
from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import Batch, training_batch
from tron_cli.sampling.negatives import Distribution, Negatives, sample_negatives
from tron_cli.training.step import training_loss

LENGTHS = [2, 10, 3, 5, 6, 4, 7, 2, 3, 9]


def draw(batch, num_items: int, config: ExperimentConfig):
    return sample_negatives(
        batch,
        Distribution(num_items),
        num_uniform=config.num_uniform_negatives,
        num_batch=config.num_batch_negatives,
        sampling_style=config.sampling_style,
        reject_uniform_session_items=config.reject_uniform_session_items,
        reject_in_batch_items=config.reject_in_batch_items,
    )


def negatives_that_count(batch, negatives, config: ExperimentConfig) -> list[list[int]]:
    """The negative items of each position, in Python lists."""
    inputs, targets = batch.inputs_N.tolist(), batch.targets_N.tolist()
    found = []
    for event, row in enumerate(batch.rows_N.tolist()):
        index = {"eventwise": event, "sessionwise": row, "batchwise": None}[config.sampling_style]
        drawn = negatives.uniform if index is None else negatives.uniform[index]
        keep = negatives.uniform_keep
        uniform = drawn.tolist() if keep is None or keep[index or 0] else []
        keep_M = negatives.in_batch_keep_BM
        in_batch = [
            inputs[other]
            for column, other in enumerate(negatives.in_batch_BM[row].tolist())
            if keep_M is None or keep_M[row, column]
        ]
        every = uniform + in_batch
        if config.mask_collisions:
            every = [item for item in every if item != targets[event]]
        found.append(every)
    return found


def position_loss(positive, negative, config: ExperimentConfig):
    """The formulas; `negative` has only what counts, possibly nothing."""
    if config.loss == "bce":
        loss = -torch.sigmoid(positive).log()
        return loss - (1 - torch.sigmoid(negative)).log().mean() if len(negative) else loss
    if not len(negative):
        return positive * 0
    if config.loss == "ssm":
        logits = torch.cat([positive[None], negative])
        return F.cross_entropy(logits[None], torch.tensor([0]))
    weight = negative.softmax(dim=0)
    gain = (weight * torch.sigmoid(positive - negative)).sum()
    return -gain.log() + config.bpr_penalty * (weight * negative**2).sum()


def reference_loss(reference, batch, negatives, config: ExperimentConfig):
    histories = [row.tolist() for row in batch.inputs_N.split(batch.lengths_B.tolist())]
    hidden_ND = torch.cat(reference(histories))
    table = reference.output_rows()
    total = hidden_ND.new_zeros(())
    for hidden, target, items in zip(
        hidden_ND, batch.targets_N, negatives_that_count(batch, negatives, config), strict=True
    ):
        negative = table[torch.tensor(items, dtype=torch.int64)] @ hidden
        if config.topk_sampling:
            negative = negative.topk(min(config.topk_sampling_k, len(items))).values
        total = total + position_loss(table[target] @ hidden, negative, config)
    return total / len(hidden_ND)


def step_of_both(
    config: ExperimentConfig, num_items: int, lengths: list[int] = LENGTHS
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Batch, Negatives]:
    """Return the gradients of a step and of the padded reference; check that the losses agree."""
    model, reference = build_pair(config, num_items)
    sessions = make_sessions(lengths, num_items, seed=3)
    batch = training_batch(sessions, np.arange(len(lengths)), config.sequence_length)
    torch.manual_seed(11)
    negatives = draw(batch, num_items, config)
    torch.manual_seed(11)
    loss = training_loss(model, batch, config, Distribution(num_items))
    loss.backward()
    expected = reference_loss(reference, batch, negatives, config)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    ours = {name: weights.grad for name, weights in model.named_parameters()}
    theirs = {
        reference.name_in_model(name): weights.grad
        for name, weights in reference.named_parameters()
    }
    return ours, theirs, batch, negatives
