"""Sampling weights: each item is drawn as a negative in proportion to its weight.

Everything else about sampling (styles, rejection, the logQ correction) follows from the weights, in
negatives.py.

Shapes: I items.
"""

from __future__ import annotations

import numpy as np


def uniform(count_I: np.ndarray) -> np.ndarray:
    """Return the same weight for every item, float64 [I]."""
    return np.ones(len(count_I))


def popularity(count_I: np.ndarray, *, popularity_alpha: float) -> np.ndarray:
    """Return count^alpha, float64 [I]: the frequencies of training at 1, equal weights at 0.

    0.75 is word2vec's choice (Mikolov et al., NeurIPS 2013). count_I: float64, occurrences of each
    item in training.
    """
    return (count_I / count_I.max()) ** popularity_alpha  # keeps the powers in range


def mixed(count_I: np.ndarray, *, popularity_alpha: float, mixed_share: float) -> np.ndarray:
    """Return weights that draw a share by popularity and the rest uniformly, float64 [I].

    GRU4Rec+ and TRON mix uniform and in-batch negatives; this has the same mixture without a batch.
    """
    popular_I = popularity(count_I, popularity_alpha=popularity_alpha)
    return mixed_share * popular_I / popular_I.sum() + (1 - mixed_share) / len(count_I)
