"""EASE: one linear layer from the items of a history to all items, in closed form.

Harald Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019. With X the binary
matrix of training sessions and items, B minimizes ||X - XB||^2 + l2 ||B||^2 with a zero diagonal:
with P = (X'X + l2)^-1, B_ij = -P_ij / P_jj off the diagonal. The order of events has no effect.

Shapes: E events, P (event, item of its history) pairs, I items, K places.
"""

from __future__ import annotations

import numpy as np
import torch

from tron_cli.baselines.base import Baseline
from tron_cli.baselines.ranking import (
    Candidates,
    Eligible,
    Excluded,
    best_items,
    best_with_targets,
)
from tron_cli.data.dataset import Sessions
from tron_cli.data.histories import Histories, distinct_pairs, ranges
from tron_cli.errors import InputError

MOST_ITEMS = 20_000  # two float64 matrices of this size take 6.4 GB
_PAIRS_AT_ONCE = 1 << 22


class EASE(Baseline):
    """Rank items by the sum of their weights from the distinct items of the history.

    Fitting inverts an [I, I] matrix in float64, which takes about num_items^3 operations and the
    memory of two such matrices. The checkpoint and ranking hold one in float32. Raises InputError
    for more than MOST_ITEMS items.
    """

    has_similar_items = True

    def __init__(self, *, num_items: int, sequence_length: int, ease_l2: float) -> None:
        super().__init__(num_items=num_items, sequence_length=sequence_length)
        if num_items > MOST_ITEMS:
            raise InputError(
                f"model=ease inverts a matrix of items x items, and {num_items:,} items would need "
                f"{16 * num_items**2 / 1e9:,.0f} GB; the limit is {MOST_ITEMS:,}: use "
                "model=session_knn, or fewer items with `tron prepare table --min-item-count`"
            )
        self.l2 = ease_l2

    def learn(self, sessions: Sessions) -> dict[str, np.ndarray]:
        """Return weights, float32 [I + 1, I + 1]: item i adds entry (i, j) to item j."""
        width = self.num_items + 1
        session_N = np.repeat(np.arange(len(sessions)), sessions.lengths)
        session_D, item_D = distinct_pairs(session_N, sessions.items)
        matrix = torch.zeros(width, width, dtype=torch.float64)
        _add_together(matrix, session_D, item_D, len(sessions))
        matrix.diagonal().add_(self.l2)
        torch.linalg.cholesky(matrix, out=matrix)
        torch.cholesky_inverse(matrix, out=matrix)
        matrix /= -matrix.diagonal().clone()
        matrix.fill_diagonal_(0)
        return {"weights": matrix.float().numpy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        super().load_state_dict(state)
        self.weights = state["weights"]

    def work(self, histories: Histories) -> np.ndarray:
        # One row of scores, and one row of weights for each event of the history.
        return self.num_items * (histories.length_E + 1)

    def rank(
        self, histories: Histories, *, excluded: Excluded | None, top_items: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        score_EI, target_E = self.scores(histories), histories.target_E
        if excluded is not None:
            own_E = np.arange(len(target_E))
            target_score_E = score_EI[own_E, target_E]
            score_EI[excluded.event_P, excluded.item_P] = -np.inf
            # Excluded targets are compared like others; their rank is set to 0 below.
            score_EI[own_E, target_E] = target_score_E
        wanted_E1 = np.take_along_axis(score_EI, target_E[:, None], axis=1)
        count = self.popularity.count
        ahead_EI = score_EI > wanted_E1
        event, item = np.nonzero(score_EI == wanted_E1)
        at_least = count[item] >= count[target_E[event]]
        # The target is counted too, hence no 1 is added.
        rank_E = ahead_EI.sum(axis=1) + np.bincount(event[at_least], minlength=len(target_E))
        if excluded is not None:
            rank_E[excluded.event_P[excluded.item_P == target_E[excluded.event_P]]] = 0
        if not top_items:
            return rank_E, None
        # One more than requested, since the target may be among them without being eligible.
        best = _best_candidates(score_EI, min(top_items + 1, self.num_items))
        top_EK = best_with_targets(best, target_E, rank_E, top_items, self.popularity, excluded)
        return rank_E, top_EK

    def best(
        self,
        histories: Histories,
        *,
        excluded: Excluded | None,
        limit: int,
        eligible: Eligible | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        score_EI = self.scores(histories)
        if excluded is not None:
            score_EI[excluded.event_P, excluded.item_P] = -np.inf
        if eligible is not None:
            score_EI[:, ~eligible.is_eligible_I] = -np.inf
        best = _best_candidates(score_EI, min(limit, self.num_items))
        return best_items(best, limit, self.popularity, excluded, eligible)

    def scores(self, histories: Histories) -> np.ndarray:
        """Return the score of each item, float64 [E, I + 1]; -inf for item 0, which is no item."""
        event_P, item_P, _ = histories.pairs()
        event_P, item_P = distinct_pairs(event_P, item_P)
        first_E = np.searchsorted(event_P, np.arange(len(histories)))
        score_EI = np.add.reduceat(self.weights[item_P], first_E, axis=0, dtype=np.float64)
        score_EI[:, 0] = -np.inf
        return score_EI


def _add_together(
    matrix: torch.Tensor, session_D: np.ndarray, item_D: np.ndarray, num_sessions: int
) -> None:
    """Add to entry (i, j) the number of sessions with items i and j, given their distinct items."""
    offsets = np.searchsorted(session_D, np.arange(num_sessions + 1))
    size_D = np.diff(offsets)[session_D]
    done_D = np.cumsum(size_D)
    flat = matrix.view(-1)
    low = 0
    while low < len(item_D):
        high = int(np.searchsorted(done_D, done_D[low] + _PAIRS_AT_ONCE))
        high = max(high, low + 1)
        own, other = ranges(offsets[session_D[low:high]], offsets[session_D[low:high] + 1])
        place = torch.from_numpy(item_D[low:high][own] * len(matrix) + item_D[other])
        flat.index_add_(0, place, torch.ones(len(place), dtype=matrix.dtype))
        low = high


def _best_candidates(score_EI: np.ndarray, limit: int) -> Candidates:
    """Return the items of each row that score at least as high as its limit-th best, and finite."""
    least_E1 = np.partition(score_EI, -limit, axis=1)[:, -limit, None]
    event_C, item_C = np.nonzero((score_EI >= least_E1) & (score_EI > -np.inf))
    offsets = np.searchsorted(event_C, np.arange(len(score_EI) + 1))
    return Candidates(offsets, item_C, score_EI[event_C, item_C])
