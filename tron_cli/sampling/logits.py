"""Logits of targets and sampled negatives, with top-k selection in two passes.

Shapes: N positions with a target, n positions of a part, D width of the table, V its rows, K
negatives of a position, k those that top-k keeps, M in-batch negatives, C candidates of one kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from tron_cli.ops.dot_products import dot_products
from tron_cli.ops.parts import on_threads, parts_of_rows
from tron_cli.ops.products import row_products
from tron_cli.ops.topk import highest

if TYPE_CHECKING:
    from tron_cli.data.batches import Batch
    from tron_cli.sampling.negatives import Negatives


def sampled_logits(
    hidden_ND: torch.Tensor,
    table_VD: torch.Tensor,
    batch: Batch,
    negatives: Negatives,
    *,
    topk: int | None,
    mask_collisions: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the logits of each position's target [N] and negatives [N, K], and which count.

    With `topk`, the topk highest negatives of each position are found without gradients, and only
    those are computed with gradients: the loss and gradients of keeping the top-k of the full
    matrix, for a fraction of the work. mask_collisions: a negative that is the position's own
    target does not count. Where `negatives` holds log expected counts, they are subtracted from the
    logits. The third value is bool [N, K], True where a negative counts, or None where all do.
    hidden_ND: the hidden states of the events with a target.
    """
    assert batch.targets_N is not None
    hidden_ND = hidden_ND.to(table_VD.dtype)  # under autocast a layer may return a lower precision
    target_N1 = batch.targets_N[:, None]
    candidates = _Candidates(hidden_ND, table_VD, batch, negatives, mask_collisions)
    if topk is None:
        blocks = candidates.of(slice(None))
        logits_NK, keep_NK = _finite(
            torch.cat([logits_NC for logits_NC, _ in blocks], dim=1), candidates.some_do_not_count
        )
        logit_N1 = dot_products(hidden_ND, table_VD, target_N1)
        return logit_N1[:, 0], logits_NK.to(logit_N1.dtype), keep_NK
    with torch.no_grad():
        device = hidden_ND.device
        parts = on_threads(
            lambda part: _highest(candidates.of(part), topk),
            parts_of_rows(len(hidden_ND), candidates.num_uniform, device),
            device,
        )
        top_Nk, keep_Nk = _finite(
            torch.cat([logits_nk for logits_nk, _ in parts]), candidates.some_do_not_count
        )
        ids_N1k = torch.cat([target_N1, torch.cat([ids_nk for _, ids_nk in parts])], dim=1)
        # The second pass takes the values of the first and adds the gradients.
        logit_N1 = dot_products(hidden_ND, table_VD, target_N1)
        known_N1k = torch.cat([logit_N1, top_Nk.to(logit_N1.dtype)], dim=1)
    logits_N1k = dot_products(hidden_ND, table_VD, ids_N1k, known_N1k)
    return logits_N1k[:, 0], logits_N1k[:, 1:], keep_Nk


class _Candidates:
    """Negatives of all positions with their logits, -inf where a negative does not count."""

    def __init__(
        self,
        hidden_ND: torch.Tensor,
        table_VD: torch.Tensor,
        batch: Batch,
        negatives: Negatives,
        mask_collisions: bool,
    ) -> None:
        self.hidden_ND = hidden_ND
        self.table_VD = table_VD
        self.batch = batch
        self.negatives = negatives
        self.mask_collisions = mask_collisions
        self.some_do_not_count = (
            mask_collisions
            or negatives.uniform_keep is not None
            or negatives.in_batch_keep_BM is not None
        )
        self.num_uniform = negatives.uniform.shape[-1]
        self.num_in_batch = negatives.in_batch_BM.shape[1]
        # Matrix products are in autocast's precision, like those of layers.
        device = hidden_ND.device.type
        self.dtype = (
            torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else hidden_ND.dtype
        )
        if negatives.uniform.dim() == 1 and self.num_uniform:
            self.uniform_K, self.order_K = negatives.uniform.sort()
            self.uniform_KD = F.embedding(self.uniform_K, table_VD).to(self.dtype)
        if self.num_in_batch:
            self.in_batch_NM, self.in_batch_ids_NM = self._in_batch()

    def of(self, part: slice) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return logits [n, C] and ids [n, C] or [C] of each kind of negatives."""
        blocks = []
        if self.num_uniform:
            blocks.append(self._uniform(part))
        if self.num_in_batch:
            blocks.append((self.in_batch_NM[part], self.in_batch_ids_NM[part]))
        return blocks

    def _uniform(self, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_nD = self.hidden_ND[part]
        if self.negatives.uniform.dim() == 1:
            ids = self.uniform_K
            logits_nK = row_products(hidden_nD.to(self.dtype), self.uniform_KD)
        else:
            ids = self._of_events(self.negatives.uniform, part)
            logits_nK = dot_products(hidden_nD, self.table_VD, ids)
        expected = self.negatives.uniform_log_expected
        if expected is not None:
            # Not in place: autograd may need the products, and targets are dropped in place below.
            logits_nK = logits_nK - (
                expected[self.order_K] if ids.dim() == 1 else self._of_events(expected, part)
            )
        if self.mask_collisions:
            self._drop_targets(logits_nK, ids, part)
        if self.negatives.uniform_keep is not None:
            keep = self.negatives.uniform_keep
            keep_n = keep if len(keep) == 1 else self._of_events(keep, part)
            logits_nK.masked_fill_(~keep_n[:, None], -torch.inf)
        return logits_nK, ids

    def _in_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and ids [N, M]; the events of a session share its candidates."""
        batch, negatives = self.batch, self.negatives
        candidates_N = batch.inputs_N if negatives.candidates_N is None else negatives.candidates_N
        ids_BM = candidates_N[negatives.in_batch_BM]
        rows_N = batch.target_rows_P
        ids_NM = ids_BM[rows_N]
        if batch.predicting_P is None:
            logits_NM = self._by_session(ids_BM)
        else:
            logits_NM = dot_products(self.hidden_ND, self.table_VD, ids_NM)
        if negatives.in_batch_log_expected_BM is not None:
            logits_NM = logits_NM - negatives.in_batch_log_expected_BM[rows_N]
        if self.mask_collisions:
            self._drop_targets(logits_NM, ids_NM, slice(None))
        if negatives.in_batch_keep_BM is not None:
            logits_NM.masked_fill_(~negatives.in_batch_keep_BM[rows_N], -torch.inf)
        return logits_NM, ids_NM

    def _by_session(self, ids_BM: torch.Tensor) -> torch.Tensor:
        """Return logits [N, M] with one product per group of sessions; every event has a target.

        Saves 18 % of a TRON XL step (50,000 items, one thread) compared with `dot_products`.
        """
        rows_BMD = F.embedding(ids_BM, self.table_VD).to(self.dtype)
        logits, row = [], 0
        for group in self.batch.groups:
            hidden_RWD = F.embedding(group.gather_RW, self.hidden_ND).to(self.dtype)
            rows_RMD = rows_BMD[row : row + len(hidden_RWD)]
            logits_NM = (hidden_RWD @ rows_RMD.transpose(1, 2)).flatten(0, 1)
            logits.append(logits_NM if group.keep is None else logits_NM[group.keep])
            row += len(hidden_RWD)
        return torch.cat(logits)

    def _drop_targets(self, logits_nC: torch.Tensor, ids: torch.Tensor, part: slice) -> None:
        assert self.batch.targets_N is not None
        targets_n1 = self.batch.targets_N[part, None]
        if ids.dim() == 2 or logits_nC.is_cuda:
            logits_nC.masked_fill_(ids == targets_n1, -torch.inf)
            return
        # Shared ids are ascending: finding the few equal ones instead of comparing all saves 10 %
        # of a TRON XL step (50,000 items, one thread).
        first_n = torch.searchsorted(ids, targets_n1)[:, 0]
        copies_n = torch.searchsorted(ids, targets_n1, right=True)[:, 0] - first_n
        event_P = torch.repeat_interleave(copies_n)
        nth_P = torch.arange(len(event_P)) - (copies_n.cumsum(0) - copies_n)[event_P]
        place_P = event_P * logits_nC.shape[1] + first_n[event_P] + nth_P
        logits_nC.view(-1).index_fill_(0, place_P, -torch.inf)

    def _of_events(self, values: torch.Tensor, part: slice) -> torch.Tensor:
        """Select the rows of `values`, one per event or per session, for the events of a part."""
        rows_N = self.batch.target_rows_P
        return values[part] if len(values) == len(rows_N) else values[rows_N[part]]


def _finite(
    logits_NK: torch.Tensor, some_do_not_count: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return logits that are finite, and which of them count."""
    if not some_do_not_count:
        return logits_NK, None
    keep_NK = logits_NK != -torch.inf  # NaN counts, so that it shows in the loss
    return logits_NK.masked_fill(~keep_NK, 0.0), keep_NK


def _highest(
    blocks: list[tuple[torch.Tensor, torch.Tensor]], topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and ids [n, k] of the highest candidates of all kinds, in no order."""
    logits, ids = [], []
    for logits_nC, ids_C in blocks:
        if logits_nC.shape[1] > topk:
            logits_nC, column_nC = highest(logits_nC, topk)
            ids_C = ids_C[column_nC] if ids_C.dim() == 1 else ids_C.gather(1, column_nC)
        logits.append(logits_nC)
        ids.append(ids_C.expand_as(logits_nC))
    logits_nC, ids_nC = torch.cat(logits, dim=1), torch.cat(ids, dim=1)
    if logits_nC.shape[1] <= topk:
        return logits_nC, ids_nC
    logits_nk, column_nk = highest(logits_nC, topk)
    return logits_nk, ids_nC.gather(1, column_nk)
