"""Transformer over packed sessions, without its blocks.

Shapes: N packed events, B rows, D embedding_dim, U rows of a table that a batch needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tron_cli.models.tables import Draw, ItemTables, embedding
from tron_cli.ops.dropout import Dropout

if TYPE_CHECKING:
    from tron_cli.data.batches import Batch


class Transformer(ItemTables):
    """Item and position embeddings, dropout, blocks: packed batch -> hidden states.

    positions: "end" counts positions from the start of a window of sequence_length events (and a
    mask), in which a shorter history stands at the end; "start" counts from the first event of the
    history; "none" has no position embeddings. key_padding_mask: False lets every event also attend
    to the padding in front of a history that is shorter than the window, as SASRec does in
    RecTools. That padding is a zero vector at the input of every block.
    """

    fixed_shapes = True

    def __init__(
        self,
        draw: Draw,
        draw_outputs: Draw,
        blocks: Callable[[], list[nn.Module]],
        scaled: bool = False,
        input_norm: nn.Module | None = None,
        output_norm: nn.Module | None = None,
        causal: bool = True,
        *,
        sequence_length: int,
        dropout_rate: float,
        positions: str,
        key_padding_mask: bool = True,
        **tables: Any,
    ) -> None:
        """Build the tables, and the blocks by `blocks`, each (x_ND, groups, padding_B) -> x_ND.

        The keyword-only parameters are settings, which networks pass on; `tables` are those of
        ItemTables. scaled: item embeddings are multiplied with sqrt(D). causal: no event sees later
        ones; otherwise the model fills in masks, and its window has a place for one after the
        history.
        """
        super().__init__(draw, draw_outputs, with_mask=not causal, **tables)
        self.sequence_length = sequence_length
        self.window = sequence_length + int(not causal)
        self.positions = positions
        self.key_padding_mask = key_padding_mask
        self.one_row_serves_all = causal and positions in ("start", "none") and key_padding_mask
        self.position_embedding = (
            None if positions == "none" else embedding(draw(self.window, self.embedding_dim))
        )
        self.item_scale = math.sqrt(self.embedding_dim) if scaled else 1.0
        self.input_norm = input_norm or nn.Identity()
        self.dropout = Dropout(dropout_rate)
        self.blocks = nn.ModuleList(blocks())
        self.norm = output_norm or nn.Identity()

    def forward(self, batch: Batch, rows_UD: torch.Tensor | None = None) -> torch.Tensor:
        """Return hidden states [N, D] (D + 1 with an output bias), to multiply with `scored_rows`.

        rows_UD: rows of the item embedding, to which the inputs are indices; None: all rows.
        """
        x_ND = self.embedded(batch.inputs_N, rows_UD) * self.item_scale
        if self.position_embedding is not None:
            x_ND = x_ND + self.position_embedding(self._position_ids(batch))
        x_ND = self.dropout(self.input_norm(x_ND))
        padding_B = None if self.key_padding_mask else self.window - batch.lengths_B
        for block in self.blocks:
            x_ND = block(x_ND, batch.groups, padding_B)
        return self.comparable(self.norm(x_ND))

    def _position_ids(self, batch: Batch) -> torch.Tensor:
        if self.positions == "start":
            return batch.places_N
        return self.window - batch.lengths_B[batch.rows_N] + batch.places_N
