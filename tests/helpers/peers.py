"""Checkpoints as otto-de/TRON and gSASRec-pytorch name their tensors, and what they compute.

Written from the description of both: the hidden states here come from the tensors under the peers'
names, in plain operations on padded windows, without any code of ours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Weights = dict[str, torch.Tensor]


def tron_sasrec(
    *, items: int, width: int = 8, blocks: int = 2, length: int = 6, shared: bool = True,
    bias: bool = False, batch_size: int = 4, **hyper_parameters: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return the content of a Lightning checkpoint of TRON's SASRec with random weights."""
    layer = nn.TransformerEncoderLayer(
        width, 1, width, dropout=0.0, batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(
        layer, blocks, norm=nn.LayerNorm(width), enable_nested_tensor=False
    )
    state = {
        f"encoder.{name}": torch.randn_like(v) * 0.3 for name, v in encoder.state_dict().items()
    }
    state |= {name.removeprefix("encoder."): v for name, v in state.items() if ".norm." in name}
    table = torch.randn(items + 1, width + int(bias and shared))
    state["item_embedding.weight"] = table
    state["output_embedding.weight"] = (
        table if shared else torch.randn(items + 1, width + int(bias))
    )
    state["positional_embedding_layer.embedding.weight"] = torch.randn(length, width)
    state["positional_embedding_layer.pos_indices_const"] = torch.arange(length)
    state["future_mask_const"] = torch.full((length, length), -math.inf).triu(1)
    state["seq_diag_const"] = ~torch.eye(length, dtype=torch.bool)
    state["bias_ones"] = torch.ones(batch_size, length, 1)
    said = {
        "hidden_size": width, "max_len": length, "num_layers": blocks, "num_items": items,
        "output_bias": bias, "share_embeddings": shared, "dropout_rate": 0.1, "loss": "ssm",
        "learning_rate": 5e-4, "batch_size": batch_size, "bpr_penalty": None,
        "topk_sampling": True, "topk_sampling_k": 100, "sampling_style": "batchwise",
        **hyper_parameters,
    }  # fmt: skip
    return lightning(state, said)


def tron_gru4rec(
    *, items: int, width: int = 8, blocks: int = 2, shared: bool = True, bias: bool = False
) -> dict[str, Any]:
    gru = nn.GRU(width, width, blocks)
    state = {f"gru.{name}": torch.randn_like(v) * 0.3 for name, v in gru.state_dict().items()}
    table = torch.randn(items + 1, width + int(bias and shared))
    state["item_embedding.weight"] = table
    state["output_embedding.weight"] = (
        table if shared else torch.randn(items + 1, width + int(bias))
    )
    state |= {"current_state": torch.zeros(blocks, 4, width), "loss_mask": torch.ones(1, 4)}
    state["bias_ones"] = torch.ones(4, 1, 1)
    said = {"hidden_size": width, "num_layers": blocks, "num_items": items, "output_bias": bias,
            "share_embeddings": shared, "final_activation": True}  # fmt: skip
    return lightning(state, said)


def lightning(state: Weights, hyper_parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "epoch": 3,
        "global_step": 1234,
        "pytorch-lightning_version": "1.9.5",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 5e-4}]}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": hyper_parameters,
    }


def gsasrec(
    *, items: int, width: int = 8, blocks: int = 2, length: int = 6, shared: bool = False
) -> Weights:
    """Return the state_dict of a gSASRec with random weights; row I + 1 is its padding."""
    state = {"item_embedding.weight": torch.randn(items + 2, width)}
    state["position_embedding.weight"] = torch.randn(length, width)
    for block in range(blocks):
        name = f"transformer_blocks.{block}"
        for norm in ("first_norm", "second_norm"):
            state |= _affine(f"{name}.{norm}", width)
        for part in ("query_proj", "key_proj", "val_proj"):
            state |= _affine(f"{name}.multihead_attention.{part}", width, width)
        state |= _affine(f"{name}.dense1", width, width) | _affine(f"{name}.dense2", width, width)
    state |= _affine("seq_norm", width)
    if not shared:
        state["output_embedding.weight"] = torch.randn(items + 2, width)
    return state


def _affine(name: str, *shape: int) -> Weights:
    return {f"{name}.weight": torch.randn(shape) * 0.5, f"{name}.bias": torch.randn(shape[0]) * 0.3}


def tron_hidden(content: dict[str, Any], history: list[int]) -> torch.Tensor:
    """Return the state [D or D + 1] after a history, in float64."""
    state = {name: values.double() for name, values in content["state_dict"].items()}
    said = content["hyper_parameters"]
    width, bias, blocks = said["hidden_size"], said["output_bias"], said["num_layers"]
    table = state["item_embedding.weight"][:, :width]
    if "gru.weight_ih_l0" in state:
        gru = nn.GRU(width, width, blocks).double()
        gru.load_state_dict({name[4:]: v for name, v in state.items() if name.startswith("gru.")})
        found = gru(table[history][:, None])[0][-1, 0]
    else:
        length = said["max_len"]
        padded = [0] * (length - len(history)) + history
        x = table[padded] * math.sqrt(width)
        x = x + state["positional_embedding_layer.embedding.weight"]
        layer = nn.TransformerEncoderLayer(
            width, 1, width, dropout=0.0, batch_first=True, norm_first=True
        )
        encoder = nn.TransformerEncoder(
            layer, blocks, norm=nn.LayerNorm(width), enable_nested_tensor=False
        ).double()
        encoder.load_state_dict({n[8:]: v for n, v in state.items() if n.startswith("encoder.")})
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        hidden = (hidden | (torch.tensor(padded) == 0)) & ~torch.eye(length, dtype=torch.bool)
        found = encoder(x[None], mask=hidden[None])[0, -1]
    return torch.cat([found, torch.ones(1).double()]) if bias else found


def gsasrec_hidden(weights: Weights, history: list[int], heads: int) -> torch.Tensor:
    """Return the state [D] after a history, in float64."""
    state = {name: values.double() for name, values in weights.items()}
    length, width = state["position_embedding.weight"].shape
    padding = len(state["item_embedding.weight"]) - 1
    padded = torch.tensor([padding] * (length - len(history)) + history)
    real = (padded != padding)[:, None]

    def affine(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"])

    x = (state["item_embedding.weight"][padded] + state["position_embedding.weight"]) * real
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1) | ~real[:, 0]
    for block in range(sum(name.endswith("dense1.bias") for name in state)):
        name = f"transformer_blocks.{block}"
        queries = norm(x, f"{name}.first_norm")
        q, k, v = (
            affine(source, f"{name}.multihead_attention.{part}_proj").view(length, heads, -1)
            for source, part in ((queries, "query"), (x, "key"), (x, "val"))
        )
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(width // heads)
        shares = scores.masked_fill(hidden, -math.inf).softmax(2).nan_to_num(0.0)
        attended = torch.einsum("hqk,khd->qhd", shares, v).reshape(length, width)
        x = norm(attended + queries, f"{name}.second_norm")
        x = (x + affine(affine(x, f"{name}.dense1").clamp_min(0), f"{name}.dense2")) * real
    return norm(x, "seq_norm")[-1]
