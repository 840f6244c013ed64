"""gSASRec: the original SASRec block, with input embeddings separate from those of the outputs.

Petrov and Macdonald, gSASRec: Reducing Overconfidence in Sequential Recommendation Trained with
Negative Sampling (RecSys 2023), in the form of its PyTorch code. The paper's loss is loss="gbce".

Shapes: N packed events, B rows, D embedding_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tron_cli.models.transformer import Transformer
from tron_cli.ops.attention import Padding, RelativeBias, packed_attention
from tron_cli.ops.dropout import Dropout
from tron_cli.ops.initialize import small_normal, small_normal_weights, standard_normal
from tron_cli.ops.products import Linear

if TYPE_CHECKING:
    from tron_cli.data.batches import AttentionGroup


class GSASRec(Transformer):
    """Transformer of item plus position embedding, dropout, blocks and a final LayerNorm.

    initialization: "default" draws all tables from N(0, 1), as its code does, which takes long to
    unlearn with many items; "normal" draws tables and matrices from N(0, 0.02).
    relative_positions: each block learns a bias of its attention scores for each head and distance
    between two events.
    """

    def __init__(
        self,
        *,
        sequence_length: int,
        embedding_dim: int,
        num_blocks: int,
        num_heads: int,
        dropout_rate: float,
        relative_positions: bool = False,
        initialization: str = "default",
        **settings: Any,
    ) -> None:
        """Build the layers; `settings` are the other settings of Transformer."""
        is_normal = initialization == "normal"
        relative_window = sequence_length if relative_positions else 0
        draw = small_normal if is_normal else standard_normal
        super().__init__(
            draw=draw,
            draw_outputs=draw,
            blocks=lambda: [
                GSASRecBlock(embedding_dim, num_heads, dropout_rate, relative_window)
                for _ in range(num_blocks)
            ],
            output_norm=nn.LayerNorm(embedding_dim),
            sequence_length=sequence_length,
            embedding_dim=embedding_dim,
            dropout_rate=dropout_rate,
            **settings,
        )
        if is_normal:
            self.blocks.apply(small_normal_weights)


class GSASRecBlock(nn.Module):
    """Layer whose normalized queries are the residual; keys and values are not normalized.

    The feed-forward network has its normalized input as residual. Heads split the width, and no
    layer mixes them before that network. relative_window: attention scores have a learned bias for
    each distance in a window of this many events; 0: none.
    """

    def __init__(
        self, dim: int, num_heads: int, dropout_rate: float, relative_window: int = 0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate
        self.attention_norm = nn.LayerNorm(dim)
        self.query = Linear(dim, dim)
        self.key_value = Linear(dim, 2 * dim)
        self.relative_bias = (
            RelativeBias(num_heads, relative_window, causal=True) if relative_window else None
        )
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            Linear(dim, dim),
            nn.ReLU(),
            Dropout(dropout_rate),
            Linear(dim, dim),
            Dropout(dropout_rate),
        )

    def forward(
        self,
        x_ND: torch.Tensor,
        groups: tuple[AttentionGroup, ...],
        padding_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map [N, D] to [N, D]. padding_B: places of padding that each row attends to; None: 0."""
        queries_ND = self.attention_norm(x_ND)
        padding = None
        if padding_B is not None:
            zero_1D = torch.zeros_like(x_ND[:1])
            padding = Padding(self._query_key_value(zero_1D, zero_1D), padding_B)
        attended_ND = packed_attention(
            self._query_key_value(queries_ND, x_ND),
            groups,
            num_heads=self.num_heads,
            dropout_rate=self.dropout_rate if self.training else 0.0,
            padding=padding,
            relative_bias=self.relative_bias,
        )
        x_ND = self.feed_forward_norm(queries_ND + attended_ND)
        return x_ND + self.feed_forward(x_ND)

    def _query_key_value(self, queries_ND: torch.Tensor, x_ND: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.query(queries_ND), self.key_value(x_ND)], dim=1)
