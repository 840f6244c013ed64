"""SASRec: a causal transformer over packed sessions, in TRON's, RecBole's and LiGR's form; BSARec.

Kang and McAuley, Self-Attentive Sequential Recommendation (ICDM 2018). Its own block, with which
gSASRec was published too, is in gsasrec.py.

Shapes: N packed events, B rows, D embedding_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from tron_cli.models.transformer import Transformer
from tron_cli.ops.attention import Padding, RelativeBias, packed_attention
from tron_cli.ops.dropout import Dropout
from tron_cli.ops.frequency_filter import FrequencyFilter
from tron_cli.ops.initialize import (
    small_normal,
    small_normal_weights,
    standard_normal,
    xavier_uniform,
)
from tron_cli.ops.products import Linear

if TYPE_CHECKING:
    from tron_cli.data.batches import AttentionGroup

_POST_NORM_EPS = 1e-12  # RecBole's


class SwiGLU(nn.Module):
    """SiLU of half of the columns times the other half; Shazeer, arXiv 2002.05202."""

    def forward(self, x_NK: torch.Tensor) -> torch.Tensor:
        """Map [N, K] to [N, K / 2]."""
        gate, value = x_NK.chunk(2, dim=1)
        return F.silu(gate) * value


_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "swiglu": SwiGLU}


class SASRec(Transformer):
    """SASRec in four forms, and in the forms between them.

    block="pre-norm" is TRON's (arXiv 2307.14906): input = item embedding * sqrt(D) + position
    embedding, dropout, pre-norm layers, final LayerNorm. block="post-norm" is RecBole's: the input
    is not scaled but normalized, norms follow the residuals, and there is no final one; RecBole's
    other settings are activation="gelu", initialization="normal" and positions="start".
    block="ligr" is TRON's form with gated residuals, LiGR's layer (arXiv 2502.03417), which makes
    SASRec with a sampled softmax eSASRec (arXiv 2508.06450); its other settings are
    activation="swiglu" and a feed_forward_dim of four times embedding_dim. block="bsarec" is
    RecBole's form with a filter beside attention, BSARec (arXiv 2312.10325); its other settings are
    activation="gelu", initialization="normal" and a feed_forward_dim of four times embedding_dim.
    A filter sees all of a row, so that only the last event of a row may predict.

    feed_forward_dim: 0 is embedding_dim. attention_dropout_rate: of the attention weights; None is
    dropout_rate. relative_positions: each layer learns a bias of its attention scores for each head
    and distance between two events, as in T5 and HSTU. initialization: "default" is TRON's, Xavier
    with a separate output table N(0, 1); "normal" draws all matrices and tables from N(0, 0.02).
    """

    causal = True

    def __init__(
        self,
        *,
        sequence_length: int,
        embedding_dim: int,
        num_blocks: int,
        num_heads: int,
        dropout_rate: float,
        block: str = "pre-norm",
        feed_forward_dim: int = 0,
        activation: str = "relu",
        attention_dropout_rate: float | None = None,
        filter_weight: float = 0.7,
        low_frequencies: int = 5,
        relative_positions: bool = False,
        initialization: str = "default",
        **settings: Any,
    ) -> None:
        """Build the layers; `settings` are the other settings of Transformer."""
        norm_first = block not in ("post-norm", "bsarec")
        window = sequence_length + int(not self.causal)
        eps = 1e-5 if norm_first else _POST_NORM_EPS
        super().__init__(
            draw=small_normal if initialization == "normal" else xavier_uniform,
            draw_outputs=small_normal if initialization == "normal" else standard_normal,
            blocks=lambda: [
                Block(
                    embedding_dim,
                    num_heads,
                    dropout_rate,
                    norm_first=norm_first,
                    norm_eps=eps,
                    gated=block == "ligr",
                    feed_forward_dim=feed_forward_dim,
                    activation=activation,
                    attention_dropout_rate=attention_dropout_rate,
                    causal=self.causal,
                    relative_window=window if relative_positions else 0,
                    frequency_filter=FrequencyFilter(
                        embedding_dim, length=window, frequencies=low_frequencies
                    )
                    if block == "bsarec"
                    else None,
                    filter_weight=filter_weight,
                )
                for _ in range(num_blocks)
            ],
            scaled=norm_first,
            input_norm=None if norm_first else nn.LayerNorm(embedding_dim, eps),
            output_norm=nn.LayerNorm(embedding_dim) if norm_first else None,
            causal=self.causal,
            sequence_length=sequence_length,
            embedding_dim=embedding_dim,
            dropout_rate=dropout_rate,
            **settings,
        )
        if block == "bsarec":
            self.one_row_serves_all = False
        if initialization == "normal":
            self.blocks.apply(small_normal_weights)


class Block(nn.Module):
    """Layer with the arithmetic and initialization of nn.TransformerEncoderLayer.

    norm_first: norms stand before attention and feed-forward; otherwise after their residuals, and
    then the feed-forward network has no dropout inside, as in RecBole. gated: with norm_first, the
    outputs of attention and feed-forward are multiplied with sigmoid(x W + b) before they are added
    to x, each with a gate of its own. activation="swiglu": the feed-forward network has no biases,
    and its inner layer is silu(x U) * (x V). causal: events attend to themselves and the
    earlier events of their row; otherwise to all of them. relative_window: attention scores have a
    learned bias for each distance in a window of this many events; 0: none. frequency_filter:
    stands beside attention, with a residual and a norm of its own; their outputs are added with the
    weights filter_weight and 1 - filter_weight. Not with norm_first.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dropout_rate: float,
        *,
        norm_first: bool = True,
        norm_eps: float = 1e-5,
        gated: bool = False,
        feed_forward_dim: int = 0,
        activation: str = "relu",
        attention_dropout_rate: float | None = None,
        causal: bool = True,
        relative_window: int = 0,
        frequency_filter: FrequencyFilter | None = None,
        filter_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_first = norm_first
        self.causal = causal
        self.attention_dropout_rate = (
            dropout_rate if attention_dropout_rate is None else attention_dropout_rate
        )
        inner_dim = feed_forward_dim or dim
        self.attention_norm = nn.LayerNorm(dim, norm_eps)
        self.query_key_value = Linear(dim, 3 * dim)
        self.attention_output = Linear(dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim, norm_eps)
        swiglu = activation == "swiglu"
        self.feed_forward = nn.Sequential(
            Linear(dim, 2 * inner_dim if swiglu else inner_dim, bias=not swiglu),
            _ACTIVATIONS[activation](),
            Dropout(dropout_rate if norm_first else 0.0),
            Linear(inner_dim, dim, bias=not swiglu),
        )
        self.dropout = Dropout(dropout_rate)
        nn.init.xavier_uniform_(self.query_key_value.weight)
        nn.init.zeros_(self.query_key_value.bias)
        nn.init.zeros_(self.attention_output.bias)
        self.relative_bias = (
            RelativeBias(num_heads, relative_window, causal=causal) if relative_window else None
        )
        self.filter = frequency_filter
        self.filter_weight = filter_weight
        self.filter_norm = nn.LayerNorm(dim, norm_eps) if frequency_filter else None
        self.attention_gate = Linear(dim, dim) if gated else None
        self.feed_forward_gate = Linear(dim, dim) if gated else None

    def forward(
        self,
        x_ND: torch.Tensor,
        groups: tuple[AttentionGroup, ...],
        padding_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map [N, D] to [N, D]. padding_B: places of padding that each row attends to; None: 0."""
        if self.norm_first:
            attended_ND = self._attended(x_ND, groups, padding_B)
            x_ND = x_ND + _through(self.attention_gate, x_ND, attended_ND)
            fed_ND = self.dropout(self.feed_forward(self.feed_forward_norm(x_ND)))
            return x_ND + _through(self.feed_forward_gate, x_ND, fed_ND)
        mixed_ND = self.attention_norm(x_ND + self._attended(x_ND, groups, padding_B))
        if self.filter is not None and self.filter_norm is not None:
            filtered_ND = self.filter_norm(x_ND + self.dropout(self.filter(x_ND, groups)))
            mixed_ND = self.filter_weight * filtered_ND + (1 - self.filter_weight) * mixed_ND
        x_ND = mixed_ND
        return self.feed_forward_norm(x_ND + self.dropout(self.feed_forward(x_ND)))

    def _attended(
        self,
        x_ND: torch.Tensor,
        groups: tuple[AttentionGroup, ...],
        padding_B: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return what attention adds to the residual."""
        padding = None
        if padding_B is not None:
            padding = Padding(self._query_key_value(torch.zeros_like(x_ND[:1])), padding_B)
        attended_ND = packed_attention(
            self._query_key_value(x_ND),
            groups,
            num_heads=self.num_heads,
            dropout_rate=self.attention_dropout_rate if self.training else 0.0,
            causal=self.causal,
            padding=padding,
            relative_bias=self.relative_bias,
        )
        return self.dropout(self.attention_output(attended_ND))

    def _query_key_value(self, x_ND: torch.Tensor) -> torch.Tensor:
        return self.query_key_value(self.attention_norm(x_ND) if self.norm_first else x_ND)


def _through(gate: nn.Module | None, x_ND: torch.Tensor, added_ND: torch.Tensor) -> torch.Tensor:
    return added_ND if gate is None else gate(x_ND).sigmoid() * added_ND
