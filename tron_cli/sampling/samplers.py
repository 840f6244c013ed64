"""What negatives are drawn from: one weight an item, in proportion to which it is drawn.

Shapes: I items. Everything else about sampling (styles, rejection, the logQ correction) follows
from the weights, in negatives.py.
"""

from __future__ import annotations

import numpy as np


def uniform(count_I: np.ndarray) -> np.ndarray:
    """Every item alike, float64 [I]."""
    return np.ones(len(count_I))


def popularity(count_I: np.ndarray, *, popularity_alpha: float) -> np.ndarray:
    """count^alpha, float64 [I]: as often as in training at 1, all alike at 0.

    0.75 is word2vec's choice (Mikolov et al., NeurIPS 2013). count_I: float64, occurrences of each
    item in training.
    """
    return (count_I / count_I.max()) ** popularity_alpha  # so that none is too large a number


def mixed(count_I: np.ndarray, *, popularity_alpha: float, mixed_share: float) -> np.ndarray:
    """A share of the draws by popularity and the rest uniformly, float64 [I].

    GRU4Rec+ and TRON mix uniform and in-batch negatives; here the in-batch part needs no batch.
    """
    popular_I = popularity(count_I, popularity_alpha=popularity_alpha)
    return mixed_share * popular_I / popular_I.sum() + (1 - mixed_share) / len(count_I)
