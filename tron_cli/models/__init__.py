"""Networks: packed batch -> hidden states, one file per network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tron_cli.models.sasrec import SASRec

if TYPE_CHECKING:
    from tron_cli.config import ExperimentConfig


def build_model(config: ExperimentConfig, num_items: int) -> SASRec:
    """The network that `config.model` names, initialized from torch's random state."""
    return SASRec(
        num_items=num_items,
        sequence_length=config.sequence_length,
        embedding_dim=config.embedding_dim,
        num_blocks=config.num_blocks,
        num_heads=config.num_heads,
        dropout_rate=config.dropout_rate,
        positions=config.positions,
        reuse_item_embeddings=config.reuse_item_embeddings,
        output_bias=config.output_bias,
    )
