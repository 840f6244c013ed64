"""Exact ranks and lists where numbers are added to the scores of a few items of each event.

Boosts are at least 0, so that an item without one can only lose places: the best items are among
the best without boosts and the boosted ones, and the items ahead of a target are those that reach
its boosted score by themselves and the boosted ones that reach it only with their boost.

Shapes: E events, D width of the table, K places, P (event, item) pairs.
"""

from __future__ import annotations

import numpy as np
import torch

from tron_cli.baselines.knn_boost import KNNBoost
from tron_cli.data.histories import Histories
from tron_cli.evaluation.ranking import Catalogue, SeenItems


class BoostedCatalogue:
    """Catalogue whose items have boosted scores at some events; its methods are `Catalogue`'s.

    event_P, item_P: int64, each pair once. boost_P: float32, above 0, of which the differences are
    exact in float64.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        event_P: torch.Tensor,
        item_P: torch.Tensor,
        boost_P: torch.Tensor,
    ) -> None:
        self._catalogue = catalogue
        self._width = catalogue.num_items + 1
        self._key_P, order = (event_P * self._width + item_P).sort()
        self._boost_P = boost_P[order].double()

    def score(
        self, hidden_ED: torch.Tensor, event_P: torch.Tensor, item_P: torch.Tensor
    ) -> torch.Tensor:
        """Return boosted scores of items at events, float64 [P]."""
        score_P = self._catalogue.score(hidden_ED, event_P, item_P)
        key_P, boost_P = self._key_P, self._boost_P
        if not len(key_P):
            return score_P
        wanted_P = event_P * self._width + item_P
        at_P = torch.searchsorted(key_P, wanted_P).clamp(max=len(key_P) - 1)
        return score_P + torch.where(key_P[at_P] == wanted_P, boost_P[at_P], 0.0)

    def ranks(
        self,
        hidden_ED: torch.Tensor,
        target_E: torch.Tensor,
        seen: SeenItems | None = None,
        limit: int | None = None,
    ) -> torch.Tensor:
        """Return the rank of each target by boosted scores, int64 [E]."""
        event_P, item_P, boost_P = self._eligible(seen, None)
        boost_E = torch.zeros_like(target_E, dtype=torch.float64)
        is_target_P = item_P == target_E[event_P]
        boost_E[event_P[is_target_P]] = boost_P[is_target_P]
        rank_E = self._catalogue.ranks(hidden_ED, target_E, seen, limit, boost_E)

        def reach(pairs: torch.Tensor, boost_p: torch.Tensor) -> torch.Tensor:
            event_p, item_p = event_P[pairs], item_P[pairs]
            reaches = self._catalogue.at_least(
                hidden_ED, target_E, boost_E, event_p, item_p, boost_p
            )
            return pairs[reaches]

        others = (~is_target_P).nonzero()[:, 0]
        with_boost = reach(others, boost_P[others])
        # Those that need no boost have been counted.
        alone = reach(with_boost, torch.zeros_like(boost_P[with_boost]))
        for pairs, sign in ((with_boost, 1), (alone, -1)):
            rank_E.index_add_(0, event_P[pairs], torch.full_like(pairs, sign))
        return rank_E

    def top_items(
        self,
        hidden_ED: torch.Tensor,
        target_E: torch.Tensor | None,
        limit: int,
        seen: SeenItems | None = None,
        barred: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the best items in the order of `ranks`, int64 [E, limit]; 0 where none are left.

        Equal scores are ordered by item id, except that the target comes last among its equals.
        """
        top_EK = self._catalogue.top_items(hidden_ED, target_E, limit, seen, barred)
        event_P, item_P, boost_P = self._eligible(seen, barred)
        count_E = torch.bincount(event_P, minlength=len(top_EK)).tolist()
        item_E, boost_E = item_P.split(count_E), boost_P.float().split(count_E)
        for event in (number for number, count in enumerate(count_E) if count):
            best_K = top_EK[event]
            item_C = torch.cat([best_K[best_K > 0], item_E[event]]).unique()
            boost_C = boost_E[event].new_zeros(len(item_C))
            boost_C[torch.searchsorted(item_C, item_E[event])] = boost_E[event]
            # A boosted score is the product of [hidden, 1] and [embedding, boost].
            row_CD = torch.cat([self._catalogue.table[item_C], boost_C[:, None]], dim=1).cpu()
            few = Catalogue(torch.cat([torch.zeros_like(row_CD[:1]), row_CD]))
            hidden_1D = torch.cat([hidden_ED[event].float().cpu(), torch.ones(1)])[None]
            target_1 = torch.zeros(1, dtype=torch.int64)
            if target_E is not None:
                is_target_C = (item_C == target_E[event]).cpu()
                target_1 += torch.where(is_target_C.any(), is_target_C.int().argmax() + 1, 0)
            place_K = few.top_items(hidden_1D, target_1, limit)[0].to(item_C.device)
            top_EK[event] = torch.where(place_K > 0, item_C[place_K - 1], 0)
        return top_EK

    def _eligible(
        self, seen: SeenItems | None, barred: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return events, items and boosts of the items that may be recommended, sorted."""
        key_P, boost_P = self._key_P, self._boost_P
        if seen is not None:
            kept_P = ~torch.isin(key_P, seen.event_P * self._width + seen.item_P)
            key_P, boost_P = key_P[kept_P], boost_P[kept_P]
        if barred is not None:
            kept_P = ~torch.isin(key_P % self._width, barred)
            key_P, boost_P = key_P[kept_P], boost_P[kept_P]
        return key_P // self._width, key_P % self._width, boost_P


def boosted(
    catalogue: Catalogue,
    boost: KNNBoost | None,
    histories: Histories,
    item_C: np.ndarray | None = None,
) -> Catalogue | BoostedCatalogue:
    """Return the catalogue with the boosts of its items after histories; without boost, as it is.

    item_C: int64, items 1 to C of a catalogue that has only some, ascending.
    """
    if boost is None:
        return catalogue
    event_P, item_P, boost_P = boost.pairs(histories)
    if item_C is not None:
        kept_P, item_P = numbers_in(item_C, item_P)
        event_P, boost_P = event_P[kept_P], boost_P[kept_P]
    device = catalogue.table.device
    pairs = (torch.from_numpy(each).to(device) for each in (event_P, item_P, boost_P))
    return BoostedCatalogue(catalogue, *pairs)


def numbers_in(item_C: np.ndarray, item_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which items are among item_C, bool [P], and their numbers there, from 1.

    item_C: int64, ascending, at least one.
    """
    at_P = np.searchsorted(item_C, item_P).clip(max=len(item_C) - 1)
    is_in_P = item_C[at_P] == item_P
    return is_in_P, at_P[is_in_P] + 1
