"""SASRec as TRON trains it: a pre-norm causal transformer over packed sessions.

Kang and McAuley, Self-Attentive Sequential Recommendation (ICDM 2018), in the form of TRON
(arXiv 2307.14906): input = item embedding * sqrt(D) + position embedding, dropout, layers with
a ReLU feed-forward as wide as the hidden state, final LayerNorm.

Shapes: N packed events, D embedding_dim, R rows of a group, W their padded width, H heads.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from tron_cli.models import Model
from tron_cli.models.dropout import Dropout, drop
from tron_cli.models.initialize import standard_normal, xavier_uniform
from tron_cli.products import Linear

if TYPE_CHECKING:
    from tron_cli.batches import AttentionGroup, Batch


class SASRec(Model):
    """Packed batch -> hidden states, and the table whose rows they are compared with."""

    fixed_shapes = True

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
        self.num_items = num_items
        self.sequence_length = sequence_length
        self.one_row_serves_all = positions == "start"
        self.embedding_dim = embedding_dim
        self.positions = positions
        self.output_bias = output_bias
        # The bias of an item is one more column of its output embedding, met by a constant 1.
        output_dim = embedding_dim + int(output_bias)
        input_dim = output_dim if reuse_item_embeddings else embedding_dim
        self.item_embedding = nn.Embedding.from_pretrained(
            xavier_uniform(num_items + 1, input_dim), freeze=False
        )
        self.position_embedding = nn.Embedding.from_pretrained(
            xavier_uniform(sequence_length, embedding_dim), freeze=False
        )
        self.output_embedding = (
            self.item_embedding
            if reuse_item_embeddings
            else nn.Embedding.from_pretrained(
                standard_normal(num_items + 1, output_dim), freeze=False
            )
        )
        self.dropout = Dropout(dropout_rate)
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
        self.query_key_value = Linear(dim, 3 * dim)
        self.attention_output = Linear(dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            Linear(dim, dim), nn.ReLU(), Dropout(dropout_rate), Linear(dim, dim)
        )
        self.dropout = Dropout(dropout_rate)
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
                qkv = _Padded.apply(qkv_N3D, group.gather_RW.flatten(), group.keep)
            q_RHWD, k_RHWD, v_RHWD = qkv.view(rows, width, 3, self.num_heads, -1).permute(
                2, 0, 3, 1, 4
            )
            out_RHWD = causal_attention(q_RHWD, k_RHWD, v_RHWD, dropout_rate)
            out_ND = out_RHWD.transpose(1, 2).reshape(rows * width, -1)
            attended.append(out_ND if group.keep is None else out_ND.index_select(0, group.keep))
        return torch.cat(attended)


def causal_attention(
    q_RHWD: torch.Tensor, k_RHWD: torch.Tensor, v_RHWD: torch.Tensor, dropout_rate: float
) -> torch.Tensor:
    """F.scaled_dot_product_attention, which has no fast way for dropout on the CPU."""
    if not dropout_rate or q_RHWD.is_cuda:
        return F.scaled_dot_product_attention(
            q_RHWD, k_RHWD, v_RHWD, dropout_p=dropout_rate, is_causal=True
        )
    width, dim = q_RHWD.shape[2:]
    future_WW = q_RHWD.new_full((width, width), -torch.inf).triu_(1)
    scores_RHWW = q_RHWD @ (k_RHWD / math.sqrt(dim)).transpose(2, 3) + future_WW
    return drop(scores_RHWW.softmax(dim=3), dropout_rate) @ v_RHWD


class _Padded(torch.autograd.Function):
    """Events at the places of padded rows. What attention computes at padding is dropped, so only
    the events themselves have gradients."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: torch.Tensor, gather: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(gather[keep], keep)
        ctx.num_events = len(x_ND)
        return x_ND.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        event, keep = ctx.saved_tensors
        grad_ND = grads[0].new_zeros(ctx.num_events, grads[0].shape[1])
        return grad_ND.index_copy_(0, event, grads[0].index_select(0, keep)), None, None
