"""The interface of a network to training and evaluation, and the function that builds one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from tron_cli.registry import MODELS, load, settings_of

if TYPE_CHECKING:
    from tron_cli.baselines.knn_boost import KNNBoost
    from tron_cli.config import ExperimentConfig
    from tron_cli.data.batches import Batch
    from tron_cli.distributed.tables import TableShard


class Model(nn.Module):
    """Interface of a network, which maps a packed batch to hidden states.

    sequence_length: number of events of a history that it sees. item_embedding: table of the
    inputs, row i for item i. one_row_serves_all: True if the hidden state of an event depends
    neither on later events nor on their number, so that one pass over a session predicts all of it
    as serving would. mask_item: an item id that evaluation appends to every history, whose hidden
    state then predicts; None: the hidden state of the last event does. fixed_shapes: True if
    batches may be padded, so that steps can be recorded as CUDA graphs. boost: what session-kNN
    adds to the scores when items are ranked; `forward` and training do not know it. shard: the
    rows of item_embedding and item_table that this process holds, which are then all that they
    have; None: all rows.
    """

    sequence_length: int
    num_items: int
    item_embedding: nn.Embedding
    one_row_serves_all: bool
    mask_item: int | None = None
    fixed_shapes: bool = False
    boost: KNNBoost | None = None
    shard: TableShard | None = None

    def forward(self, batch: Batch, rows_UD: torch.Tensor | None = None) -> torch.Tensor:
        """Return hidden states [N, D] of the events, to be multiplied with `scored_rows`.

        rows_UD: rows of item_embedding, to which the batch's inputs are indices; None: all rows.
        """
        raise NotImplementedError

    @property
    def item_table(self) -> torch.Tensor:
        """Table [num_items + 1 or more, D]: row i scores item i; others are no items."""
        raise NotImplementedError

    @property
    def item_tables(self) -> tuple[torch.Tensor, ...]:
        """Parameters with a row for each item: one table, or that of the inputs and item_table."""
        inputs, outputs = self.item_embedding.weight, self.item_table
        return (inputs,) if inputs is outputs else (inputs, outputs)

    @property
    def divided_tables(self) -> tuple[torch.Tensor, ...]:
        """Item tables of which this process has only the rows of `shard`."""
        return () if self.shard is None else self.item_tables

    def scored_rows(self, rows_UD: torch.Tensor) -> torch.Tensor:
        """Return what hidden states are multiplied with instead of these rows of item_table."""
        return rows_UD

    def scored_table(self) -> torch.Tensor:
        """Return the `scored_rows` of rows 0 to num_items, without gradients."""
        return self.scored_rows(self.item_table.detach()[: self.num_items + 1])

    def compared_rows(self) -> torch.Tensor:
        """Return the embeddings [num_items + 1, D] whose cosine says how similar items are."""
        rows_ID = self.item_embedding.weight.detach()[: self.num_items + 1]
        # A shared table may have one more column, of biases.
        return rows_ID[:, : getattr(self, "embedding_dim", rows_ID.shape[1])]


def build_model(config: ExperimentConfig, num_items: int) -> Model:
    """Return the network that `config.model` names, initialized from torch's random state."""
    entry = MODELS[config.model]
    more = {"num_items": num_items, "reuse_item_embeddings": config.shares_table}
    return load(entry)(**settings_of(entry, config, **more))
