"""Networks as one program: padded histories of item numbers in, the best items out.

It includes the rules of recommending: the window, BERT4Rec's mask, seen items, the order of ties.
The networks' own modules compute the states; to them the padded rows are those of a padded batch.
The scores of several networks are averaged, as in `MixedNetworks`.

Shapes: B histories, L places of a history, W places of the window, D width, M candidates, k items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tron_cli.data.batches import AttentionGroup, Batch
from tron_cli.errors import RunError
from tron_cli.models.tables import ItemTables

# Candidates beyond the last requested place: this many may tie there or be swapped by rounding.
_SPARE_CANDIDATES = 256


class Table(nn.Module):
    """Rows of an item table, kept as float32, as float16, or as int8 with a scale for each row.

    with_bias: the last column is a bias, which stays float32. Raises RunError where a value exceeds
    the range of float16.
    """

    values_VD: torch.Tensor
    scale_V: torch.Tensor | None
    bias_V: torch.Tensor | None

    def __init__(self, table_VD: torch.Tensor, kind: str, *, with_bias: bool) -> None:
        super().__init__()
        bias_V = scale_V = None
        values_VD = table_VD.detach()
        if with_bias:
            values_VD, bias_V = values_VD[:, :-1].contiguous(), values_VD[:, -1].contiguous()
        if kind == "float16":
            values_VD = values_VD.half()
            if not bool(values_VD.isfinite().all()):
                raise RunError(
                    "item embeddings exceed 65,504, the range of float16; export with "
                    "--table float32 or int8"
                )
        elif kind == "int8":
            least_V, most_V = values_VD.aminmax(dim=1)
            largest_V = torch.maximum(most_V, -least_V)
            scale_V = largest_V.clamp_min(torch.finfo(torch.float32).tiny) / 127
            values_VD = (values_VD / scale_V[:, None]).round_().to(torch.int8)
        self.register_buffer("values_VD", values_VD)
        self.register_buffer("scale_V", scale_V)
        self.register_buffer("bias_V", bias_V)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Return float32 rows [*index.shape, D], without biases."""
        rows = F.embedding(index, self.values_VD).float()
        return rows if self.scale_V is None else rows * self.scale_V[index][..., None]

    def scores(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """Return the scores of all rows, float32 [B, V]."""
        if self.scale_V is None:
            return F.linear(hidden_BD, self.values_VD.float(), self.bias_V)
        score_BV = F.linear(hidden_BD, self.values_VD.float()) * self.scale_V
        return score_BV if self.bias_V is None else score_BV + self.bias_V

    def exact_scores(self, hidden_BD: torch.Tensor, item_BM: torch.Tensor) -> torch.Tensor:
        """Return the scores of some rows for each state, float64 [B, M]; equal rows tie."""
        score_BM = (self.rows(item_BM).double() * hidden_BD.double()[:, None]).sum(dim=2)
        return score_BM if self.bias_V is None else score_BM + self.bias_V[item_BM]


class _Part(nn.Module):
    """A network without its tables, and these."""

    def __init__(self, model: ItemTables, kind: str) -> None:
        super().__init__()
        inputs, outputs = model.item_embedding, model.output_embedding
        scored_VD = model.scored_rows(outputs.weight.detach())
        self.outputs = Table(scored_VD, kind, with_bias=model.output_bias)
        # The network cuts off a bias.
        self.inputs = (
            self.outputs
            if scored_VD.data_ptr() == inputs.weight.data_ptr()
            else Table(inputs.weight, kind, with_bias=False)
        )
        # The network gets the rows that it needs, and its states are scored here.
        del model.item_embedding, model.output_embedding
        model.output_bias = False
        self.model = model.requires_grad_(False)

    def last_states(self, packed: Batch, window_BW: torch.Tensor) -> torch.Tensor:
        """Return the state of the last event of each window, [B, D]."""
        batch, width = window_BW.shape
        hidden_ND = self.model(packed, self.inputs.rows(window_BW.flatten()))
        return hidden_ND[torch.arange(batch) * width + packed.lengths_B - 1]


class Program(nn.Module):
    """Networks as a function of padded histories; it takes over their tables.

    models: one network, or several with the same items, window and mask. kind: float32, float16 or
    int8, the number format of the item tables. popularity_I: int64, training events of each item,
    for empty histories; None: nothing is recommended after these.
    """

    popular_V: torch.Tensor

    def __init__(
        self, models: Sequence[ItemTables], kind: str, popularity_I: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.num_items = models[0].num_items
        self.window = models[0].sequence_length
        self.mask_item = models[0].mask_item
        parts = [_Part(model, kind) for model in models]
        self.parts = nn.ModuleList(parts)
        # Minus the place of each item by popularity, which is unique.
        popular_V = torch.full((len(parts[0].outputs.values_VD),), -torch.inf)
        if popularity_I is not None:
            order_I = popularity_I.argsort(descending=True, stable=True)
            popular_V[order_I + 1] = -torch.arange(self.num_items, dtype=torch.float32)
        self.register_buffer("popular_V", popular_V)

    def forward(
        self, histories: torch.Tensor, k: torch.Tensor, filter_rated: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the numbers int64 [B, k] and the scores float32 [B, k] of the best items.

        histories: int64 [B, L], the numbers 1 .. num_items of each history, oldest first; other
        values, such as the zeros of padding, are skipped wherever they stand. k: int64, cut to
        1 .. num_items. filter_rated: bool, whether items of the history are left out. Equal scores
        are ordered by number. Number 0 with score -inf follows where fewer items are left. Empty
        histories get the most popular items, with scores of 0.
        """
        known_BL = (histories >= 1) & (histories <= self.num_items)
        # At least two places: torch.export specializes dimensions of size 0 and 1.
        item_BL = F.pad(torch.where(known_BL, histories, 0), (0, 2))
        length_B = (item_BL > 0).sum(dim=1)
        is_empty_B1 = length_B[:, None] == 0
        window_BW, shown_B = self._windows(item_BL, length_B)
        packed = _padded(window_BW, shown_B)
        # A part and the last states of its network, [B, D], each with its own D.
        parts: Any = self.parts
        states = [(part, part.last_states(packed, window_BW)) for part in parts]

        score_BV = _mean([part.outputs.scores(hidden_BD) for part, hidden_BD in states])
        score_BV = torch.where(is_empty_B1, self.popular_V, score_BV)
        # Row 0 is no item, and neither is the mask.
        barred_BL = torch.where(filter_rated, item_BL, 0)
        if self.mask_item is not None:
            barred_BL = F.pad(barred_BL, (0, 1), value=self.mask_item)
        score_BV = score_BV.scatter(1, barred_BL, -torch.inf)

        k = k.clamp(1, self.num_items)
        wanted: Any = k.item()  # a symbol during export
        kept: Any = (k + _SPARE_CANDIDATES).clamp(max=self.num_items).item()
        for condition in (wanted >= 1, wanted <= kept, kept <= self.num_items):
            torch._check(condition)
        coarse_BM, item_BM = score_BV.topk(kept, dim=1)
        item_BM, order_BM = item_BM.sort(dim=1)
        coarse_BM = coarse_BM.gather(1, order_BM)
        exact_BM = _mean([part.outputs.exact_scores(state, item_BM) for part, state in states])
        exact_BM = torch.where(is_empty_B1, coarse_BM.double(), exact_BM)
        exact_BM = torch.where(coarse_BM == -torch.inf, -torch.inf, exact_BM)
        exact_BM, order_BM = exact_BM.sort(dim=1, descending=True, stable=True)
        best_Bk = item_BM.gather(1, order_BM)[:, :wanted]
        score_Bk = exact_BM[:, :wanted].float()
        none_Bk = score_Bk == -torch.inf
        score_Bk = torch.where(is_empty_B1 & ~none_Bk, 0.0, score_Bk)
        # Before torch 2.13 a loaded program asks for gradients of its weights again.
        return torch.where(none_Bk, 0, best_Bk), score_Bk.detach()

    def _windows(
        self, item_BL: torch.Tensor, length_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the last events of each history, followed by zeros, and their number (at least 1).

        The first is [B, W].
        """
        batch, places = item_BL.shape
        width = torch.sym_max(torch.sym_min(places - 2, self.window), 2)
        first_B1 = (length_B - self.window).clamp_min(0)[:, None]
        # The place of each event in the window; all else goes to a place after it, and is cut off.
        place_BL = (item_BL > 0).cumsum(dim=1) - 1 - first_B1
        place_BL = torch.where((item_BL > 0) & (place_BL >= 0), place_BL, width)
        window_BW = item_BL.new_zeros(batch, width + 1).scatter(1, place_BL, item_BL)[:, :width]
        shown_B = length_B.clamp(1, self.window)
        if self.mask_item is None:
            return window_BW, shown_B
        mask = torch.full_like(shown_B, self.mask_item)[:, None]
        return F.pad(window_BW, (0, 1)).scatter(1, shown_B[:, None], mask), shown_B + 1


def _padded(window_BW: torch.Tensor, length_B: torch.Tensor) -> Batch:
    """Return the windows as one padded batch, whose inputs are places among all B * W."""
    batch, width = window_BW.shape
    row_BW = torch.arange(batch)[:, None].expand(batch, width)
    place_BW = torch.arange(width).expand(batch, width)
    # Padding counts as the first event of its row, as in a padded batch.
    place_BW = torch.where(place_BW < length_B[:, None], place_BW, 0)
    index_BW = torch.arange(batch * width).view(batch, width)
    whole = AttentionGroup(0, batch * width, index_BW, (row_BW * width + place_BW).flatten())
    return Batch(
        inputs_N=index_BW.flatten(),
        targets_N=None,
        lengths_B=length_B,
        rows_N=row_BW.flatten(),
        places_N=place_BW.flatten(),
        groups=(whole,),
        padded=True,
    )


def _mean(scores: list[torch.Tensor]) -> torch.Tensor:
    return scores[0] if len(scores) == 1 else sum(scores[1:], scores[0]) / len(scores)
