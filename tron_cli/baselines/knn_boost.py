"""Numbers that session-kNN adds to the scores that a network gives to a few items.

    boost(item) = weight * log(1 + 100 s) / log(101),   s = votes of the item / most votes

The weight is thus the boost of the item with the most votes, in units of the network's logits, and
all items without votes keep their scores. The logarithm ranked validation events of Diginetica
better than the square root of s and than s itself, and as well as softmax probabilities with shares
of votes.

A sum with logits needs no sum over the catalogue, so that ranks stay exact.

Shapes: E events, C (event, item) pairs.
"""

from __future__ import annotations

import math

import numpy as np

from tron_cli.baselines.predict import pieces
from tron_cli.baselines.session_knn import SessionKNN
from tron_cli.data.histories import Histories

# Boosts are multiples of 2^-16 up to 256, so that they and their differences are exact in float32.
GRID = 2.0**-16
MOST = 256.0
_STEEPNESS = 100.0


class KNNBoost:
    """Boosts of the items that a fitted session-kNN scores.

    weight: from 0 to MOST; raises ValueError for others.
    """

    def __init__(self, knn: SessionKNN, weight: float) -> None:
        if not 0 <= weight <= MOST:
            raise ValueError(f"weight must be from 0 to {MOST:g}, got {weight}")
        self.knn = knn
        self.weight = weight

    def pairs(self, histories: Histories) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return events and items that are boosted, and their boosts: int64, int64, float32 [C].

        Each pair once, boosts above 0. Targets are not read.
        """
        if not self.weight:
            return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
        event_C, item_C, share_C = self.shares(histories)
        return weighted(event_C, item_C, share_C, self.weight)

    def shares(self, histories: Histories) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return events, items and boosts for a weight of 1, float64 [C], not yet rounded."""
        event, item, share = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
        for first, last in pieces(self.knn.work(histories)):
            candidates = self.knn.candidates(histories[first:last])
            most_E = np.zeros(last - first)
            np.maximum.at(most_E, candidates.event_C, candidates.score_C)
            voted = candidates.score_C > 0
            event_C = candidates.event_C[voted]
            relative_C = candidates.score_C[voted] / most_E[event_C]
            event.append(event_C + first)
            item.append(candidates.item_C[voted])
            share.append(np.log1p(_STEEPNESS * relative_C) / math.log1p(_STEEPNESS))
        return np.concatenate(event), np.concatenate(item), np.concatenate(share)


def weighted(
    event_C: np.ndarray, item_C: np.ndarray, share_C: np.ndarray, weight: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pairs with a boost above 0, and their boosts on the grid, float32."""
    boost_C = (np.rint(weight * share_C / GRID) * GRID).astype(np.float32)
    kept = boost_C > 0
    return event_C[kept], item_C[kept], boost_C[kept]
