"""Items most similar to an item, by the cosine of their embeddings.

Shapes: E requested items, I items, D width, K places, C items compared in float64.
"""

from __future__ import annotations

import torch

from tron_cli.ops.products import row_products

_SCORES_AT_ONCE = 1 << 24
_ROWS_AT_ONCE = 1 << 12
_SPARE = 32  # beyond the last place requested, in case rounding swapped some
# Of norms in this range neither products nor their quotients leave the range of float32.
_SMALLEST, _LARGEST = 1e-12, 1e12


class CosineNeighbors:
    """Rows of a table by their cosine with one of them, in float64; ties by ascending number.

    A row of zeros has a cosine of 0 with every row.
    """

    def __init__(self, table: torch.Tensor) -> None:
        """Compute the norms of a finite table [I + 1, D], of which row 0 is no item."""
        self.table = table.detach().float()
        self.num_items = len(table) - 1
        # In pieces, whose float64 copies stay in the cache.
        self._norm_I = torch.cat(
            [rows.double().norm(dim=1) for rows in self.table.split(_ROWS_AT_ONCE)]
        )
        positive = self._norm_I[1:][self._norm_I[1:] > 0]
        self._is_coarse = bool(((positive > _SMALLEST) & (positive < _LARGEST)).all())
        safe_I = torch.where(self._norm_I > 0, self._norm_I, 1.0)
        self._inverse_I = (1 / safe_I).float()

    def nearest(self, item_E: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the k nearest other items of each item, int64 [E, K], and float64 cosines."""
        k = min(k, self.num_items - 1)
        best = torch.zeros(len(item_E), k, dtype=torch.int64, device=item_E.device)
        cosine = best.double()
        size = max(1, _SCORES_AT_ONCE // max(1, self.num_items))
        for low in range(0, len(item_E) if k else 0, size):
            part = item_E[low : low + size]
            near = self._candidates(part, k) if self._is_coarse else [self._all(part)] * len(part)
            for row, (item, item_C) in enumerate(zip(part.tolist(), near, strict=True)):
                item_C = item_C[item_C != item]
                cosine_C = self._cosines(item, item_C)
                order = cosine_C.argsort(descending=True, stable=True)[:k]
                best[low + row], cosine[low + row] = item_C[order], cosine_C[order]
        return best, cosine

    def _candidates(self, item_E: torch.Tensor, k: int) -> list[torch.Tensor]:
        """Return the items that may be among the k nearest of each item, ascending."""
        # The largest error of a float32 cosine, for any order of summation, as in `Catalogue`.
        roundings = (self.table.shape[1] + 8) * torch.finfo(torch.float32).eps / 2
        bound = 1.01 * roundings / (1 - roundings)
        unit_ED = (self.table[item_E].double() / self._safe(item_E)[:, None]).float()
        score_EI = row_products(unit_ED.contiguous(), self.table[1:])
        score_EI *= self._inverse_I[1:]
        score_EI.scatter_(1, item_E[:, None] - 1, -torch.inf)
        kept = min(k + _SPARE, self.num_items)
        score_EK, index_EK = score_EI.topk(kept, dim=1)
        hopeless_E = score_EK[:, k - 1] - 2 * bound
        found = []
        is_zero_E = self._norm_I[item_E] == 0
        for row in range(len(item_E)):
            if is_zero_E[row]:  # ties with everything
                first = torch.arange(1, min(k + 1, self.num_items) + 1, device=item_E.device)
                found.append(first)
            elif kept < self.num_items and score_EK[row, -1] >= hopeless_E[row]:
                found.append((score_EI[row] >= hopeless_E[row]).nonzero()[:, 0] + 1)
            else:
                found.append((index_EK[row] + 1).sort().values)
        return found

    def _all(self, item_E: torch.Tensor) -> torch.Tensor:
        return torch.arange(1, self.num_items + 1, device=item_E.device)

    def _safe(self, item_E: torch.Tensor) -> torch.Tensor:
        norm_E = self._norm_I[item_E]
        return torch.where(norm_E > 0, norm_E, 1.0)

    def _cosines(self, item: int, item_C: torch.Tensor) -> torch.Tensor:
        row_D = self.table[item].double()
        product_C = torch.cat(
            [(self.table[some].double() * row_D).sum(dim=1) for some in item_C.split(_ROWS_AT_ONCE)]
        )
        product_C /= self._safe(item_C) * self._safe(item_C.new_tensor([item]))
        return product_C.clamp(-1, 1)
