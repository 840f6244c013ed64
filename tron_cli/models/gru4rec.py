"""GRU4Rec+: gated recurrent units over sessions, with constrained embeddings.

Hidasi et al., Session-based Recommendations with Recurrent Neural Networks (ICLR 2016); Hidasi and
Karatzoglou, Recurrent Neural Networks with Top-k Gains (CIKM 2018). The embedding of an item
as input also scores it, so hidden states are as wide as embeddings.

Tables are initialized as TRON's GRU4Rec has them, uniform within 1 / sqrt(items + D), and the GRU
by torch's default, uniform within 1 / sqrt(D). Hidasi's code draws tables and GRU weights within
sqrt(6 / (rows + D)) and begins with biases of zero.

Dropout is on the input embeddings and on the output of each layer; TRON's GRU4Rec has it between
layers only, that is nowhere with its one layer. The state passed on to the next event has no
dropout, as in TRON's; in Hidasi's code it has.

On CUDA with precision=bf16 the recurrence is float32 (TF32 where torch allows it, as by default):
cuDNN has none in bf16, and under autocast torch would run it in float16, unscaled
(aten/src/ATen/cudnn/AutocastRNN.cpp). Its dropout between layers waits for the device after each
seed (get_dropout_state in aten/src/ATen/native/cudnn/RNN.cpp), so a step of lanes, which can be
recorded, goes layer by layer where it has any.

Shapes: N packed events, D embedding_dim, B rows, L layers, U rows looked up.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from tron_cli.models.tables import ItemTables
from tron_cli.ops.dropout import Dropout
from tron_cli.ops.initialize import xavier_uniform

if TYPE_CHECKING:
    from tron_cli.data.batches import Batch


class GRU4Rec(ItemTables):
    """GRU over item embeddings.

    Rows are whole sessions, each starting from a state of zero; or, where a batch has lanes, single
    events that continue from the state that the previous event left in their lane, through which no
    gradient flows back. session_parallel: keep these states, of train_batch_size lanes, always in
    the same memory. They are part of state_dict, so that a resumed run continues from them.
    """

    one_row_serves_all = True
    mask_item = None

    carried_LBD: torch.Tensor

    def __init__(
        self,
        *,
        sequence_length: int,
        num_blocks: int,
        dropout_rate: float,
        session_parallel: bool,
        train_batch_size: int,
        **tables: Any,
    ) -> None:
        """Build the layers; `tables` are the settings of ItemTables."""
        super().__init__(_table, _table, **tables)
        embedding_dim = self.embedding_dim
        self.sequence_length = sequence_length
        # With whole sessions, the number of events at each place is read from the device.
        self.fixed_shapes = session_parallel
        self.dropout = Dropout(dropout_rate)
        self.gru = nn.GRU(
            embedding_dim,
            embedding_dim,
            num_blocks,
            dropout=dropout_rate if num_blocks > 1 else 0.0,  # between layers
        )
        if session_parallel:
            carried_LBD = torch.zeros(num_blocks, train_batch_size, embedding_dim)
            self.register_buffer("carried_LBD", carried_LBD)

    def forward(self, batch: Batch, rows_UD: torch.Tensor | None = None) -> torch.Tensor:
        """Return hidden states [N, D] (D + 1 with an output bias), to multiply with `scored_rows`.

        rows_UD: rows of the item embedding, to which the inputs are indices; None: all rows. A
        batch with lanes leaves its states for the next one.
        """
        x_ND = self.dropout(self.embedded(batch.inputs_N, rows_UD))
        if batch.lanes_B is None:
            x_ND = self._whole_rows(x_ND, batch)
        else:
            x_ND = self._next_events(x_ND, batch.lanes_B, batch.places_N)
        return self.comparable(self.dropout(x_ND))

    def _whole_rows(self, x_ND: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Run the recurrence over each row; states in packed order."""
        if batch.padded:
            return self._padded_rows(x_ND, batch)
        # By place, the last and so the longest rows first, as PackedSequence expects.
        order_N = len(x_ND) - 1 - batch.places_N.flip(0).argsort(stable=True)
        rows_at_place = batch.places_N.bincount().cpu()
        inputs = PackedSequence(x_ND.index_select(0, order_N), rows_at_place)
        states, _ = self._recurrence(inputs)
        return states.data.index_select(0, order_N.argsort())

    def _padded_rows(self, x_ND: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Run the recurrence over the rows of a padded batch in a loop that `torch.export` keeps.

        Padding follows the events, whose states do not depend on it.
        """
        from torch._higher_order_ops.scan import scan

        (group,) = batch.groups
        x_WBD = x_ND[group.gather_RW].transpose(0, 1)
        weights = self.gru.all_weights

        def step(before_LBD: torch.Tensor, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            after_BD = []
            for layer, before_BD in enumerate(before_LBD.unbind()):
                x_BD = torch.gru_cell(x_BD, before_BD, *weights[layer])
                after_BD.append(x_BD)
            return torch.stack(after_BD), x_BD.clone()

        before_LBD = x_ND.new_zeros(self.gru.num_layers, x_WBD.shape[1], x_WBD.shape[2])
        _, states_WBD = scan(step, before_LBD, x_WBD)
        return states_WBD.transpose(0, 1).flatten(0, 1)[group.keep]

    def _recurrence(self, *inputs: PackedSequence | torch.Tensor) -> Any:
        """Run the GRU, in the precision of autocast or a higher one."""
        is_event = isinstance(inputs[0], torch.Tensor)
        gru: Any = self._layer_by_layer if is_event and self.gru.dropout else self.gru
        if not inputs[0].is_cuda or torch.get_autocast_dtype("cuda") == torch.float16:
            return gru(*inputs)
        with torch.autocast("cuda", enabled=False):
            dtype = self.item_embedding.weight.dtype
            return gru(*(values.to(dtype) for values in inputs))

    def _layer_by_layer(
        self, x_1BD: torch.Tensor, before_LBD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run `gru` on one event of each lane, with dropout from torch's generator."""
        x_BD, after = x_1BD[0], []
        for layer, before_BD in enumerate(before_LBD):
            if layer:
                x_BD = self.dropout(x_BD)
            x_BD = torch.gru_cell(x_BD, before_BD, *self.gru.all_weights[layer])
            after.append(x_BD)
        return x_BD[None], torch.stack(after)

    def _next_events(
        self, x_BD: torch.Tensor, lanes_B: torch.Tensor, places_B: torch.Tensor
    ) -> torch.Tensor:
        """Step each lane from its carried state or, at a session's first event, from zero."""
        begins_B1 = (places_B == 0)[:, None]
        before_LBD = self.carried_LBD[:, lanes_B].masked_fill(begins_B1, 0.0)
        states_1BD, after_LBD = self._recurrence(x_BD[None], before_LBD)
        self.carried_LBD[:, lanes_B] = after_LBD.detach().to(self.carried_LBD.dtype)
        return states_1BD[0]


def _table(rows: int, columns: int) -> torch.Tensor:
    return xavier_uniform(rows, columns).div_(math.sqrt(6))
