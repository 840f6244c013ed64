"""Hidden states and sampled items -> logits, with top-k selection in two passes.

Shapes: N positions, D width of the table, V its rows, K negatives of a position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from tron_cli.batches import Batch
    from tron_cli.negatives import Negatives

# Elements of gathered table rows held at once: small enough for the cache to help.
_GATHER_ELEMENTS = 1 << 21


def sampled_logits(
    hidden_ND: torch.Tensor,
    table_VD: torch.Tensor,
    batch: Batch,
    negatives: Negatives,
    *,
    topk: int | None,
    mask_collisions: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Logits of each position's target [N] and negatives [N, K], and which negatives count.

    With `topk`, the topk highest negatives of each position are found without gradients, and only
    those are computed with gradients: the loss and gradients of keeping the top-k of the full
    matrix, for a fraction of the work. mask_collisions: a negative that is the position's own
    target does not count. The third value is bool [N, K], or None where all count.
    """
    assert batch.targets_N is not None
    hidden_ND = hidden_ND.to(table_VD.dtype)  # under autocast a layer may return less
    if topk is None:
        logits_NK, keep_NK = _all_logits(
            hidden_ND, table_VD, batch, negatives, mask_collisions=mask_collisions
        )
        target_N1 = dot_products(hidden_ND, table_VD, batch.targets_N[:, None])
        return target_N1[:, 0], logits_NK.to(target_N1.dtype), keep_NK
    with torch.no_grad():
        logits_NK, keep_NK = _all_logits(
            hidden_ND, table_VD, batch, negatives, mask_collisions=mask_collisions
        )
        if keep_NK is not None:
            logits_NK.masked_fill_(~keep_NK, -torch.inf)
        # The order of the kept does not matter, only the set.
        top_Nk, chosen_Nk = logits_NK.topk(min(topk, logits_NK.shape[1]), dim=1, sorted=False)
        keep_Nk = None if keep_NK is None else top_Nk > -torch.inf
        ids_Nk = _ids_at(chosen_Nk, batch, negatives)
        target_N1 = batch.targets_N[:, None]
        ids_N1k = torch.cat([target_N1, ids_Nk], dim=1)
        known_N1k = None
        if top_Nk.dtype == hidden_ND.dtype:
            # The first pass was in the precision of the second: its values are the second's.
            # Those that do not count are made finite, as a loss expects.
            if keep_Nk is not None:
                top_Nk = top_Nk.masked_fill(~keep_Nk, 0.0)
            known_N1k = torch.cat([dot_products(hidden_ND, table_VD, target_N1), top_Nk], dim=1)
    logits_N1k = dot_products(hidden_ND, table_VD, ids_N1k, known_N1k)
    return logits_N1k[:, 0], logits_N1k[:, 1:], keep_Nk


def _all_logits(
    hidden_ND: torch.Tensor,
    table_VD: torch.Tensor,
    batch: Batch,
    negatives: Negatives,
    *,
    mask_collisions: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[N, K + M]: the uniform negatives, then the in-batch ones; and which of them count."""
    uniform, rows_N = negatives.uniform, batch.rows_N
    uniform_ids = uniform if len(uniform.shape) == 1 else _per_event(uniform, batch)
    blocks, keeps = [], []
    if uniform.shape[-1]:
        if uniform.dim() == 1:
            blocks.append(hidden_ND @ F.embedding(uniform, table_VD).T)
        else:
            blocks.append(dot_products(hidden_ND, table_VD, uniform_ids))
        keeps.append(_keep(uniform_ids, batch, mask_collisions))
        if negatives.uniform_keep is not None:
            kept = negatives.uniform_keep
            keeps[-1] &= (kept if uniform.dim() == 1 else _per_event(kept, batch))[:, None]
    if negatives.in_batch_BM.shape[1]:
        # Few distinct items, each a candidate of many positions: score them all, then pick.
        items_U, item_of_N = batch.inputs_N.unique(return_inverse=True)
        scores_NU = hidden_ND @ F.embedding(items_U, table_VD).T
        column_NM = item_of_N[negatives.in_batch_BM][rows_N]
        blocks.append(scores_NU.gather(1, column_NM))
        keeps.append(_keep(items_U[column_NM], batch, mask_collisions))
        if negatives.in_batch_keep_BM is not None:
            keeps[-1] &= negatives.in_batch_keep_BM[rows_N]
    needs_keep = (
        mask_collisions
        or negatives.uniform_keep is not None
        or negatives.in_batch_keep_BM is not None
    )
    if len(blocks) == 1:
        return blocks[0], keeps[0] if needs_keep else None
    return torch.cat(blocks, dim=1), torch.cat(keeps, dim=1) if needs_keep else None


def _keep(ids: torch.Tensor, batch: Batch, mask_collisions: bool) -> torch.Tensor:
    """bool [N, K]: all True but, with mask_collisions, at a position's own target."""
    assert batch.targets_N is not None
    shape = (len(batch.targets_N), ids.shape[-1])
    if not mask_collisions:
        return torch.ones(shape, dtype=torch.bool, device=ids.device)
    return (ids != batch.targets_N[:, None]).expand(shape)


def _per_event(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Rows by event: values that are by session are repeated for its events."""
    return values if len(values) == len(batch.rows_N) else values[batch.rows_N]


def _ids_at(chosen_Nk: torch.Tensor, batch: Batch, negatives: Negatives) -> torch.Tensor:
    """int64 [N, k]: item ids of columns of `_all_logits`."""
    uniform, in_batch_BM = negatives.uniform, negatives.in_batch_BM
    num_uniform = uniform.shape[-1]
    is_uniform = chosen_Nk < num_uniform
    ids_Nk = torch.zeros_like(chosen_Nk)
    if num_uniform:
        column_Nk = chosen_Nk.clamp(max=num_uniform - 1)
        if uniform.dim() == 1:
            ids_Nk = uniform[column_Nk]
        else:
            ids_Nk = _per_event(uniform, batch).gather(1, column_Nk)
    if in_batch_BM.shape[1]:
        column_Nk = (chosen_Nk - num_uniform).clamp(min=0)
        event_Nk = in_batch_BM[batch.rows_N[:, None], column_Nk]
        ids_Nk = ids_Nk.where(is_uniform, batch.inputs_N[event_Nk])
    return ids_Nk


def dot_products(
    hidden_ND: torch.Tensor,
    table_VD: torch.Tensor,
    ids_NK: torch.Tensor,
    known_NK: torch.Tensor | None = None,
) -> torch.Tensor:
    """[N, K]: hidden_ND[n] . table_VD[ids_NK[n, k]], never holding the gathered [N, K, D].

    known_NK: the values, where they were computed before without gradients.
    In the precision of the arguments, also under autocast: there is no matrix product to speed up.
    """
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return _DotProducts.apply(hidden_ND, table_VD, ids_NK, known_NK)


class _DotProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        table_VD: torch.Tensor,
        ids_NK: torch.Tensor,
        known_NK: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_ND, table_VD, ids_NK)
        if known_NK is not None:
            return known_NK.clone()
        num_events, num_ids = ids_NK.shape
        logits_NK = hidden_ND.new_empty(num_events, num_ids)
        step = max(1, _GATHER_ELEMENTS // max(1, num_ids * hidden_ND.shape[1]))
        for low in range(0, num_events, step):
            part = slice(low, low + step)
            rows_nKD = table_VD[ids_NK[part]]
            logits_NK[part] = torch.bmm(rows_nKD, hidden_ND[part, :, None]).squeeze(-1)
        return logits_NK

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        hidden_ND, table_VD, ids_NK = ctx.saved_tensors
        grad_NK = grads[0].contiguous()
        # Both gradients are sums of weighted rows: embedding bags.
        grad_hidden_ND = F.embedding_bag(ids_NK, table_VD, per_sample_weights=grad_NK, mode="sum")
        sorted_ids, order = ids_NK.flatten().sort()
        items_U, counts_U = sorted_ids.unique_consecutive(return_counts=True)
        grad_UD = F.embedding_bag(
            order // ids_NK.shape[1],
            hidden_ND,
            offsets=counts_U.cumsum(0) - counts_U,
            per_sample_weights=grad_NK.flatten()[order],
            mode="sum",
        )
        grad_table_VD = torch.zeros_like(table_VD).index_copy_(0, items_U, grad_UD)
        return grad_hidden_ND, grad_table_VD, None, None
