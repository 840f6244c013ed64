"""SASRec as TRON trains it: a pre-norm causal transformer over packed sessions.

Kang and McAuley, Self-Attentive Sequential Recommendation (ICDM 2018), in the form of TRON
(arXiv 2307.14906): input = item embedding * sqrt(D) + position embedding, dropout, layers with
a ReLU feed-forward as wide as the hidden state, final LayerNorm.

Shapes: N packed events, D embedding_dim, R rows of a group, W their padded width, H heads.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from tron_cli.batches import AttentionGroup, Batch


class SASRec(nn.Module):
    """Packed batch -> hidden states, and the table whose rows they are compared with."""

    def __init__(
        self,
        *,
        num_items: int,
        sequence_length: int,
        embedding_dim: int,
        num_blocks: int,
        num_heads: int,
        dropout_rate: float,
        positions: str,
        reuse_item_embeddings: bool,
        output_bias: bool,
    ) -> None:
        super().__init__()
        self.sequence_length = sequence_length
        self.embedding_dim = embedding_dim
        self.positions = positions
        self.output_bias = output_bias
        # The bias of an item is one more column of its output embedding, met by a constant 1.
        output_dim = embedding_dim + int(output_bias)
        input_dim = output_dim if reuse_item_embeddings else embedding_dim
        self.item_embedding = nn.Embedding(num_items + 1, input_dim)
        self.position_embedding = nn.Embedding(sequence_length, embedding_dim)
        nn.init.xavier_uniform_(self.item_embedding.weight)
        nn.init.xavier_uniform_(self.position_embedding.weight)
        self.output_embedding = (
            self.item_embedding
            if reuse_item_embeddings
            else nn.Embedding(num_items + 1, output_dim)
        )
        self.dropout = nn.Dropout(dropout_rate)
        self.blocks = nn.ModuleList(
            Block(embedding_dim, num_heads, dropout_rate) for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(embedding_dim)

    def forward(self, batch: Batch, rows_UD: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [N, D] (D + 1 with an output bias), to be multiplied with `item_table`.

        rows_UD: rows of the item embedding that the batch's inputs are places in; None: all.
        """
        if rows_UD is None:
            rows_UD = self.item_embedding.weight
        item_ND = F.embedding(batch.inputs_N, rows_UD)[:, : self.embedding_dim]
        x_ND = item_ND * math.sqrt(self.embedding_dim) + self.position_embedding(
            self._position_ids(batch)
        )
        x_ND = self.dropout(x_ND)
        for block in self.blocks:
            x_ND = block(x_ND, batch.groups)
        x_ND = self.norm(x_ND)
        return F.pad(x_ND, (0, 1), value=1.0) if self.output_bias else x_ND

    @property
    def item_table(self) -> torch.Tensor:
        """[num_items + 1, D]: row i scores item i; row 0 is no item."""
        return self.output_embedding.weight

    def _position_ids(self, batch: Batch) -> torch.Tensor:
        if self.positions == "start":
            return batch.places_N
        return self.sequence_length - batch.lengths_B[batch.rows_N] + batch.places_N


class Block(nn.Module):
    """A pre-norm layer with the arithmetic and initialization of nn.TransformerEncoderLayer."""

    def __init__(self, dim: int, num_heads: int, dropout_rate: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate
        self.attention_norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.attention_output = nn.Linear(dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout_rate), nn.Linear(dim, dim)
        )
        self.dropout = nn.Dropout(dropout_rate)
        nn.init.xavier_uniform_(self.query_key_value.weight)
        nn.init.zeros_(self.query_key_value.bias)
        nn.init.zeros_(self.attention_output.bias)

    def forward(self, x_ND: torch.Tensor, groups: tuple[AttentionGroup, ...]) -> torch.Tensor:
        """[N, D] -> [N, D]; events attend to themselves and the earlier events of their row."""
        attended_ND = self._attention(self.attention_norm(x_ND), groups)
        x_ND = x_ND + self.dropout(self.attention_output(attended_ND))
        return x_ND + self.dropout(self.feed_forward(self.feed_forward_norm(x_ND)))

    def _attention(self, x_ND: torch.Tensor, groups: tuple[AttentionGroup, ...]) -> torch.Tensor:
        qkv_N3D = self.query_key_value(x_ND)
        dropout_rate = self.dropout_rate if self.training else 0.0
        attended = []
        for group in groups:
            rows, width = group.gather_RW.shape
            if group.keep is None:
                qkv = qkv_N3D[group.start : group.end]
            else:
                qkv = qkv_N3D[group.gather_RW.flatten()]
            q_RHWD, k_RHWD, v_RHWD = qkv.view(rows, width, 3, self.num_heads, -1).permute(
                2, 0, 3, 1, 4
            )
            out_RHWD = F.scaled_dot_product_attention(
                q_RHWD, k_RHWD, v_RHWD, dropout_p=dropout_rate, is_causal=True
            )
            out_ND = out_RHWD.transpose(1, 2).reshape(rows * width, -1)
            attended.append(out_ND if group.keep is None else out_ND[group.keep])
        return torch.cat(attended)
