"""Networks beside their padded references."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import nn

from tron_cli.config import ExperimentConfig
from tron_cli.data.dataset import Sessions
from tron_cli.models.base import build_model


def make_sessions(lengths: list[int], num_items: int, seed: int = 0) -> Sessions:
    items = np.random.default_rng(seed).integers(1, num_items + 1, sum(lengths))
    return Sessions(items.astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]))


def make_config(**values) -> ExperimentConfig:
    defaults = {
        "dataset_name": "test",
        "sequence_length": 6,
        "embedding_dim": 8,
        "dropout_rate": 0.0,
        "num_uniform_negatives": 7,
        "num_batch_negatives": 3,
        "topk_sampling": False,
    }
    return ExperimentConfig(**{**defaults, **values})


def random_model(network: type[Any], *, seed: int = 0, **changes: Any) -> Any:
    """Make a network with weights so large that order and positions matter; items 3 and 7 tie."""
    torch.manual_seed(seed)
    settings = {
        "num_items": 40,
        "sequence_length": 5,
        "embedding_dim": 8,
        "num_blocks": 2,
        "num_heads": 2,
        "dropout_rate": 0.5,
        "reuse_item_embeddings": True,
        "output_bias": False,
        **changes,
    }
    model = network(**settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        model.item_table[7] = model.item_table[3]
    return model.eval()


# Names of the parts of torch's encoder, and ours.
NAMES = {
    "layers.": "blocks.",
    "self_attn.in_proj_": "query_key_value.",
    "self_attn.out_proj": "attention_output",
    "linear1": "feed_forward.0",
    "linear2": "feed_forward.3",
    "norm1": "attention_norm",
    "norm2": "feed_forward_norm",
}


def name_in_ours(name: str) -> str:
    """Return our name of a parameter of torch's encoder."""
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


class PaddedReference(nn.Module):
    """SASRec as TRON describes it, padded to [B, L], around torch.nn.TransformerEncoder.

    Takes its weights from a packed model; `parameter` names say which is which.
    """

    def __init__(self, model: nn.Module, config: ExperimentConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embedding_dim
        layer = nn.TransformerEncoderLayer(
            d_model=dim, nhead=config.num_heads, dim_feedforward=dim, dropout=0.0,
            batch_first=True, norm_first=True,
        )  # fmt: skip
        self.encoder = nn.TransformerEncoder(
            layer, config.num_blocks, norm=nn.LayerNorm(dim), enable_nested_tensor=False
        )
        weights = dict(model.named_parameters())
        self.items = copy.deepcopy(model.item_embedding)
        self.positions = copy.deepcopy(model.position_embedding)
        self.outputs = self.items if config.shares_table else copy.deepcopy(model.output_embedding)
        self.log_score_scale = copy.deepcopy(model.log_score_scale)
        self.double()
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(weights[self.name_in_model(name)])

    @staticmethod
    def name_in_model(name: str) -> str:
        for theirs, ours in (
            ("items.", "item_embedding."),
            ("positions.", "position_embedding."),
            ("outputs.", "output_embedding."),
            ("encoder.", ""),
        ):
            name = name.replace(theirs, ours)
        return name_in_ours(name)

    def forward(self, histories: list[list[int]]) -> list[torch.Tensor]:
        """The hidden states [length, D] of each history of up to L items.

        positions="end" pads in front as TRON does, "start" behind: place p of the window has
        position embedding p either way.
        """
        config = self.config
        length = config.sequence_length
        before = [length - len(items) if config.positions == "end" else 0 for items in histories]
        inputs = torch.zeros(len(histories), length, dtype=torch.int64)
        for row, (items, start) in enumerate(zip(histories, before, strict=True)):
            inputs[row, start : start + len(items)] = torch.tensor(items)
        embedded = self.items(inputs)[..., : config.embedding_dim]
        if config.normalize_inputs:
            embedded = embedded / embedded.norm(dim=-1, keepdim=True)
        x = embedded * math.sqrt(config.embedding_dim) + self.positions.weight
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        forbidden = future | (inputs == 0)[:, None, :]
        forbidden &= ~torch.eye(length, dtype=torch.bool)  # a padded place sees itself: no NaN
        hidden = self.encoder(x, mask=forbidden.repeat_interleave(config.num_heads, dim=0))
        if config.score == "cosine":
            learned = self.log_score_scale
            scale = config.score_scale if learned is None else learned.exp()
            hidden = scale * hidden / hidden.norm(dim=-1, keepdim=True)
        if config.output_bias:
            hidden = torch.cat([hidden, torch.ones_like(hidden[..., :1])], dim=-1)
        return [
            hidden[row, start : start + len(items)]
            for row, (items, start) in enumerate(zip(histories, before, strict=True))
        ]

    def output_rows(self) -> torch.Tensor:
        """The rows [V, D] that hidden states are multiplied with."""
        table, width = self.outputs.weight, self.config.embedding_dim
        if self.config.score == "dot":
            return table
        length = table[:, :width].square().sum(dim=1, keepdim=True).sqrt()
        return torch.cat([table[:, :width] / length, table[:, width:]], dim=1)


def build_pair(config: ExperimentConfig, num_items: int):
    """A packed model in float64, with every weight drawn anew, and its reference."""
    torch.manual_seed(5)
    model = build_model(config, num_items).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)  # no bias is zero, no scale is one
    return model, PaddedReference(model, config)
