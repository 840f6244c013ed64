"""Negative sampling on the device of the batch, without loops or retries.

Random numbers come from torch's default generator of that device.
Shapes: N events of the batch, P of them with a target, B sessions, K uniform negatives, M in-batch
negatives, I items, R rows of ids that are rejected together, J of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from tron_cli.data.batches import Batch, Share

# Weights of items are whole numbers of about this sum, so that drawing under rejection is exact.
_TOTAL_WEIGHT = 1 << 50


@dataclass(frozen=True)
class Distribution:
    """Weights by which negatives are drawn, on the device of the batches.

    cumulative_V: int64 [I + 1], total weight of items 1 to i at entry i; None where all weigh the
    same. log_expected_V: float32 [I + 1], log of the expected number of times that each item is
    among the negatives of a position, uniform and in-batch; None where the loss does not need it.
    """

    num_items: int
    cumulative_V: torch.Tensor | None = None
    log_expected_V: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        weight_I: np.ndarray,
        *,
        expected_of: tuple[int, np.ndarray] | None,
        device: torch.device,
    ) -> Distribution:
        """Build the distribution that draws items in proportion to weight_I, float64, not negative.

        expected_of: for a loss that needs expected counts, the number of uniform negatives of a
        position, and the expected number of its in-batch negatives of each item, float64 [I].
        """
        share_I = weight_I / weight_I.sum()
        cumulative_V = log_expected_V = None
        if weight_I.min() < weight_I.max():
            whole_I = np.rint(share_I * _TOTAL_WEIGHT).astype(np.int64)
            # A weight above zero stays above zero.
            whole_I = np.maximum(whole_I, weight_I > 0)
            cumulative_V = torch.from_numpy(np.concatenate([[0], whole_I.cumsum()])).to(device)
        if expected_of is not None:
            drawn, in_batch_I = expected_of
            expected_I = drawn * share_I + in_batch_I
            # An item that is never a negative needs no correction.
            log_I = np.log(np.where(expected_I > 0, expected_I, 1.0))
            log_expected_V = torch.from_numpy(np.append(0.0, log_I)).float().to(device)
        return cls(len(weight_I), cumulative_V, log_expected_V)

    @property
    def total(self) -> int | torch.Tensor:
        """Total weight of all items."""
        return self.num_items if self.cumulative_V is None else self.cumulative_V[-1]

    def weight_below(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the total weight of the items before each id, ids 1..I + 1."""
        return ids - 1 if self.cumulative_V is None else self.cumulative_V[ids - 1]

    def item_at(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the item at each place 0..total - 1 of all weights laid end to end."""
        if self.cumulative_V is None:
            return weight + 1
        return torch.searchsorted(self.cumulative_V, weight, right=True)


@dataclass(frozen=True)
class Negatives:
    """Negatives drawn for one batch.

    uniform: int64 item ids, [K] of the batch, [B, K] of each session, or [N, K] of each event.
    uniform_keep: bool, [1], [B] or [N]; False where rejection left no item; None: all True.
    in_batch_BM: int64, indices into candidates_N, for each session.
    in_batch_keep_BM: bool, False where a session had fewer candidates than M; None: all True.
    uniform_log_expected, in_batch_log_expected_BM: float32, of the same shapes, log of the expected
    number of negatives of a position that are that item; None where the loss does not need it.
    candidates_N: int64, inputs of the whole batch in a share of it; None: the batch's inputs_N.
    """

    uniform: torch.Tensor
    uniform_keep: torch.Tensor | None
    in_batch_BM: torch.Tensor
    in_batch_keep_BM: torch.Tensor | None
    uniform_log_expected: torch.Tensor | None = None
    in_batch_log_expected_BM: torch.Tensor | None = None
    candidates_N: torch.Tensor | None = None

    def of_share(self, share: Share) -> Negatives:
        """Return the negatives of a share, where these are those of the whole batch."""

        def of_sets(values: torch.Tensor | None) -> torch.Tensor | None:
            if values is None or self.uniform.dim() == 1:
                return values
            # With as many targets as rows, each row has one.
            per_target = len(values) == len(share.whole.target_rows_P)
            return values[share.targets_P if per_target else share.rows_B]

        def of_rows(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values[share.rows_B]

        uniform, in_batch_BM = of_sets(self.uniform), of_rows(self.in_batch_BM)
        assert uniform is not None
        assert in_batch_BM is not None
        return Negatives(
            uniform,
            of_sets(self.uniform_keep),
            in_batch_BM,
            of_rows(self.in_batch_keep_BM),
            of_sets(self.uniform_log_expected),
            of_rows(self.in_batch_log_expected_BM),
            share.whole.inputs_N if in_batch_BM.shape[1] else None,
        )


def sample_negatives(
    batch: Batch,
    distribution: Distribution,
    *,
    num_uniform: int,
    num_batch: int,
    sampling_style: str,
    reject_uniform_session_items: bool,
    reject_in_batch_items: bool,
) -> Negatives:
    """Draw the negatives of a batch by TRON's rules (arXiv 2307.14906).

    Uniform negatives (or those of another distribution) are drawn from the items 1..I with
    replacement: one set per event with a target (eventwise), session (sessionwise) or batch
    (batchwise). batchwise with reject_in_batch_items rejects the inputs of the batch (nothing in
    session-parallel batches, as in TRON's GRU4Rec); eventwise and sessionwise with
    reject_uniform_session_items reject the inputs of the own session. A draw under rejection is
    from the items that remain, in proportion to their weights; a set with none is marked as not
    kept.

    In-batch negatives are occurrences among the inputs of the other sessions (of all sessions
    without reject_in_batch_items), without replacement; all of them where there are fewer than
    num_batch, and the rest is marked as not kept. Padding and masked inputs are neither candidates
    nor rejected.
    """
    inputs_N, num_items = batch.inputs_N, distribution.num_items
    gaps = None
    if sampling_style == "batchwise":
        shape = torch.Size([num_uniform])
        if reject_in_batch_items and batch.lanes_B is None:
            rejected_N = inputs_N
            if batch.padded:
                rejected_N = inputs_N.masked_fill(inputs_N == 0, num_items + 1)
            gaps = _Gaps.of(rejected_N[None], distribution)
    else:
        if reject_uniform_session_items:
            gaps = _Gaps.of(_padded_rows(batch, num_items + 1), distribution)
        if sampling_style == "sessionwise":
            shape = torch.Size([len(batch.lengths_B), num_uniform])
        else:
            shape = torch.Size([len(batch.target_rows_P), num_uniform])
            gaps = gaps.repeated(batch.target_rows_P) if gaps is not None else None
    uniform, uniform_keep = _draw(shape, distribution, gaps, inputs_N.device)
    in_batch_BM, in_batch_keep_BM = _draw_in_batch(
        batch, num_items, num_batch, reject_in_batch_items
    )
    if distribution.log_expected_V is None:
        return Negatives(uniform, uniform_keep, in_batch_BM, in_batch_keep_BM)
    in_batch_ids_BM = inputs_N[in_batch_BM].clamp(max=num_items)  # masked ones are not kept
    return Negatives(
        uniform,
        uniform_keep,
        in_batch_BM,
        in_batch_keep_BM,
        distribution.log_expected_V[uniform],
        distribution.log_expected_V[in_batch_ids_BM],
    )


@dataclass(frozen=True)
class _Gaps:
    """Items that remain under rejection, arranged so that a draw takes one binary search.

    Lay the weights of the allowed items end to end. The j-th smallest rejected id (from 0) has
    gap_j of them below it, so the item at place r lies behind all rejected ids with gap_j <= r, and
    is at place r + their weight among all items.
    gaps_RJ: int64, ascending in each row. skipped_RJ1: int64 [R, J + 1], weight of the first j
    rejected ids. left_R1: int64, weight that is allowed.
    """

    gaps_RJ: torch.Tensor
    skipped_RJ1: torch.Tensor
    left_R1: torch.Tensor

    @classmethod
    def of(cls, rejected_RJ: torch.Tensor, distribution: Distribution) -> _Gaps:
        """Arrange rejected int64 ids, repeated or not; those above num_items are padding."""
        padding = distribution.num_items + 1
        ids = rejected_RJ.sort(dim=1).values
        repeated = torch.zeros_like(ids, dtype=torch.bool)
        repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
        ids = ids.masked_fill(repeated, padding).sort(dim=1).values
        real = ids < padding
        below = distribution.weight_below(ids)
        weight = distribution.weight_below((ids + 1).clamp(max=padding)) - below
        skipped_RJ1 = torch.nn.functional.pad((weight * real).cumsum(1), (1, 0))
        gaps = (below - skipped_RJ1[:, :-1]).masked_fill(~real, torch.iinfo(torch.int64).max)
        return cls(gaps, skipped_RJ1, distribution.total - skipped_RJ1[:, -1:])

    def repeated(self, rows: torch.Tensor) -> _Gaps:
        return _Gaps(self.gaps_RJ[rows], self.skipped_RJ1[rows], self.left_R1[rows])


def _draw(
    shape: torch.Size, distribution: Distribution, gaps: _Gaps | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draw item ids, row r from what row r of `gaps` leaves; return which rows have any."""
    num_items = distribution.num_items
    if gaps is None and distribution.cumulative_V is None:
        return torch.randint(1, num_items + 1, shape, device=device), None
    if gaps is None:
        draws = torch.rand(shape, dtype=torch.float64, device=device)
        # Rounding may give the end itself, where there is no item.
        place = (draws * distribution.total).long().clamp(max=distribution.total - 1)
        return distribution.item_at(place).clamp(1, num_items), None
    rows, width = gaps.gaps_RJ.shape
    draws = torch.rand((rows, shape[-1]), dtype=torch.float64, device=device)
    nth = (draws * gaps.left_R1).long().clamp(max=gaps.left_R1 - 1)
    behind = torch.searchsorted(gaps.gaps_RJ, nth, right=True)
    if distribution.cumulative_V is None:
        drawn = nth + 1 + behind
    else:
        drawn = distribution.item_at(nth + gaps.skipped_RJ1.gather(1, behind))
    drawn = drawn.clamp(1, num_items).view(shape)
    # With equal weights and fewer rejected ids than items no row is empty: no need to wait for
    # the device.
    may_be_empty = width >= num_items or distribution.cumulative_V is not None
    return drawn, (gaps.left_R1 > 0).squeeze(1) if may_be_empty else None


def _draw_in_batch(
    batch: Batch, num_items: int, num_batch: int, other_sessions_only: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows_N = batch.rows_N
    num_sessions, num_events = len(batch.lengths_B), len(rows_N)
    device = rows_N.device
    if not num_batch:
        return torch.zeros((num_sessions, 0), dtype=torch.int64, device=device), None
    # The candidates in packed order, and the number of them in each session, whose own are
    # contiguous; the padding of a batch comes after all of them.
    order_N, own_B = None, batch.lengths_B
    if batch.predicting_P is not None:  # masked events are no candidates, nor is padding
        shown_N = (batch.inputs_N > 0) & (batch.inputs_N <= num_items)
        order_N = (~shown_N).sort(stable=True).indices
        own_B = torch.zeros_like(own_B).index_add_(0, rows_N, shown_N.long())
    end_B = own_B.cumsum(0)
    left_B = end_B[-1] - own_B if other_sessions_only else end_B[-1].expand(num_sessions)
    width = min(num_batch, num_events)
    chosen_BM = _without_replacement(left_B, width)
    if other_sessions_only:
        behind_BM = chosen_BM >= (end_B - own_B)[:, None]
        chosen_BM = chosen_BM + own_B[:, None] * behind_BM
    index_BM = chosen_BM.clamp(max=num_events - 1)
    if order_N is not None:
        index_BM = order_N[index_BM]
    if not batch.padded and order_N is None:  # otherwise only the device knows how many there are
        longest = max(group.gather_RW.shape[1] for group in batch.groups)
        if num_events - (longest if other_sessions_only else 0) >= num_batch:
            return index_BM, None
    return index_BM, torch.arange(width, device=device) < left_B[:, None]


def _without_replacement(size_B: torch.Tensor, draws: int) -> torch.Tensor:
    """Draw from 0..size - 1 without replacement, all sets equally likely: int64 [B, draws].

    In no order; where size < draws, the surplus comes last and is at least size.
    """
    # Fisher and Yates: step i takes the number at a random place from i on, and puts there the
    # number at i. A place where no earlier step has put anything holds its own number, so only the
    # places of the steps matter, and all results follow from them at once.
    step_M = torch.arange(draws, device=size_B.device)
    left_BM = size_B[:, None] - step_M
    random_BM = torch.rand(left_BM.shape, dtype=torch.float64, device=size_B.device)
    place_BM = step_M + (random_BM * left_BM).long().clamp(max=left_BM - 1).clamp(min=0)
    # Sort the steps by place, and those of one place by their order.
    key_BM = (place_BM * draws + step_M).sort(dim=1).values
    place_BM = key_BM // draws
    by_step_BM = key_BM - place_BM * draws
    # Step j finds at j, and moves, what the last earlier step with place j found at its own number,
    # and so on, or j itself. Chains become half as long with each round.
    before_BM = torch.searchsorted(key_BM, (step_M * (draws + 1)).expand_as(key_BM).contiguous())
    before_BM = (before_BM - 1).clamp(min=0)
    comes_from_BM = by_step_BM.gather(1, before_BM)
    earlier_BM = (place_BM.gather(1, before_BM) == step_M) & (comes_from_BM < step_M)
    moved_BM = comes_from_BM.where(earlier_BM, step_M)
    for _ in range((draws - 1).bit_length()):
        moved_BM = moved_BM.gather(1, moved_BM)
    # A place holds what the last earlier step with this place put there.
    found_BM = place_BM.clone()
    again_BM = place_BM[:, 1:] == place_BM[:, :-1]
    found_BM[:, 1:] = moved_BM.gather(1, by_step_BM[:, :-1]).where(again_BM, place_BM[:, 1:])
    return found_BM


def _padded_rows(batch: Batch, padding: int) -> torch.Tensor:
    """Return the inputs per session, int64 [B, longest]; a padded batch repeats the last one."""
    if batch.padded:
        return batch.inputs_N[batch.groups[0].gather_RW]
    longest = max(group.gather_RW.shape[1] for group in batch.groups)
    shape = (len(batch.lengths_B), longest)
    rows = torch.full(shape, padding, dtype=torch.int64, device=batch.inputs_N.device)
    rows[batch.rows_N, batch.places_N] = batch.inputs_N
    return rows
