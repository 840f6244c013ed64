"""Item tables of a network.

Shapes: N packed events, D width of the hidden states, U rows of a table that a batch needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from tron_cli.models.base import Model
from tron_cli.ops.initialize import keeping_rows
from tron_cli.ops.unit_rows import plain_unit_rows, unit_rows

if TYPE_CHECKING:
    from tron_cli.distributed.tables import TableShard

# Draws a table: (rows, columns) -> [rows, columns].
Draw = Callable[[int, int], torch.Tensor]

_divide: Callable[[int], TableShard] | None = None


@contextmanager
def dividing_tables(divide: Callable[[int], TableShard]) -> Iterator[None]:
    """Let networks that are built have only the rows of item tables that this process holds.

    divide: returns these of a table, for its number of rows.
    """
    global _divide
    _divide = divide
    try:
        yield
    finally:
        _divide = None


class ItemTables(Model):
    """Network with input embeddings and an output table, whose rows score hidden states.

    The bias of an item is one more column of the output table, multiplied with a constant 1.

    score="cosine": rows of the output table and hidden states are scaled to a length of one before
    they are multiplied, and the hidden states then by score_scale. With learn_score_scale this is
    the initial value of a factor whose logarithm is learned, so that it stays positive.
    """

    def __init__(
        self,
        draw: Draw,
        draw_outputs: Draw,
        with_mask: bool = False,
        *,
        num_items: int,
        embedding_dim: int,
        reuse_item_embeddings: bool,
        output_bias: bool,
        score: str = "dot",
        score_scale: float = 14.0,
        learn_score_scale: bool = False,
        normalize_inputs: bool = False,
    ) -> None:
        """Draw rows 0 to num_items: by `draw`, a separate output table by `draw_outputs`.

        with_mask: add a row for the mask. Within `dividing_tables` the tables have some rows only.
        """
        super().__init__()
        self.num_items = num_items
        self.embedding_dim = embedding_dim
        self.output_bias = output_bias
        output_dim = embedding_dim + int(output_bias)
        input_dim = output_dim if reuse_item_embeddings else embedding_dim
        rows = num_items + 1 + int(with_mask)
        self.mask_item = num_items + 1 if with_mask else None
        self.shard = None if _divide is None else _divide(rows)
        self.item_embedding = embedding(self._own_rows(draw, rows, input_dim))
        self.output_embedding = (
            self.item_embedding
            if reuse_item_embeddings
            else embedding(self._own_rows(draw_outputs, rows, output_dim))
        )
        self.normalize_inputs = normalize_inputs
        self.score = score
        self.score_scale = score_scale
        self.log_score_scale = (
            nn.Parameter(torch.tensor([math.log(score_scale)])) if learn_score_scale else None
        )

    def _own_rows(self, draw: Draw, rows: int, columns: int) -> torch.Tensor:
        """Draw a table; return the rows that this process holds."""
        shard = self.shard
        if shard is None:
            return draw(rows, columns)
        with keeping_rows(shard.first, shard.last):
            table = draw(rows, columns)
        # A network's own function may know nothing of shards.
        return table if len(table) < rows else table[shard.first : shard.last].clone()

    @property
    def item_table(self) -> torch.Tensor:
        return self.output_embedding.weight

    def embedded(self, inputs_N: torch.Tensor, rows_UD: torch.Tensor | None) -> torch.Tensor:
        """Return the embeddings [N, D] of inputs, indices to `rows_UD` or, with None, item ids."""
        table = self.item_embedding.weight if rows_UD is None else rows_UD
        embedded_ND = F.embedding(inputs_N, table)[:, : self.embedding_dim]
        return plain_unit_rows(embedded_ND) if self.normalize_inputs else embedded_ND

    def scored_rows(self, rows_UD: torch.Tensor) -> torch.Tensor:
        if self.score == "dot":
            return rows_UD
        unit_UD = unit_rows(rows_UD[:, : self.embedding_dim])
        if not self.output_bias:
            return unit_UD
        return torch.cat([unit_UD, rows_UD[:, self.embedding_dim :]], dim=1)

    def comparable(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Return the hidden states to multiply with `scored_rows`."""
        if self.score == "cosine":
            learned = self.log_score_scale
            scale = self.score_scale if learned is None else learned.exp()
            hidden_ND = plain_unit_rows(hidden_ND) * scale
        return F.pad(hidden_ND, (0, 1), value=1.0) if self.output_bias else hidden_ND


def embedding(table: torch.Tensor) -> nn.Embedding:
    """Return a trainable embedding that starts as `table`."""
    return nn.Embedding.from_pretrained(table, freeze=False)
