"""Requirements of a step on either side: arithmetic, and memory of the item table.

Padding, gradients of negatives that top-k drops and rows that no event touches are not required.
"""

from __future__ import annotations

import numpy as np

from benchmarks.measure import Work
from tron_cli.config import ExperimentConfig
from tron_cli.data.dataset import Sessions


def step_work(
    config: ExperimentConfig, sessions: Sessions, chosen: np.ndarray, num_items: int
) -> Work:
    """Return the requirements of one training step on the sessions `chosen`."""
    dim = config.embedding_dim
    rows = [sessions[session][-(config.sequence_length + 1) :] for session in chosen]
    lengths = np.array([len(row) - 1 for row in rows], dtype=np.float64)
    events = lengths.sum()
    flop = 3 * network_flop(config, lengths)  # backward is twice forward
    negatives = config.num_uniform_negatives + config.num_batch_negatives
    if config.topk_sampling:
        # All are scored, the target and the kept have gradients.
        flop += 2 * events * (negatives + 1) * dim
        flop += 2 * 2 * events * (config.topk_sampling_k + 1) * dim
    else:
        flop += 3 * 2 * events * (negatives + 1) * dim
    # The uniform negatives are one set a batch, session or event.
    sets = {"batchwise": 1, "sessionwise": len(rows), "eventwise": int(events)}
    drawn = config.num_uniform_negatives * sets[config.sampling_style]
    named = len(np.unique(np.concatenate(rows)))
    touched = named + (num_items - named) * (1 - (1 - 1 / num_items) ** drawn)
    # Each row is gathered; it and its two moments are read and written.
    return Work(gflop=flop / 1e9, gb=touched * 7 * dim * 4 / 1e9)


def network_flop(config: ExperimentConfig, lengths: np.ndarray) -> float:
    """Return the operations of a forward pass over rows of these lengths, attention causal."""
    dim = config.embedding_dim
    linear = 12 * dim * dim * lengths.sum()  # query, key, value, output, two of the feed-forward
    attention = 2 * dim * (lengths * (lengths + 1)).sum()
    return config.num_blocks * float(linear + attention)
