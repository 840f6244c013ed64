"""The loss of a step by its formula."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tron_cli.config import ExperimentConfig
from tron_cli.sampling.negatives import Distribution, sample_negatives

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
    table = reference.outputs.weight
    total = hidden_ND.new_zeros(())
    for hidden, target, items in zip(
        hidden_ND, batch.targets_N, negatives_that_count(batch, negatives, config), strict=True
    ):
        negative = table[torch.tensor(items, dtype=torch.int64)] @ hidden
        if config.topk_sampling:
            negative = negative.topk(min(config.topk_sampling_k, len(items))).values
        total = total + position_loss(table[target] @ hidden, negative, config)
    return total / len(hidden_ND)
