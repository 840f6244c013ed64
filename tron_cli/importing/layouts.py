"""Weights of otto-de/TRON and gSASRec-pytorch under the names of our networks.

Settings are read from the tensors themselves; settings that a file states must agree with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tron_cli.errors import InputError

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Foreign:
    """A network of another tool.

    settings: those that the tensors decide. hints: settings of its training that the file states.
    needed: settings that the file lacks, with an example of each. weights: by our names.
    """

    settings: dict[str, Any]
    hints: dict[str, Any]
    needed: dict[str, Any]
    weights: Weights
    num_items: int
    step: int = 0
    epoch: int = 0


# Parts of names: theirs, as regular expressions, and ours.
_SASREC_NAMES = {
    r"^positional_embedding_layer\.embedding\.": "position_embedding.",
    r"^encoder\.norm\.": "norm.",
    r"^encoder\.layers\.": "blocks.",
    r"\.self_attn\.in_proj_": ".query_key_value.",
    r"\.self_attn\.out_proj\.": ".attention_output.",
    r"\.linear1\.": ".feed_forward.0.",
    r"\.linear2\.": ".feed_forward.3.",
    r"\.norm1\.": ".attention_norm.",
    r"\.norm2\.": ".feed_forward_norm.",
}
_GSASREC_NAMES = {
    r"^seq_norm\.": "norm.",
    r"^transformer_blocks\.": "blocks.",
    r"\.first_norm\.": ".attention_norm.",
    r"\.second_norm\.": ".feed_forward_norm.",
    r"\.multihead_attention\.query_proj\.": ".query.",
    r"\.dense1\.": ".feed_forward.0.",
    r"\.dense2\.": ".feed_forward.3.",
}
# Constants of TRON's networks, and a second name of the last norm.
_NO_WEIGHTS = re.compile(
    r"future_mask.*|seq_diag_const|bias_ones|norm\..*|current_state|loss_mask|"
    r"positional_embedding_layer\.pos_indices.*"
)
_TRON_SAYS = {
    "hidden_size": "embedding_dim",
    "max_len": "sequence_length",
    "num_layers": "num_blocks",
    "output_bias": "output_bias",
    "share_embeddings": "reuse_item_embeddings",
}
_TRON_HINTS = {
    "dropout_rate": ("dropout_rate", (float, int)),
    "learning_rate": ("lr", (float, int)),
    "batch_size": ("train_batch_size", (int,)),
    "loss": ("loss", (str,)),
    "optimizer": ("optimizer", (str,)),
}
_GSASREC_HINTS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "t": ("gbce_t", float),
    "negs": ("num_uniform_negatives", int),
    "dropout": ("dropout_rate", float),
}


def tron_network(content: Any, path: Path) -> Foreign:
    """Return SASRec or GRU4Rec of a Lightning checkpoint of otto-de/TRON, or of its state_dict."""
    content = content if isinstance(content, dict) else {}
    state = content.get("state_dict", content)
    said = content.get("hyper_parameters", {})
    if not isinstance(said, dict) or not _is_state(state):
        raise _no_checkpoint(path, "otto-de/TRON", "gsasrec")
    weights = {name: values for name, values in state.items() if not _NO_WEIGHTS.fullmatch(name)}
    is_gru = any(name.startswith("gru.") for name in weights)
    inputs, rows = _table(weights, path, "otto-de/TRON", "gsasrec")
    settings: dict[str, Any]
    if is_gru:
        width = _shape(weights, "gru.weight_hh_l0", 2, path)[1]
        if tuple(_shape(weights, "gru.weight_ih_l0", 2, path)) != (3 * width, width):
            raise InputError(
                f"{path} is a GRU4Rec with original_gru=true, whose input embeddings are gates of "
                "the GRU; tron has GRU4Rec+ with constrained embeddings: train it anew"
            )
        layers = _count(weights, r"gru\.weight_hh_l(\d+)")
        settings = {"model": "gru4rec", "embedding_dim": width, "num_blocks": layers}
        needed = {"sequence_length": 50}
    else:
        weights = _renamed(weights, _SASREC_NAMES)
        length, width = _shape(weights, "position_embedding.weight", 2, path)
        layers = _count(weights, r"blocks\.(\d+)\..*")
        settings = {"model": "sasrec", "embedding_dim": width, "num_blocks": layers}
        settings |= {"sequence_length": length, "num_heads": 1, "positions": "end"}
        needed = {}
    outputs = weights.get("output_embedding.weight", inputs)
    shared = said.get("share_embeddings")
    if type(shared) is not bool:
        shared = torch.equal(inputs, outputs)
    settings |= {"reuse_item_embeddings": shared, "output_bias": outputs.shape[-1] == width + 1}
    for name, setting in {**_TRON_SAYS, "num_items": "num_items"}.items():
        found = {**settings, "num_items": rows - 1}.get(setting)
        if name in said and found is not None and not _equal(said[name], found):
            raise InputError(
                f"{path} says {name}={said[name]!r:.40}, but its tensors have {found}; the file is "
                "damaged: take another copy"
            )
    hints = {
        setting: said[name]
        for name, (setting, kinds) in _TRON_HINTS.items()
        if type(said.get(name)) in kinds
    }
    if hints.get("loss") == "bpr-max" and type(said.get("bpr_penalty")) in (float, int):
        hints["bpr_penalty"] = said["bpr_penalty"]
    step, epoch = (
        value if type(value) is int and value >= 0 else 0
        for value in (content.get("global_step"), content.get("epoch"))
    )
    return Foreign(settings, hints, needed, weights, rows - 1, step, epoch)


def gsasrec_network(content: Any, path: Path) -> Foreign:
    """Return gSASRec of a state_dict of gSASRec-pytorch; its file name has training settings.

    Rows 0 and I + 1 of its tables are no items, and the last one is its padding.
    """
    if not _is_state(content):
        raise _no_checkpoint(path, "gSASRec-pytorch", "tron")
    weights = _renamed(content, _GSASREC_NAMES)
    _, rows = _table(weights, path, "gSASRec-pytorch", "tron")
    length, width = _shape(weights, "position_embedding.weight", 2, path)
    shared = "output_embedding.weight" not in weights
    if shared:
        weights["output_embedding.weight"] = weights["item_embedding.weight"]
    for name in ("item_embedding.weight", "output_embedding.weight"):
        weights[name] = weights[name][: rows - 1]
    for block in range(_count(weights, r"blocks\.(\d+)\..*")):
        for kind in ("weight", "bias"):
            parts = [
                weights.pop(f"blocks.{block}.multihead_attention.{part}_proj.{kind}", None)
                for part in ("key", "val")
            ]
            whole = [part for part in parts if part is not None]
            if len(whole) == 2 and whole[0].shape == whole[1].shape:
                weights[f"blocks.{block}.key_value.{kind}"] = torch.cat(whole)
    settings = {
        "model": "gsasrec",
        "embedding_dim": width,
        "num_blocks": _count(weights, r"blocks\.(\d+)\..*"),
        "sequence_length": length,
        "positions": "end",
        "reuse_item_embeddings": shared,
        "output_bias": False,
    }
    told = dict(re.findall(r"-(step|t|negs|dropout)[:=_]([\d.]+)(?=-)", path.name))
    try:
        hints = {
            setting: kind(told[name])
            for name, (setting, kind) in _GSASREC_HINTS.items()
            if name in told
        }
        step = int(told.get("step", 0))
    except ValueError:  # not a file name of gSASRec-pytorch
        hints, step = {}, 0
    if hints:
        hints |= {"loss": "gbce", "sampling_style": "eventwise", "lr": 1e-3}
        hints |= {"num_batch_negatives": 0, "reject_in_batch_items": False}
        hints |= {"topk_sampling": False, "mask_collisions": False}
    return Foreign(settings, hints, {"num_heads": 1}, weights, rows - 2, step)


LAYOUTS = {"tron": tron_network, "gsasrec": gsasrec_network}


def _is_state(state: Any) -> bool:
    return (
        isinstance(state, dict)
        and bool(state)
        and all(
            isinstance(name, str) and isinstance(values, torch.Tensor)
            for name, values in state.items()
        )
    )


def _no_checkpoint(path: Path, tool: str, other: str) -> InputError:
    return InputError(
        f"{path} is no checkpoint of {tool}, which holds named tensors such as "
        f"item_embedding.weight; name another file, or try `tron import {other}`"
    )


def _renamed(weights: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> Weights:
    found = {}
    for name, values in weights.items():
        for theirs, ours in names.items():
            name = re.sub(theirs, ours, name)
        found[name] = values
    return found


def _shape(weights: Weights, name: str, dims: int, path: Path) -> torch.Size:
    if name not in weights or weights[name].ndim != dims:
        found = f"has {list(weights[name].shape)} numbers" if name in weights else "is missing"
        raise InputError(
            f"{path}: {name} {found}; expected a table of that name; take another copy of the file"
        )
    return weights[name].shape


def _table(weights: Weights, path: Path, tool: str, other: str) -> tuple[torch.Tensor, int]:
    """Return the input table and its number of rows."""
    if "item_embedding.weight" not in weights:
        raise _no_checkpoint(path, tool, other)
    rows, _ = _shape(weights, "item_embedding.weight", 2, path)
    if rows < 3:
        raise InputError(
            f"{path}: item_embedding.weight has {rows} rows, too few for any item; take another "
            "copy of the file"
        )
    return weights["item_embedding.weight"], rows


def _count(weights: Weights, pattern: str) -> int:
    """Return how many layers have tensors."""
    return len({found[1] for name in weights if (found := re.fullmatch(pattern, name))})


def _equal(said: Any, found: Any) -> bool:
    return type(said) is type(found) and said == found
