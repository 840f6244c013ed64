"""Negative sampling on the device of the batch, without loops and without retries.

Random numbers come from torch's default generator of that device.
Shapes: N events of the batch, B sessions, K uniform negatives, M in-batch negatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tron_cli.batches import Batch


@dataclass(frozen=True)
class Negatives:
    """What is drawn for one batch.

    uniform: int64 item ids, [K] of the batch, [B, K] of each session, or [N, K] of each event.
    uniform_keep: bool, [1], [B] or [N]; False where rejection left no item; None: all True.
    in_batch_BM: int64, indices into the batch's inputs_N, for each session.
    in_batch_keep_BM: bool, False where a session had fewer candidates than M; None: all True.
    """

    uniform: torch.Tensor
    uniform_keep: torch.Tensor | None
    in_batch_BM: torch.Tensor
    in_batch_keep_BM: torch.Tensor | None


def sample_negatives(
    batch: Batch,
    num_items: int,
    *,
    num_uniform: int,
    num_batch: int,
    sampling_style: str,
    reject_uniform_session_items: bool,
    reject_in_batch_items: bool,
) -> Negatives:
    """Draw the negatives of a batch by TRON's rules (arXiv 2307.14906).

    Uniform negatives are drawn from the items 1..num_items with replacement: one set an event
    (eventwise), a session (sessionwise) or a batch (batchwise). Rejected are, batchwise with
    reject_in_batch_items, the inputs of the batch; eventwise and sessionwise with
    reject_uniform_session_items, the inputs of the own session. A draw under rejection is uniform
    over the items that remain; where none remains the set is marked as not kept.

    In-batch negatives are occurrences among the inputs of the other sessions (of all sessions
    without reject_in_batch_items), without replacement; all of them where there are fewer than
    num_batch, and the rest is marked as not kept. Padding of a batch is no candidate and rejects
    nothing.
    """
    inputs_N = batch.inputs_N
    gaps = None
    if sampling_style == "batchwise":
        shape = torch.Size([num_uniform])
        if reject_in_batch_items:
            rejected_N = inputs_N
            if batch.padded:
                rejected_N = inputs_N.masked_fill(inputs_N == 0, num_items + 1)
            gaps = _Gaps.of(rejected_N[None], num_items)
    else:
        if reject_uniform_session_items:
            gaps = _Gaps.of(_padded_rows(batch, num_items + 1), num_items)
        if sampling_style == "sessionwise":
            shape = torch.Size([len(batch.lengths_B), num_uniform])
        else:
            shape = torch.Size([len(inputs_N), num_uniform])
            gaps = gaps.repeated(batch.rows_N) if gaps is not None else None
    uniform, uniform_keep = _draw_uniform(shape, num_items, gaps, inputs_N.device)
    in_batch_BM, in_batch_keep_BM = _draw_in_batch(batch, num_batch, reject_in_batch_items)
    return Negatives(uniform, uniform_keep, in_batch_BM, in_batch_keep_BM)


@dataclass(frozen=True)
class _Gaps:
    """The items that rejection leaves, so that the r-th of them is found by one binary search.

    The j-th smallest rejected id (from 0) has gap_j = id_j - 1 - j allowed items below it, so the
    r-th allowed item (from 0) is r + 1 + the number of j with gap_j <= r.
    gaps_RJ: int64, ascending in each row. left_R1: int64, how many items are allowed.
    """

    gaps_RJ: torch.Tensor
    left_R1: torch.Tensor

    @classmethod
    def of(cls, rejected_RJ: torch.Tensor, num_items: int) -> _Gaps:
        """rejected_RJ: int64 ids, repeated or not; those above num_items are padding."""
        ids = rejected_RJ.sort(dim=1).values
        repeated = torch.zeros_like(ids, dtype=torch.bool)
        repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
        ids = ids.masked_fill(repeated, num_items + 1).sort(dim=1).values
        real = ids <= num_items
        gaps = ids - 1 - torch.arange(ids.shape[1], device=ids.device)
        return cls(
            gaps.masked_fill(~real, num_items + 1), num_items - real.sum(dim=1, keepdim=True)
        )

    def repeated(self, rows: torch.Tensor) -> _Gaps:
        return _Gaps(self.gaps_RJ[rows], self.left_R1[rows])


def _draw_uniform(
    shape: torch.Size, num_items: int, gaps: _Gaps | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Item ids, row r from the items that row r of `gaps` leaves; and which rows have any."""
    if gaps is None:
        return torch.randint(1, num_items + 1, shape, device=device), None
    rows, width = gaps.gaps_RJ.shape
    draws = torch.rand((rows, shape[-1]), dtype=torch.float64, device=device)
    nth = (draws * gaps.left_R1).long().clamp(max=gaps.left_R1 - 1)
    drawn = nth + 1 + torch.searchsorted(gaps.gaps_RJ, nth, right=True)
    drawn = drawn.clamp(1, num_items).view(shape)
    # With fewer rejected ids than items, no row is empty: nothing to ask the device.
    return drawn, (gaps.left_R1 > 0).squeeze(1) if width >= num_items else None


def _draw_in_batch(
    batch: Batch, num_batch: int, other_sessions_only: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows_N = batch.rows_N
    num_sessions, num_events = len(batch.lengths_B), len(rows_N)
    device = rows_N.device
    if not num_batch:
        return torch.zeros((num_sessions, 0), dtype=torch.int64, device=device), None
    # The num_batch largest of independent random keys are a draw without replacement.
    keys_BN = torch.rand((num_sessions, num_events), device=device)
    if other_sessions_only:
        own_BN = rows_N == torch.arange(num_sessions, device=device)[:, None]
        keys_BN = keys_BN.masked_fill(own_BN, -1.0)
    if batch.padded:
        keys_BN = keys_BN.masked_fill(batch.inputs_N == 0, -1.0)
    key_BM, index_BM = keys_BN.topk(min(num_batch, num_events), dim=1)
    if batch.padded:
        # How many events there are is known on the device only.
        return index_BM, key_BM >= 0
    longest = max(group.gather_RW.shape[1] for group in batch.groups)
    enough = num_events - (longest if other_sessions_only else 0) >= num_batch
    return index_BM, None if enough else key_BM >= 0


def _padded_rows(batch: Batch, padding: int) -> torch.Tensor:
    """int64 [B, longest]: the inputs of each session, in a padded batch the last one repeated."""
    if batch.padded:
        return batch.inputs_N[batch.groups[0].gather_RW]
    longest = max(group.gather_RW.shape[1] for group in batch.groups)
    shape = (len(batch.lengths_B), longest)
    rows = torch.full(shape, padding, dtype=torch.int64, device=batch.inputs_N.device)
    rows[batch.rows_N, batch.places_N] = batch.inputs_N
    return rows
