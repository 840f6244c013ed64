"""Exact full-catalogue ranks without a score matrix.

rank = 1 + the number of other eligible items that score at least as high as the target, in exact
arithmetic on the float32 hidden states and embeddings: a float32 matrix product decides all items
outside its proved rounding bound, and the few inside it are scored again in float64. The result
therefore does not depend on the platform, the threads, or how the work is cut.

Shapes: E events, D width of the table, I items, C items of a chunk, P (event, item) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tron_cli.errors import RunError

_CHUNK_ELEMENTS = 1 << 20  # scores held at once: 4 MB, so that counting finds them in the cache
_PAIRS_AT_ONCE = 1 << 16
_ROWS_AT_ONCE = 1 << 16
_SPARE_CANDIDATES = 32  # beyond the last place asked for, in case rounding swapped some
_NO_RANKS = "no rank can be given; train again with a lower lr or with clip_norm"


@dataclass(frozen=True)
class SeenItems:
    """Items that may not be recommended: item_P of event_P, each pair once, never the target."""

    event_P: torch.Tensor
    item_P: torch.Tensor


class Catalogue:
    """The item embeddings that events are ranked against.

    table: float32 [I + 1, D], row i for item i; row 0 is no item. Raises RunError where it is not
    finite: a rank among NaNs would mean nothing.
    """

    def __init__(self, table: torch.Tensor) -> None:
        if not bool(torch.isfinite(table).all()):
            raise RunError(f"the item embeddings hold NaN or infinite values; {_NO_RANKS}")
        self.table = table.detach().float().contiguous()
        self.num_items = len(table) - 1
        # In float64 the squares neither overflow nor underflow; in pieces the copy stays small.
        self._largest_norm = torch.stack(
            [rows.double().norm(dim=1).max() for rows in self.table.split(_ROWS_AT_ONCE)]
        ).max()
        # A float32 dot product of D terms, in whatever order and with or without fused operations,
        # errs by at most g * |h| * |e| with g = n u / (1 - n u) and u = 2^-24 (Higham, Accuracy and
        # Stability of Numerical Algorithms, 3.1). Four more roundings: thresholds and norms.
        roundings = (self.table.shape[1] + 4) * 2.0**-24
        self._relative_bound = roundings / (1 - roundings) * (1 + 1e-6)

    def score(
        self, hidden_ED: torch.Tensor, event_P: torch.Tensor, item_P: torch.Tensor
    ) -> torch.Tensor:
        """float64 [P]: scores of items at events."""
        scores = [
            (hidden_ED[event].double() * self.table[item].double()).sum(dim=1)
            for event, item in zip(
                event_P.split(_PAIRS_AT_ONCE), item_P.split(_PAIRS_AT_ONCE), strict=True
            )
        ]
        return torch.cat(scores) if scores else hidden_ED.new_zeros(0, dtype=torch.float64)

    def _rounding_bound(self, hidden_ED: torch.Tensor) -> torch.Tensor:
        """float64 [E]: how far a float32 score can be from the exact one."""
        largest_E = hidden_ED.double().norm(dim=1) * self._largest_norm
        if bool((largest_E >= torch.finfo(torch.float32).max).any()):
            raise RunError(f"the scores exceed the range of float32; {_NO_RANKS}")
        # Products may underflow to zero, which loses less than the smallest normal number each.
        underflow = torch.finfo(torch.float32).tiny * self.table.shape[1]
        return largest_E * self._relative_bound + underflow

    def ranks(
        self, hidden_ED: torch.Tensor, target_E: torch.Tensor, seen: SeenItems | None = None
    ) -> torch.Tensor:
        """int64 [E]: rank of each target, 1 the best, among all items that are not `seen`.

        hidden_ED: float32; target_E: int64 item ids. Ties count against the target.
        """
        if not bool(torch.isfinite(hidden_ED).all()):
            raise RunError(f"the model's hidden states hold NaN or infinite values; {_NO_RANKS}")
        hidden_ED = hidden_ED.float()
        event_E = torch.arange(len(target_E), device=target_E.device)
        score_E = self.score(hidden_ED, event_E, target_E)
        bound_E = self._rounding_bound(hidden_ED)
        above_E1 = (score_E + bound_E).float()[:, None]
        below_E1 = (score_E - bound_E).float()[:, None]
        rank_E = torch.ones_like(target_E)
        columns = max(1, _CHUNK_ELEMENTS // max(1, len(target_E)))
        for low in range(1, self.num_items + 1, columns):
            score_EC = hidden_ED @ self.table[low : low + columns].T
            certain_EC = score_EC > above_E1
            rank_E += certain_EC.sum(dim=1)
            near = ((score_EC >= below_E1) ^ certain_EC).nonzero()
            event_P, item_P = near[:, 0], near[:, 1] + low
            other = item_P != target_E[event_P]
            event_P, item_P = event_P[other], item_P[other]
            at_least = self.score(hidden_ED, event_P, item_P) >= score_E[event_P]
            rank_E.index_add_(0, event_P, at_least.long())
        if seen is not None:
            seen_score_P = self.score(hidden_ED, seen.event_P, seen.item_P)
            rank_E.index_add_(0, seen.event_P, -(seen_score_P >= score_E[seen.event_P]).long())
        return rank_E

    def top_items(
        self,
        hidden_ED: torch.Tensor,
        target_E: torch.Tensor,
        limit: int,
        seen: SeenItems | None = None,
    ) -> torch.Tensor:
        """int64 [E, limit]: the items in the order that `ranks` implies; 0 where there are no more.

        Equal scores are ordered by item id, but the target comes last among its equals.
        """
        hidden_ED = hidden_ED.float()
        bound_E = self._rounding_bound(hidden_ED)
        limit_here = min(limit, self.num_items)
        kept = min(limit_here + _SPARE_CANDIDATES, self.num_items)
        top = torch.zeros(len(target_E), limit, dtype=torch.int64, device=target_E.device)
        events = max(1, _CHUNK_ELEMENTS // max(1, self.num_items))
        for low in range(0, len(target_E), events):
            part = slice(low, low + events)
            score_eI = hidden_ED[part] @ self.table[1:].T
            if seen is not None:
                here = (seen.event_P >= low) & (seen.event_P < low + events)
                score_eI[seen.event_P[here] - low, seen.item_P[here] - 1] = -torch.inf
            score_ek, index_ek = score_eI.topk(kept, dim=1)
            # In exact arithmetic an item this far below the last place cannot reach it.
            hopeless_e = score_ek[:, limit_here - 1].double() - 2 * bound_E[part]
            for event in range(len(score_eI)):
                if kept < self.num_items and score_ek[event, -1] >= hopeless_e[event]:
                    possible = (score_eI[event] >= hopeless_e[event]) & score_eI[event].isfinite()
                    item_C = possible.nonzero()[:, 0] + 1
                else:
                    item_C = index_ek[event][score_ek[event] > -torch.inf].sort().values + 1
                best = self._ordered(hidden_ED[low + event], item_C, target_E[low + event])
                top[low + event, : len(best[:limit])] = best[:limit]
        return top

    def _ordered(
        self, hidden_D: torch.Tensor, item_C: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """Items (ascending ids) by exact score; the target last among its equals."""
        exact_C = (self.table[item_C].double() * hidden_D.double()).sum(dim=1)
        order = torch.argsort((item_C == target).long(), stable=True)
        return item_C[order[torch.argsort(exact_C[order], descending=True, stable=True)]]
