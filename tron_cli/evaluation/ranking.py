"""Exact full-catalogue ranks without a score matrix.

rank = 1 + the number of other eligible items that score at least as high as the target, in exact
arithmetic on the float32 hidden states and embeddings. Three stages, each exact about what it
decides: a product in low precision decides all items outside its proved rounding bound around the
target's score; float64 decides the few inside it, except those within its own bound; a correctly
rounded sum decides these. The result therefore does not depend on the platform, the number of
threads, or how the work is divided.

The first stage is a float32 matrix product, in chunks that fit the cache. On CUDA with Triton it is
one kernel (`rank_kernel`); the chunks then rank only the events that the kernel leaves open. Where
only the first places matter, for lists and for measures with a cutoff, and the processor has fast
int8 products, these go first (`int8_table`).

Shapes: E events, D width of the table, I items, C items of a chunk, P (event, item) pairs.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TypeVar

import torch

from tron_cli.errors import RunError
from tron_cli.ops import int8_table, rank_kernel
from tron_cli.ops.products import row_products

_EVENTS_AT_ONCE = 1 << 12
_CHUNK_ELEMENTS = 1 << 20  # scores held at once: 4 MB, which fit the cache
_CHUNK_ELEMENTS_CUDA = 1 << 26
_LIST_ELEMENTS = 1 << 24  # scores held at once for lists of the best items, in whole rows
_PAIRS_AT_ONCE = 1 << 10
_LISTS_AT_ONCE = 1 << 6
_ROWS_AT_ONCE = 1 << 12
_SPARE_CANDIDATES = 32  # beyond the last place requested, in case rounding swapped some
# Rounding a table to int8 takes the time that it saves on this many events. Small tables fit the
# cache.
_INT8_EVENTS = 1 << 11
_INT8_ITEMS = 1 << 16
_T = TypeVar("_T")
_NO_RANKS = "nothing can be ranked; train again with a lower lr or with clip_norm"


@dataclass(frozen=True)
class SeenItems:
    """Items that may not be recommended: item_P of event_P, each pair once, never the target."""

    event_P: torch.Tensor
    item_P: torch.Tensor


@dataclass(frozen=True)
class _Events:
    """Events to rank. score_E: scores of the targets with boost_E. largest_E: upper bounds.

    These are float64. Differences of boosts are exact. target_ED: rows of the targets; None: those
    of the table.
    """

    hidden_ED: torch.Tensor
    target_E: torch.Tensor
    score_E: torch.Tensor
    largest_E: torch.Tensor
    boost_E: torch.Tensor
    target_ED: torch.Tensor | None = None

    def __getitem__(self, index: torch.Tensor | slice) -> _Events:
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return _Events(**{name: value[index] for name, value in given.items() if value is not None})


class Catalogue:
    """Item embeddings that events are ranked against.

    table: float32 [I + 1, D], row i for item i; row 0 is no item. Raises RunError if it is not
    finite, since a rank among NaNs would be meaningless.
    """

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table.detach().float().contiguous()
        self.num_items = len(table) - 1
        # In float64 the squares of finite float32 numbers neither overflow nor underflow, and all
        # others stay infinite or NaN; in pieces the copy stays in the cache.
        norm_I = torch.cat([rows.double().norm(dim=1) for rows in self.table.split(_ROWS_AT_ONCE)])
        if not bool(torch.isfinite(norm_I).all()):
            raise RunError(f"the item embeddings hold NaN or infinite values; {_NO_RANKS}")
        self._largest_norm = norm_I.max()
        self._kernel = (
            rank_kernel.CoarseTable(self.table)
            if rank_kernel.usable(self.table.device) and self.num_items
            else None
        )
        self._int8: int8_table.Int8Table | None = None
        self._int8_lock = threading.Lock()
        self._events_so_far = 0
        self._may_use_int8 = int8_table.usable(self.table.device) and self.num_items >= _INT8_ITEMS

    def expect(self, events: int) -> bool:
        """Prepare for ranking that many events up to a cutoff, or listing their best items.

        Returns True where this begins with int8 products, and the table is read for a few rows
        only. For many events the table is rounded to int8, which takes 2.5 s for 1.86M items of
        width 200 and a quarter of the table's memory.
        """
        self._events_so_far += events
        if self._int8 is None and self._may_use_int8 and self._events_so_far >= _INT8_EVENTS:
            with self._int8_lock:
                if self._int8 is None:
                    self._int8 = int8_table.Int8Table(self.table)
        return self._int8 is not None

    def score(
        self, hidden_ED: torch.Tensor, event_P: torch.Tensor, item_P: torch.Tensor
    ) -> torch.Tensor:
        """Return scores of items at events, float64 [P], within `_relative_bound` of float64."""
        by_kernel = self._by_kernel(lambda kernel: kernel.pair_scores(hidden_ED, event_P, item_P))
        if by_kernel is not None:
            return by_kernel
        scores = [
            (hidden_ED[event].double() * self.table[item].double()).sum(dim=1)
            for event, item in zip(
                event_P.split(_PAIRS_AT_ONCE), item_P.split(_PAIRS_AT_ONCE), strict=True
            )
        ]
        return torch.cat(scores) if scores else hidden_ED.new_zeros(0, dtype=torch.float64)

    def _by_kernel(self, compute: Callable[[rank_kernel.CoarseTable], _T]) -> _T | None:
        """Return the result of the kernel; None without one, or if it fails to run.

        Triton compiles a kernel on its first call, for which it needs a C compiler, a writable
        folder and a supported GPU.
        """
        if self._kernel is None:
            return None
        try:
            with torch.cuda.device_of(self.table):
                return compute(self._kernel)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._kernel = None
            rank_kernel.give_up(error)
            return None

    def _relative_bound(self, dtype: torch.dtype) -> float:
        """Return g such that a dot product in `dtype` has an error of at most g * |h| * |e|.

        For any order of summation, with or without fused operations, g = n u / (1 - n u) with u
        half the spacing of numbers at 1 (Higham, Accuracy and Stability of Numerical Algorithms,
        3.1). n is D plus four for the rounding of thresholds and norms.
        """
        roundings = (self.table.shape[1] + 4) * torch.finfo(dtype).eps / 2
        return roundings / (1 - roundings) * (1 + 1e-6)

    @property
    def largest_norm(self) -> torch.Tensor:
        """Norm of the longest row, float64 ()."""
        return self._largest_norm

    def _largest_scores(
        self, hidden_ED: torch.Tensor, largest_norm: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return |h| * |e| for the longest embedding, which no score exceeds, float64 [E]."""
        norm_E = hidden_ED.double().norm(dim=1)
        if not bool(torch.isfinite(norm_E).all()):
            raise RunError(f"the model's hidden states hold NaN or infinite values; {_NO_RANKS}")
        largest_E = norm_E * (self._largest_norm if largest_norm is None else largest_norm)
        if bool((largest_E >= torch.finfo(torch.float32).max / 2).any()):
            raise RunError(f"the scores exceed the range of float32; {_NO_RANKS}")
        return largest_E

    def _float32_bound(self, largest_E: torch.Tensor) -> torch.Tensor:
        """Return the largest possible error of a float32 score, float64 [E]."""
        # A product may underflow to zero, which loses less than the smallest normal number.
        underflow = torch.finfo(torch.float32).tiny * self.table.shape[1]
        return largest_E * self._relative_bound(torch.float32) + underflow

    def ranks(
        self,
        hidden_ED: torch.Tensor,
        target_E: torch.Tensor,
        seen: SeenItems | None = None,
        limit: int | None = None,
        boost_E: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the rank of each target, int64 [E], 1 = best, among all items that are not `seen`.

        hidden_ED: float32; target_E: int64 item ids. Ties count against the target. limit: ranks up
        to it are exact, and larger ones need only be larger than it, which is several times as fast
        for many events. boost_E: float64, at least 0, added to the scores of the targets. Raises
        RunError if hidden states are not finite or scores leave the range of float32.
        """
        return 1 + self._ahead(self._events(hidden_ED, target_E, boost_E), seen, limit)

    def ahead_of_rows(
        self,
        hidden_ED: torch.Tensor,
        target_E: torch.Tensor,
        target_ED: torch.Tensor,
        largest_norm: torch.Tensor,
        seen: SeenItems | None = None,
        limit: int | None = None,
        with_row_0: bool = False,
    ) -> torch.Tensor:
        """Return how many items score at least as high as targets that need not be items here.

        As `ranks` counts them: other than the target and not `seen`, all of them where that is less
        than `limit`, int64 [E]. target_ED: float32, rows of the targets; target_E: their item ids
        here, or -1. largest_norm: float64 (), at least that of all rows. with_row_0: row 0 of the
        table is an item too.
        """
        hidden_ED = hidden_ED.float().contiguous()
        largest_E = self._largest_scores(hidden_ED, largest_norm)
        score_E = (hidden_ED.double() * target_ED.double()).sum(dim=1)
        nothing_E = torch.zeros_like(score_E)
        events = _Events(hidden_ED, target_E, score_E, largest_E, nothing_E, target_ED)
        # Bounds of the faster comparisons allow for scores of the table's own rows.
        by_own_bounds = bool(largest_norm <= 1024 * self._largest_norm)
        ahead_E = self._ahead(events, seen, limit, by_own_bounds=by_own_bounds)
        if with_row_0:
            event_E = torch.arange(len(target_E), device=target_E.device)
            ahead_E += self._at_least(events, event_E, 0 * event_E) & (target_E != 0)
        return ahead_E

    def _ahead(
        self,
        events: _Events,
        seen: SeenItems | None,
        limit: int | None,
        *,
        by_own_bounds: bool = True,
    ) -> torch.Tensor:
        """Return how many other items, not seen, score at least as high as each target."""
        if by_own_bounds:
            ahead_E, event_P, item_P = self._compare(events, seen, limit)
        else:
            ahead_E, event_P, item_P = self._compare_in_chunks(events)
        other = item_P != events.target_E[event_P]
        event_P, item_P = event_P[other], item_P[other]
        ahead_E.index_add_(0, event_P, self._at_least(events, event_P, item_P).long())
        if seen is not None:
            is_ahead = self._at_least(events, seen.event_P, seen.item_P)
            ahead_E.index_add_(0, seen.event_P, -is_ahead.long())
        return ahead_E

    def at_least(
        self,
        hidden_ED: torch.Tensor,
        target_E: torch.Tensor,
        boost_E: torch.Tensor,
        event_P: torch.Tensor,
        item_P: torch.Tensor,
        boost_P: torch.Tensor,
    ) -> torch.Tensor:
        """Mark the pairs that score at least as high as the target, both boosted, bool [P]."""
        return self._at_least(self._events(hidden_ED, target_E, boost_E), event_P, item_P, boost_P)

    def _events(
        self, hidden_ED: torch.Tensor, target_E: torch.Tensor, boost_E: torch.Tensor | None
    ) -> _Events:
        hidden_ED = hidden_ED.float().contiguous()
        largest_E = self._largest_scores(hidden_ED)
        event_E = torch.arange(len(target_E), device=target_E.device)
        score_E = self.score(hidden_ED, event_E, target_E)
        boost_E = torch.zeros_like(score_E) if boost_E is None else boost_E
        return _Events(hidden_ED, target_E, score_E + boost_E, largest_E + boost_E, boost_E)

    def _compare(
        self, events: _Events, seen: SeenItems | None, limit: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return how many items certainly score higher, int64 [E], and the undecided pairs.

        Pairs are two arrays: event and item. The target is among its own undecided items. Both may
        be too few where limit or more eligible items score higher.
        """
        if limit is not None:
            self.expect(len(events.target_E))
            if self._int8 is not None:
                limit_E = _seen_of_events(seen, events.target_E) + limit
                return self._compare_in_int8(self._int8, events, limit_E)
        pieces = max(1, math.ceil(len(events.target_E) / _EVENTS_AT_ONCE))
        size = max(1, math.ceil(len(events.target_E) / pieces))
        ahead, event, item = [], [], []
        for low in range(0, size * pieces, size):
            ahead_e, event_P, item_P = self._compare_in_kernel(events[low : low + size])
            ahead.append(ahead_e)
            event.append(event_P + low)
            item.append(item_P)
        return torch.cat(ahead), torch.cat(event), torch.cat(item)

    def _compare_in_int8(
        self, table: int8_table.Int8Table, events: _Events, limit_E: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compare as `_compare` does up to limit_E higher items, by int8 products first."""
        ahead_E, doubt = table.higher(events.hidden_ED, events.score_E, limit_E)
        open_event = doubt.open_E.nonzero()[:, 0]
        if not len(open_event):
            return ahead_E, doubt.query_P, doubt.item_P
        ahead_E[open_event], event, item = self._compare_in_chunks(events[open_event])
        event_P = torch.cat([doubt.query_P, open_event[event]])
        return ahead_E, event_P, torch.cat([doubt.item_P, item])

    def _compare_in_kernel(
        self, events: _Events
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compare as `_compare_in_chunks`, by the kernel where there is one.

        Events with more undecided items than the kernel holds are compared in chunks.
        """
        compared = self._by_kernel(lambda kernel: kernel.compare(events.hidden_ED, events.score_E))
        if compared is None:
            return self._compare_in_chunks(events)
        ahead_E, near_count_E, near_item_EN = compared
        open_E = near_count_E > near_item_EN.shape[1]
        near_count_E = near_count_E.masked_fill(open_E, 0)
        event_P = torch.repeat_interleave(near_count_E)
        first_E = near_count_E.cumsum(0) - near_count_E
        place_P = torch.arange(len(event_P), device=event_P.device) - first_E[event_P]
        item_P = near_item_EN[event_P, place_P].long()
        open_event = open_E.nonzero()[:, 0]
        if len(open_event):
            ahead_E[open_event], event, item = self._compare_in_chunks(events[open_event])
            event_P = torch.cat([event_P, open_event[event]])
            item_P = torch.cat([item_P, item])
        return ahead_E, event_P, item_P

    def _compare_in_chunks(
        self, events: _Events
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compare by float32 scores, some items at a time; return as `_compare` does."""
        num_events, hidden_ED = len(events.hidden_ED), events.hidden_ED
        bound_E = self._float32_bound(events.largest_E)
        above_E1 = (events.score_E + bound_E).float()[:, None]
        below_E1 = (events.score_E - bound_E).float()[:, None]
        elements = _CHUNK_ELEMENTS if hidden_ED.device.type == "cpu" else _CHUNK_ELEMENTS_CUDA
        columns = min(max(1, elements // max(1, num_events)), max(1, self.num_items))
        # Comparing into float32 and summing is several times as fast as with booleans.
        is_so_EC = hidden_ED.new_empty(num_events, columns)
        ahead_E = torch.zeros_like(events.target_E)
        in_doubt: list[torch.Tensor] = []
        for low in range(1, self.num_items + 1, columns):
            score_EC = row_products(hidden_ED, self.table[low : low + columns])
            out_EC = is_so_EC[:, : score_EC.shape[1]]
            higher_E = torch.gt(score_EC, above_E1, out=out_EC).sum(dim=1)
            not_lower_E = torch.ge(score_EC, below_E1, out=out_EC).sum(dim=1)
            ahead_E += higher_E.long()
            row = (higher_E != not_lower_E).nonzero()[:, 0]
            score_RC = score_EC[row]
            near = ((score_RC >= below_E1[row]) & (score_RC <= above_E1[row])).nonzero()
            in_doubt.append(torch.stack([row[near[:, 0]], near[:, 1] + low]))
        event_P, item_P = torch.cat(in_doubt, dim=1)
        return ahead_E, event_P, item_P

    def _at_least(
        self,
        events: _Events,
        event_P: torch.Tensor,
        item_P: torch.Tensor,
        boost_P: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mark the pairs whose item scores at least as high as the event's target, bool [P]."""
        boost_P = torch.zeros(len(item_P)).to(events.boost_E) if boost_P is None else boost_P
        score_P = self.score(events.hidden_ED, event_P, item_P) + boost_P
        lead_P = score_P - events.score_E[event_P]
        at_least_P = lead_P >= 0
        # The bound is zero for a hidden state of zeros, where everything ties.
        bound_P = 2 * self._relative_bound(torch.float64) * (events.largest_E[event_P] + boost_P)
        open_P = ((lead_P.abs() <= bound_P) & (bound_P > 0)).nonzero()[:, 0]
        for pairs in open_P.split(_PAIRS_AT_ONCE):
            event, item = event_P[pairs], item_P[pairs]
            row = self.table[item]
            if events.target_ED is None:
                target_row = self.table[events.target_E[event]]
            else:
                target_row = events.target_ED[event]
            more = boost_P[pairs] - events.boost_E[event]
            at_least_P[pairs] = True  # equal embeddings tie
            differs = (row != target_row).any(dim=1) | (more != 0)
            for number in differs.nonzero()[:, 0].tolist():
                hidden_D = events.hidden_ED[event[number]]
                sign = _sign_of_difference(
                    hidden_D, row[number], target_row[number], float(more[number])
                )
                at_least_P[pairs[number]] = sign >= 0
        return at_least_P

    def top_items(
        self,
        hidden_ED: torch.Tensor,
        target_E: torch.Tensor | None,
        limit: int,
        seen: SeenItems | None = None,
        barred: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the best items in the order of `ranks`, int64 [E, limit]; 0 where none are left.

        Equal scores are ordered by item id, except that the target comes last among its equals;
        target_E None: there are no targets. barred: int64, items that may not be recommended.
        """
        hidden_ED = hidden_ED.float().contiguous()
        if target_E is None:
            target_E = torch.zeros(len(hidden_ED), dtype=torch.int64, device=hidden_ED.device)
        self._largest_scores(hidden_ED)  # refuses what is not finite
        limit_here = min(limit, self.num_items)
        top = torch.zeros(len(target_E), limit, dtype=torch.int64, device=target_E.device)
        open_E = torch.ones_like(target_E, dtype=torch.bool)
        self.expect(len(target_E))
        if self._int8 is not None:
            most_E = limit_here + _seen_of_events(seen, target_E)
            most_E += 0 if barred is None else len(barred)
            possible = self._int8.possible(hidden_ED, most_E)
            open_E = possible.open_E
            for event_e, score_eC, item_eC in self._in_rows(hidden_ED, possible, seen, barred):
                top[event_e, :limit_here] = self._best(
                    hidden_ED[event_e], target_E[event_e], score_eC, item_eC, limit_here
                )
        events_at_once = max(1, _LIST_ELEMENTS // max(1, self.num_items))
        open_event = open_E.nonzero()[:, 0]
        for event_e in open_event.split(events_at_once) if len(open_event) else ():
            score_eI = row_products(hidden_ED[event_e], self.table[1:])
            if seen is not None:
                place_E = torch.full_like(target_E, -1)
                place_E[event_e] = torch.arange(len(event_e), device=target_E.device)
                here = place_E[seen.event_P] >= 0
                score_eI[place_E[seen.event_P[here]], seen.item_P[here] - 1] = -torch.inf
            if barred is not None:
                score_eI[:, barred - 1] = -torch.inf
            all_I = torch.arange(1, self.num_items + 1, device=target_E.device)
            item_eI = all_I.expand(len(event_e), -1)
            top[event_e, :limit_here] = self._best(
                hidden_ED[event_e], target_E[event_e], score_eI, item_eI, limit_here
            )
        return top

    def _in_rows(
        self,
        hidden_ED: torch.Tensor,
        possible: int8_table.Undecided,
        seen: SeenItems | None,
        barred: torch.Tensor | None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield events, float32 scores of their possible items [e, C], and these items, ascending.

        Items 0 with scores of -inf come last.
        """
        width = self.num_items + 1
        pair_P = (possible.query_P * width + possible.item_P).sort().values
        if seen is not None:
            pair_P = pair_P[~torch.isin(pair_P, seen.event_P * width + seen.item_P)]
        if barred is not None:
            pair_P = pair_P[~torch.isin(pair_P % width, barred)]
        event_P, item_P = pair_P // width, pair_P % width
        count_E = torch.bincount(event_P, minlength=len(hidden_ED))
        first_E = count_E.cumsum(0) - count_E
        listed_E = (~possible.open_E).nonzero()[:, 0]
        for event_e in listed_E.split(_LISTS_AT_ONCE) if len(listed_E) else ():
            first, last = first_E[event_e[0]], first_E[event_e[-1]] + count_E[event_e[-1]]
            event_p, item_p = event_P[first:last], item_P[first:last]
            score_p = [
                (hidden_ED[event] * self.table[item]).sum(dim=1)
                for event, item in zip(
                    event_p.split(_PAIRS_AT_ONCE), item_p.split(_PAIRS_AT_ONCE), strict=True
                )
            ]
            columns = int(count_E[event_e].max())
            row_E = torch.zeros_like(count_E)
            row_E[event_e] = torch.arange(len(event_e))
            place_p = row_E[event_p], torch.arange(int(first), int(last)) - first_E[event_p]
            score_eC = hidden_ED.new_full((len(event_e), columns), -torch.inf)
            item_eC = torch.zeros(score_eC.shape, dtype=torch.int64)
            if score_p:
                score_eC[place_p], item_eC[place_p] = torch.cat(score_p), item_p
            yield event_e, score_eC, item_eC

    def _best(
        self,
        hidden_eD: torch.Tensor,
        target_e: torch.Tensor,
        score_eC: torch.Tensor,
        item_eC: torch.Tensor,
        limit: int,
    ) -> torch.Tensor:
        """Return the best of items with float32 scores, int64 [e, limit]; 0 where none are left.

        item_eC: ascending in each row, but for items that score -inf, which are none.
        """
        largest_e = self._largest_scores(hidden_eD)
        bound_e = self._float32_bound(largest_e)
        close_e = 2 * self._relative_bound(torch.float64) * largest_e
        top_ek = torch.zeros(len(target_e), limit, dtype=torch.int64, device=target_e.device)
        columns = score_eC.shape[1]
        limit = min(limit, columns)
        if not limit:
            return top_ek
        kept = min(limit + _SPARE_CANDIDATES, columns)
        score_ek, index_ek = score_eC.topk(kept, dim=1)
        # In exact arithmetic an item this far below the last place cannot reach it.
        hopeless_e = score_ek[:, limit - 1].double() - 2 * bound_e
        item_ek = item_eC.gather(1, index_ek).masked_fill(score_ek == -torch.inf, 0)
        best_ek, told_ek = self._ordered_by_float64(hidden_eD, item_ek, target_e, close_e)
        top_ek[:, :limit] = best_ek[:, :limit]
        open_e = ~told_ek[:, :limit].all(dim=1)
        if kept < columns:
            open_e |= score_ek[:, -1] >= hopeless_e
        for event in open_e.nonzero()[:, 0].tolist():
            possible = (score_eC[event] >= hopeless_e[event]) & score_eC[event].isfinite()
            best = self._ordered(
                hidden_eD[event], item_eC[event][possible], target_e[event], close_e[event]
            )[:limit]
            top_ek[event, : len(best)] = best
        return top_ek

    def _ordered_by_float64(
        self,
        hidden_eD: torch.Tensor,
        item_ek: torch.Tensor,
        target_e: torch.Tensor,
        close_e: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the items of each event as `_ordered` does, and where float64 decides the order.

        The second array is true where an item differs enough from the next. Item 0 is no item and
        comes last.
        """
        rank_ek = item_ek.masked_fill(item_ek == target_e[:, None], self.num_items + 1)
        item_ek = item_ek.gather(1, rank_ek.argsort(dim=1))
        event_P = torch.arange(len(item_ek), device=item_ek.device).repeat_interleave(
            item_ek.shape[1]
        )
        score_ek = self.score(hidden_eD, event_P, item_ek.flatten()).view(item_ek.shape)
        score_ek, order_ek = score_ek.masked_fill(item_ek == 0, -torch.inf).sort(
            dim=1, descending=True, stable=True
        )
        # Differences that involve item 0 are infinite or NaN, so they are not close.
        near_ek = (score_ek[:, :-1] - score_ek[:, 1:] <= close_e[:, None]) & (close_e > 0)[:, None]
        last_e1 = torch.zeros_like(item_ek[:, :1], dtype=torch.bool)
        return item_ek.gather(1, order_ek), ~torch.cat([near_ek, last_e1], dim=1)

    def _ordered(
        self,
        hidden_D: torch.Tensor,
        item_C: torch.Tensor,
        target: torch.Tensor,
        close: torch.Tensor,
    ) -> torch.Tensor:
        """Sort items (given by ascending id) by exact score, the target last among its equals.

        close: float64, the largest difference of scores that float64 cannot order.
        """
        item_C = item_C[torch.argsort((item_C == target).long(), stable=True)]
        score_C = (self.table[item_C].double() * hidden_D.double()).sum(dim=1)
        order = torch.argsort(score_C, descending=True, stable=True)
        if not bool(((score_C[order].diff().abs() <= close) & (close > 0)).any()):
            return item_C[order]
        row_CD = self.table[item_C]

        def compare(a: int, b: int) -> int:
            return _sign_of_difference(hidden_D, row_CD[b], row_CD[a])

        ranked = sorted(range(len(item_C)), key=functools.cmp_to_key(compare))
        return item_C[torch.tensor(ranked, dtype=torch.int64, device=item_C.device)]


def _seen_of_events(seen: SeenItems | None, target_E: torch.Tensor) -> torch.Tensor:
    """Return the number of seen items of each event, int64 [E]."""
    if seen is None:
        return torch.zeros_like(target_E)
    return torch.bincount(seen.event_P, minlength=len(target_E))


def _sign_of_difference(
    hidden_D: torch.Tensor, row_D: torch.Tensor, other_D: torch.Tensor, more: float = 0.0
) -> int:
    """Return the sign of the difference of two rows' scores and of more, without rounding."""
    # Products of float32 numbers are exact in float64, and fsum rounds only the exact sum.
    terms = torch.cat([row_D, -other_D]).double() * hidden_D.double().repeat(2)
    difference = math.fsum([*terms.tolist(), more])
    return (difference > 0) - (difference < 0)
