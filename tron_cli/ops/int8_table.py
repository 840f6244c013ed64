"""Items that can be among the best, by int8 products with a proved error bound.

A row e of the table and a query h are rounded to multiples of steps of their own: e = s q + d and
h = t p + f, with integers |q|, |p| <= 127. Then

    |h.e - s t (p.q)| = |t p.d + f.e| <= t |p| |d| + |f| |e|

and p.q is exact in int32. The result is exact once the few items that int8 leaves undecided are
scored again exactly. Items are sorted by the norm of their rows, so that one bound is tight for all
items of a chunk and the largest scores come first.

The lists of 64 queries among 1,855,603 items of width 200 take 82 ms on two cores with AVX-512
VNNI, an eighth of their time by float32; that of one takes 17 ms, in which 0.37 GB are read. Exact
ranks up to 20 are three times as fast. Threads share the chunks, and torch uses one in each: next
to the threads of a server this doubles the rate of requests that torch's own threads reach, of
which each operator wakes one and waits for it.

Shapes: E queries, D width, I items, C items of a chunk, G groups of items, P (query, item) pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from tron_cli.ops.parts import on_threads

_QUERIES = 64  # at once: their scores of a chunk take 16 MB
_CHUNK = 1 << 16  # of a quarter of that size a single query takes 10 ms longer
_GROUP = 16  # items of which only the maximum is looked at first
_LARGER = 8  # groups in a larger one
_SCARCE = 16  # groups per requested item; with fewer, too many items would be possible
_LARGEST = 127
_MOST_PAIRS = 1 << 14  # of one query, and _GROUP more for each item asked for
_ROWS_AT_ONCE = 1 << 12
_EPS = torch.finfo(torch.float32).eps
_INFINITY = torch.tensor(torch.inf)
_SLACK = 1 + 1e-5  # for the rounding of the bounds themselves, in float64


def usable(device: torch.device) -> bool:
    """Return True if the processor multiplies int8 exactly and fast, and PyTorch lets it."""
    return device.type == "cpu" and _has_int8_products()


@functools.cache
def _has_int8_products() -> bool:
    # Without VNNI oneDNN adds pairs of products in int16, which can overflow.
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.onednn, "qlinear_prepack")
        and getattr(torch.cpu, "_is_vnni_supported", lambda: False)()
    )


@dataclass(frozen=True)
class _Queries:
    """Rounded queries. point_ED: uint8, p + 128. step_E, norm_E, error_E: float64, t, |p|, |f| / t.

    Scores and bounds of a query are in units of its t.
    """

    point_ED: torch.Tensor
    step_E: torch.Tensor
    norm_E: torch.Tensor
    error_E: torch.Tensor

    def __len__(self) -> int:
        return len(self.step_E)

    def __getitem__(self, index: torch.Tensor) -> _Queries:
        return _Queries(
            self.point_ED[index], self.step_E[index], self.norm_E[index], self.error_E[index]
        )


def _rounded(hidden_ED: torch.Tensor) -> _Queries:
    hidden_ED = hidden_ED.double()
    step_E1 = hidden_ED.abs().amax(dim=1, keepdim=True) / _LARGEST
    scaled_ED = torch.where(step_E1 > 0, hidden_ED / step_E1, 0.0)
    point_ED = scaled_ED.round()
    return _Queries(
        (point_ED + 128).to(torch.uint8),
        step_E1[:, 0],
        point_ED.norm(dim=1),
        (scaled_ED - point_ED).norm(dim=1),
    )


class _Chunk:
    """Items with rows of similar norm, in the layout that the product needs.

    size: number of items; they are in groups of _GROUP, of which the last may be filled up. norm,
    error: the largest |e| and |d|.
    """

    def __init__(self, rows_CD: torch.Tensor) -> None:
        self.size = len(rows_CD)
        self.num_groups = -(-self.size // _GROUP)
        largest_C = rows_CD.abs().amax(dim=1)
        # The product may flush numbers near the smallest to zero.
        self._step_C = torch.where(largest_C > 1e-30, largest_C / _LARGEST, 0.0)
        point_CD = (rows_CD / self._step_C[:, None]).nan_to_num_(0.0, 0.0, 0.0).round_()
        point_CD.clamp_(-_LARGEST, _LARGEST)
        self.norm = _largest_norm(rows_CD) * _SLACK
        error_CD = point_CD.mul(self._step_C[:, None]).sub_(rows_CD)
        # The last term is the rounding of s q and of the difference.
        self.error = _largest_norm(error_CD) * _SLACK + _EPS * self.norm
        self._packed = torch.ops.onednn.qlinear_prepack(point_CD.to(torch.int8), None)
        self._zero_C = torch.zeros(self.size, dtype=torch.int32)

    def scores(self, point_ED: torch.Tensor) -> torch.Tensor:
        """Return s (p.q), float32 [E, C]; -inf where the last group is filled up."""
        score_EC = torch.ops.onednn.qlinear_pointwise(
            point_ED,
            1.0,
            128,
            self._packed,
            self._step_C,
            self._zero_C,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        missing = self.num_groups * _GROUP - self.size
        return F.pad(score_EC, (0, missing), value=-torch.inf) if missing else score_EC


@dataclass(frozen=True)
class Undecided:
    """Pairs to be scored again: item_P of query_P, both int64, each pair once, in no order.

    open_E: bool, queries about which nothing is known; they have no pairs.
    """

    query_P: torch.Tensor
    item_P: torch.Tensor
    open_E: torch.Tensor


@dataclass(frozen=True)
class _Pairs:
    """Queries and places in the order of norms, int64; scores, float."""

    query_P: torch.Tensor
    place_P: torch.Tensor
    score_P: torch.Tensor

    def __len__(self) -> int:
        return len(self.query_P)

    def __getitem__(self, keep_P: torch.Tensor) -> _Pairs:
        return _Pairs(self.query_P[keep_P], self.place_P[keep_P], self.score_P[keep_P])


_NO_PAIRS = _Pairs(
    torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
)


class _Scored:
    """Scores of a chunk and the best of each group. bound_E: float64, bounds of their errors."""

    def __init__(
        self, chunk: _Chunk, first_place: int, point_ED: torch.Tensor, bound_E: torch.Tensor
    ) -> None:
        self._first_place = first_place
        self._score_EC = chunk.scores(point_ED)[: len(bound_E)]
        # Group g has items g, g + G, g + 2 G ..., so that maxima are taken over whole vectors.
        self.best_EG = self._score_EC.unflatten(1, (_GROUP, chunk.num_groups)).amax(dim=1)
        self.bound_E = bound_E

    def certain(self) -> torch.Tensor:
        """Return lower bounds of the best scores of some of the items, float32 [E, groups].

        Few larger groups are compared sooner, and seldom hold two of the best items.
        """
        best_EG = self.best_EG
        if best_EG.shape[1] % _LARGER == 0:
            best_EG = best_EG.unflatten(1, (_LARGER, -1)).amax(dim=1)
        return best_EG - _rounded_up(self.bound_E)[:, None]

    def reaching(self, threshold_E: torch.Tensor) -> _Pairs:
        """Return the pairs that can score threshold_E (float64) or more, with int8 scores."""
        below_E1 = _rounded_down(threshold_E - self.bound_E)[:, None]
        num_groups = self.best_EG.shape[1]
        group_Q = (self.best_EG >= below_E1).flatten().nonzero()[:, 0]
        if not len(group_Q):
            return _NO_PAIRS
        query_Q = group_Q // num_groups
        column_Q = group_Q - query_Q * num_groups
        member_M = torch.arange(0, num_groups * _GROUP, num_groups)
        first_Q = query_Q * (num_groups * _GROUP) + column_Q
        score_QM = self._score_EC.flatten()[first_Q[:, None] + member_M]
        found_P = (score_QM >= below_E1[query_Q]).flatten().nonzero()[:, 0]
        row_P = found_P // _GROUP
        member_P = found_P - row_P * _GROUP
        place_P = column_Q[row_P] + member_P * num_groups + self._first_place
        return _Pairs(query_Q[row_P], place_P, score_QM.flatten()[found_P])


@dataclass(frozen=True)
class _Counts:
    """Counts for each query so far: higher items, ahead_E, and items in doubt, doubts_E.

    threshold_E: float64, infinite for a query that is done.
    """

    threshold_E: torch.Tensor
    limit_E: torch.Tensor
    ahead_E: torch.Tensor
    doubts_E: torch.Tensor
    open_E: torch.Tensor

    def add(self, scored: _Scored, index_e: torch.Tensor) -> _Pairs:
        """Add a chunk, scored for the queries index_e; return the pairs in doubt."""
        threshold_e, ahead_e = self.threshold_E[index_e], self.ahead_E[index_e]
        above_e1 = _rounded_up(threshold_e + scored.bound_E)[:, None]
        # Each higher group has a higher item; with enough such groups nothing else matters.
        higher_e = (scored.best_EG > above_e1).sum(dim=1)
        enough_e = ahead_e + higher_e >= self.limit_E[index_e]
        threshold_e[enough_e] = torch.inf
        pairs = scored.reaching(threshold_e)
        is_higher_P = pairs.score_P > above_e1[pairs.query_P, 0]
        higher_e = higher_e.where(enough_e, _count(pairs.query_P[is_higher_P], len(index_e)))
        pairs = pairs[~is_higher_P]
        doubts_e = self.doubts_E[index_e] + _count(pairs.query_P, len(index_e))
        open_e = doubts_e > _MOST_PAIRS
        self.threshold_E[index_e] = threshold_e.masked_fill(open_e, torch.inf)
        self.ahead_E[index_e] = ahead_e + higher_e
        self.doubts_E[index_e] = doubts_e
        self.open_E[index_e] = open_e
        return replace(pairs, query_P=index_e[pairs.query_P])


class _Search:
    """Items of some chunks that can be among the best count_E of a query.

    best_EK: the highest lower bounds of the groups' best scores, the K highest of count_E. pairs:
    those that can be among the best, with upper bounds of their scores. open_E: bool, queries with
    too many pairs, which have none.
    """

    def __init__(self, count_E: torch.Tensor, open_E: torch.Tensor) -> None:
        self._count_E, self.open_E = count_E, open_E.clone()
        self._most = int(count_E.max())
        self._limit = _MOST_PAIRS + _GROUP * self._most
        self.best_EK = torch.full((len(count_E), self._most), -torch.inf)
        self._certain: list[torch.Tensor] = []  # since they were last compared
        self._waiting: list[_Scored] = []  # until there is a threshold
        self._done, self._next_update = 0, self._most
        self.pairs: list[_Pairs] = []
        self._num_pairs, self._next_check = 0, self._limit

    def add(self, scored: _Scored) -> None:
        """Add a chunk."""
        self._waiting.append(scored)
        self._certain.append(scored.certain())
        self._done += self._certain[-1].shape[1]
        if self._done >= self._next_update:
            self._next_update = 2 * self._done
            self._compare()
        if self._done >= self._most:
            self._collect()

    def finish(self) -> None:
        """Take the chunks that still wait into account."""
        self._compare()
        self._collect()

    def _compare(self) -> None:
        self.best_EK = _highest([self.best_EK, *self._certain])
        self._certain.clear()
        self._threshold_E = _at_place(self.best_EK, self._count_E)
        self._threshold_E[self.open_E] = torch.inf

    def _collect(self) -> None:
        for scored in self._waiting:
            pairs = scored.reaching(self._threshold_E)
            if not len(pairs):
                continue
            # An upper bound of the scores from here on.
            highest_P = pairs.score_P + scored.bound_E[pairs.query_P]
            self.pairs.append(replace(pairs, score_P=highest_P))
            self._num_pairs += len(pairs)
        self._waiting.clear()
        if self._num_pairs > self._next_check:
            doubts_nE = [_count(pairs.query_P, len(self._count_E)) for pairs in self.pairs]
            self.open_E |= torch.stack(doubts_nE).sum(dim=0) > self._limit
            self._threshold_E[self.open_E] = torch.inf
            self.pairs = [pairs[~self.open_E[pairs.query_P]] for pairs in self.pairs]
            self._num_pairs = sum(map(len, self.pairs))
            self._next_check = self._num_pairs + self._limit


class Int8Table:
    """Rows 1..I of a float32 table [I + 1, D] in int8, which take I x D bytes. I is at least 1."""

    def __init__(self, table: torch.Tensor) -> None:
        norm_I = torch.cat([rows.double().norm(dim=1) for rows in table[1:].split(_ROWS_AT_ONCE)])
        self._in_range = bool(norm_I.max() < 1e15)  # so that no square overflows
        self._item_I = norm_I.argsort(descending=True, stable=True).int() + 1
        self._chunks = [_Chunk(table[item_C.long()]) for item_C in self._item_I.split(_CHUNK)]
        self._norm_n1, self._error_n1 = torch.tensor(
            [[(chunk.norm,) for chunk in self._chunks], [(chunk.error,) for chunk in self._chunks]],
            dtype=torch.float64,
        )

    def possible(self, hidden_ED: torch.Tensor, count_E: torch.Tensor) -> Undecided:
        """Return pairs that include the best count_E items of each query.

        hidden_ED: float32. count_E: int64, 1 or more. A query is open where too many items are
        requested or are close to the best.
        """
        queries = _rounded(hidden_ED)
        open_E = self._unfit(queries) | (_SCARCE * _GROUP * count_E > len(self._item_I))
        count_E = count_E.masked_fill(open_E, 1)
        found: list[_Pairs] = []
        for index_e in torch.arange(len(queries)).split(_QUERIES):
            open_e = open_E[index_e]
            if bool(open_e.all()):
                continue
            pairs_e = self._possible(queries[index_e], count_E[index_e], open_e)
            found += [replace(pairs, query_P=index_e[pairs.query_P]) for pairs in pairs_e]
            open_E[index_e] = open_e
        return self._undecided(found, open_E)

    def higher(
        self, hidden_ED: torch.Tensor, score_E: torch.Tensor, limit_E: torch.Tensor
    ) -> tuple[torch.Tensor, Undecided]:
        """Count the items that certainly score higher than score_E; return those in doubt.

        score_E: float64. limit_E: int64, 1 or more: where that many items are higher, the count is
        limit_E or more but need not be complete, and pairs are missing. Returns int64 [E] and the
        pairs. A query is open, and its count meaningless, where too many items are in doubt.
        """
        queries = _rounded(hidden_ED)
        open_E = self._unfit(queries)
        counts = _Counts(
            threshold_E=(score_E / queries.step_E).masked_fill(open_E, torch.inf),
            limit_E=limit_E,
            ahead_E=torch.zeros_like(limit_E),
            doubts_E=torch.zeros_like(limit_E),
            open_E=open_E,
        )
        found: list[_Pairs] = []
        # Most queries are done after a few chunks; the others are then computed together.
        low, high = 0, 1
        while low < len(self._chunks):
            active_E = counts.threshold_E.isfinite().nonzero()[:, 0]
            if not len(active_E):
                break
            parts = min(_QUERIES, -(-len(active_E) // torch.get_num_threads()))
            count = functools.partial(self._count_higher, queries, counts, range(low, high))
            for pairs in on_threads(count, active_E.split(parts), active_E.device):
                found += pairs
            low, high = high, min(4 * high, len(self._chunks))
        return counts.ahead_E, self._undecided(found, counts.open_E)

    def _count_higher(
        self, queries: _Queries, counts: _Counts, numbers: range, index_e: torch.Tensor
    ) -> list[_Pairs]:
        """Count the items of some chunks for the queries index_e; return the pairs in doubt."""
        return [counts.add(each, index_e) for each in self._scored(queries[index_e], numbers)]

    def _possible(
        self, queries: _Queries, count_E: torch.Tensor, open_E: torch.Tensor
    ) -> list[_Pairs]:
        """Return the pairs of some queries; open_E is updated."""
        numbers = iter(range(len(self._chunks)))

        def search(_: int) -> _Search:
            found = _Search(count_E, open_E)
            for scored in self._scored(queries, numbers):
                found.add(scored)
            found.finish()
            return found

        parts = range(min(torch.get_num_threads(), len(self._chunks)))
        searches = on_threads(search, parts, count_E.device)
        best_EK = _highest([found.best_EK for found in searches])
        threshold_E = _at_place(best_EK, count_E)
        for found in searches:
            open_E |= found.open_E
        threshold_E[open_E] = torch.inf
        pairs = [pairs for found in searches for pairs in found.pairs]
        return [each[each.score_P >= threshold_E[each.query_P]] for each in pairs]

    def _scored(self, queries: _Queries, numbers: Iterable[int]) -> Iterator[_Scored]:
        """Yield the scores of the chunks with these numbers."""
        longest_n1 = self._norm_n1 + self._error_n1
        # The last term is the rounding of s (p.q), and of a difference with a bound.
        share_n1 = self._error_n1 + 3 * _EPS * longest_n1
        bound_nE = (queries.norm_E * share_n1 + queries.error_E * self._norm_n1) * _SLACK
        # oneDNN keeps a kernel for each number of rows.
        missing = -len(queries) % (8 if len(queries) > 8 else 1)
        point_ED = F.pad(queries.point_ED, (0, 0, 0, missing))
        for number in numbers:
            chunk = self._chunks[number]
            yield _Scored(chunk, number * _CHUNK, point_ED, bound_nE[number])

    def _unfit(self, queries: _Queries) -> torch.Tensor:
        """Mark the queries that cannot be rounded: their products could underflow or overflow."""
        return (queries.step_E < 1e-30) | (not self._in_range)

    def _undecided(self, found: list[_Pairs], open_E: torch.Tensor) -> Undecided:
        """Return the pairs, but for those of open queries."""
        nothing = torch.zeros(0, dtype=torch.int64)
        query_P = torch.cat([nothing, *(pairs.query_P for pairs in found)])
        place_P = torch.cat([nothing, *(pairs.place_P for pairs in found)])
        keep_P = ~open_E[query_P]
        return Undecided(query_P[keep_P], self._item_I[place_P[keep_P]].long(), open_E)


def _largest_norm(rows_CD: torch.Tensor) -> float:
    norm_C = torch.linalg.vector_norm(rows_CD, dim=1, dtype=torch.float64)
    return float(norm_C.max())


def _highest(values: list[torch.Tensor]) -> torch.Tensor:
    """Return the highest values of each row, as many as the first of the tensors has."""
    return torch.cat(values, dim=1).topk(values[0].shape[1], dim=1).values


def _at_place(best_EK: torch.Tensor, count_E: torch.Tensor) -> torch.Tensor:
    """Return the count_E-th of each row, float64 [E]."""
    return best_EK.gather(1, count_E[:, None] - 1)[:, 0].double()


def _count(query_P: torch.Tensor, num_queries: int) -> torch.Tensor:
    return torch.bincount(query_P, minlength=num_queries)


def _rounded_up(values: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(values.float(), _INFINITY)


def _rounded_down(values: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(values.float(), -_INFINITY)
