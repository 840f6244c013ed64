"""Configurations of the projects that people come from, as settings of ExperimentConfig.

otto-de/TRON's JSON files (arXiv 2307.14906), for SASRec and for its GRU4Rec, and the arguments of
gSASRec's GSASRecExperimentConfig (arXiv 2308.07192). A value keeps the meaning that the project's
code gives it; where what tron does around it differs, `differences_from_tron` says so.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tron_cli.errors import InputError

if TYPE_CHECKING:
    from tron_cli.config import ExperimentConfig

_NUMBER = (float, int)
_NOTHING = type(None)

# TRON's key: our setting (None: not a setting), and the types that its value may have in JSON.
_KEYS: dict[str, tuple[str | None, tuple[type, ...]]] = {
    "model": ("model", (str,)),
    "dataset": ("dataset_name", (str,)),
    "hidden_size": ("embedding_dim", (int,)),
    "num_layers": ("num_blocks", (int,)),
    "dropout": ("dropout_rate", _NUMBER),
    "max_session_length": ("sequence_length", (int,)),
    "share_embeddings": ("reuse_item_embeddings", (bool,)),
    "output_bias": ("output_bias", (bool,)),
    "original_gru": (None, (bool,)),
    "final_activation": ("final_activation", (bool,)),
    "loss": ("loss", (str,)),
    "bpr_penalty": ("bpr_penalty", (*_NUMBER, _NOTHING)),
    "num_uniform_negatives": ("num_uniform_negatives", (int,)),
    "num_batch_negatives": ("num_batch_negatives", (int, _NOTHING)),
    "sampling_style": ("sampling_style", (str,)),
    "reject_uniform_session_items": ("reject_uniform_session_items", (bool,)),
    "reject_in_batch_items": ("reject_in_batch_items", (bool,)),
    "topk_sampling": ("topk_sampling", (bool,)),
    "topk_sampling_k": ("topk_sampling_k", (int,)),
    "optimizer": ("optimizer", (str,)),
    "lr": ("lr", _NUMBER),
    "batch_size": ("train_batch_size", (int,)),
    "max_epochs": ("max_epochs", (int,)),
    "shuffling_style": ("shuffling_style", (str,)),
    "overfit_batches": ("overfit_batches", _NUMBER),
    "limit_val_batches": ("limit_val_batches", _NUMBER),
    "accelerator": (None, (str,)),
}
_GRU_KEYS = {"original_gru", "final_activation"}
_OPTIONAL_KEYS = {"bpr_penalty", "topk_sampling", "topk_sampling_k"}
_OUR_NAMES = {ours: key for key, (ours, _) in _KEYS.items() if ours is not None}

# What TRON's code knows; tron knows more, which key=value words can ask for.
_CHOICES = {
    "model": ("sasrec", "gru4rec"),
    "loss": ("bce", "bpr-max", "ssm"),
    "sampling_style": ("eventwise", "sessionwise", "batchwise"),
    "optimizer": ("adam", "adagrad"),
    "accelerator": ("gpu", "cpu", "auto"),
    "shuffling_style": (
        "no_shuffling",
        "shuffle_without_replacement",
        "shuffle_with_replacement",
        "shuffling_without_replacement",
        "shuffling_with_replacement",
    ),
}

_TYPE_NAMES = {
    (bool,): "true or false",
    (int,): "a whole number",
    (int, _NOTHING): "a whole number or null",
    _NUMBER: "a number",
    (*_NUMBER, _NOTHING): "a number or null",
    (str,): "a text",
}


def tron_settings(
    path: Path, overrides: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The settings that one of TRON's JSON files stands for, and notes on how they were read.

    `overrides` are settings that replace some of the file's afterwards: in-batch negatives that
    the file leaves to the batch size follow a train_batch_size among them. Raises InputError.
    """
    values = _read(path)
    notes = []
    is_gru = values["model"] == "gru4rec"
    if is_gru:
        if values["original_gru"]:
            raise InputError(
                f"{path}: original_gru is true, which asks for input embeddings that are the GRU's "
                "gates; tron has GRU4Rec+ with constrained embeddings: set it to false"
            )
    else:
        ignored = [key for key in sorted(_GRU_KEYS) if values.pop(key, False)]
        if ignored:
            notes.append(f"{' and '.join(ignored)} ignored, as TRON does for SASRec")

    settings = {
        ours: values[key]
        for key, (ours, _) in _KEYS.items()
        if ours is not None and values.get(key) is not None
    }
    settings["overfit_batches"] = int(values["overfit_batches"])
    # What TRON's code does without asking the file.
    settings["positions"] = "end"
    settings["session_parallel"] = is_gru
    settings["topk_sampling"] = values.get("topk_sampling", False)
    if settings["topk_sampling"]:
        settings.setdefault("topk_sampling_k", 1000)

    if values["num_batch_negatives"] is None:
        batch_size = (overrides or {}).get("train_batch_size", values["batch_size"])
        settings["num_batch_negatives"] = batch_size - 1
    style, reject = values["sampling_style"], values["reject_uniform_session_items"]
    if is_gru and style == "eventwise":
        settings["sampling_style"] = "sessionwise"
        notes.append("eventwise read as sessionwise, as TRON does for GRU4Rec")
    if is_gru and style == "batchwise" and reject:
        notes.append("reject_uniform_session_items ignored, which needs negatives of each session")
    spelling = values["shuffling_style"]
    if spelling.startswith("shuffling_"):
        settings["shuffling_style"] = spelling.replace("shuffling_", "shuffle_")
        notes.append(f"{spelling} shuffles, where TRON's code does not know this word")
    return settings, notes


def tron_accelerator(path: Path) -> str:
    """gpu, cpu or auto: where one of TRON's JSON files wants to be trained."""
    return _read(path)["accelerator"]


def differences_from_tron(config: ExperimentConfig) -> list[str]:
    """What tron does otherwise than TRON with this config, and how to have it TRON's way."""
    differences = ["checkpoints are chosen on the validation split (TRON: on the test split)"]
    if config.mask_collisions:
        differences.append(
            "a position's own target is never its negative (TRON: mask_collisions=False)"
        )
    if config.precision == "auto":
        differences.append(
            "bf16 on CUDA where it exists, float32 on CPU (TRON: precision=fp16, CUDA only)"
        )
    if config.limit_val_batches != 1:
        differences.append("validation sessions are evenly spaced (TRON: the first of the split)")
    if config.model == "gru4rec":
        differences.append("sessions under way at the end of an epoch go on (TRON: dropped)")
    else:
        differences.append(
            "each event is evaluated from its own history (TRON: tron evaluate --one-pass)"
        )
        differences.append("the last, smaller batch counts (TRON: dropped)")
    return differences


def blame(path: Path, error: InputError, overrides: Mapping[str, Any]) -> InputError:
    """An error in the settings of a JSON file, with the file and the file's name of the setting."""
    named = re.match(r"\w+", str(error))
    setting = named.group() if named else ""
    if setting in overrides:
        return error
    key = _OUR_NAMES.get(setting, setting)
    where = f"{path}" if key == setting else f"{path}, {key}"
    return InputError(f"{where}: {error}")


def _read(path: Path) -> dict[str, Any]:
    """The keys of a JSON file, each known, of its type, and all there that TRON needs."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})"
        ) from None
    except RecursionError:
        raise InputError(
            f"{path}: not a configuration of otto-de/TRON (nested too deeply)"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not JSON ({error.reason} at byte {error.start})") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise InputError(
            f'{path}: expected an object such as {{"model": "sasrec", ...}}, as otto-de/TRON has '
            f"them, got {type(values).__name__}"
        )
    for key, value in values.items():
        _check(path, key, value)
    needed = [key for key in _KEYS if key not in _OPTIONAL_KEYS | _GRU_KEYS]
    if values.get("model") == "gru4rec":
        needed += sorted(_GRU_KEYS)
    if values.get("loss") == "bpr-max":
        needed.append("bpr_penalty")
    missing = [key for key in needed if key not in values]
    if values.get("loss") == "bpr-max" and values.get("bpr_penalty", 0) is None:
        missing.append("bpr_penalty")
    if missing:
        raise InputError(f"{path}: {', '.join(missing)} missing; TRON's files need it")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise InputError(f"{key} is given twice; keep one")
        values[key] = value
    return values


def _check(path: Path, key: str, value: Any) -> None:
    if key not in _KEYS:
        raise InputError(f"{path}: unknown key {key!r}; {_suggestion(key)}")
    types = _KEYS[key][1]
    if type(value) not in types:
        raise InputError(f"{path}: {key} must be {_TYPE_NAMES[types]}, got {json.dumps(value)}")
    choices = _CHOICES.get(key)
    if choices and value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{path}: {key} must be one of {', '.join(choices)}, got {value!r}{hint}")
    # PyTorch Lightning, which TRON hands these to, takes a whole number for a number of batches
    # and a fraction for a share.
    if key == "limit_val_batches" and type(value) is int and value < 2:
        raise InputError(
            f"{path}: limit_val_batches is {value}, a number of batches in TRON; write 1.0 for the "
            "whole validation split, a share such as 0.1, or 2 batches or more"
        )
    if key == "overfit_batches" and type(value) is float and value != 0:
        raise InputError(
            f"{path}: overfit_batches is {value}, a share of the training split in TRON; give a "
            "number of batches, such as 10, or 0 for none"
        )


def _suggestion(key: str) -> str:
    if key in _OUR_NAMES:
        return f"TRON calls it {_OUR_NAMES[key]}"
    near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.7)
    if near:
        return f"did you mean {near[0]}?"
    return "settings that TRON does not have go on the command line, as key=value"


def gsasrec_settings(
    dataset_name: str,
    sequence_length: int = 200,
    embedding_dim: int = 256,
    train_batch_size: int = 128,
    num_heads: int = 4,
    num_blocks: int = 3,
    dropout_rate: float = 0.0,
    negs_per_pos: int = 256,
    max_epochs: int = 10000,
    max_batches_per_epoch: int = 100,
    metrics: Any = ("nDCG@10", "R@1", "R@10"),
    val_metric: Any = "nDCG@10",
    early_stopping_patience: int = 200,
    gbce_t: float = 0.75,
    filter_rated: bool = True,
    eval_batch_size: int = 512,
    recommendation_limit: int = 10,
    reuse_item_embeddings: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Settings by gSASRec's names, in its order and with its defaults.

    What its code has no name for is fixed as there: the gSASRec network, gBCE on uniform negatives
    of each position that may be its own target, positions counted from the end of the window,
    Adam at 1e-3. `metrics` and `val_metric` may be measures of ir_measures or their names; `more`
    are further settings of ExperimentConfig.
    """
    return {
        "dataset_name": dataset_name,
        "model": "gsasrec",
        "sequence_length": sequence_length,
        "embedding_dim": embedding_dim,
        "num_heads": num_heads,
        "num_blocks": num_blocks,
        "dropout_rate": dropout_rate,
        "positions": "end",
        "reuse_item_embeddings": reuse_item_embeddings,
        "loss": "gbce",
        "gbce_t": gbce_t,
        "num_uniform_negatives": negs_per_pos,
        "num_batch_negatives": 0,
        "sampling_style": "eventwise",
        "reject_in_batch_items": False,
        "topk_sampling": False,
        "mask_collisions": False,
        "train_batch_size": train_batch_size,
        "max_epochs": max_epochs,
        "max_batches_per_epoch": max_batches_per_epoch,
        "lr": 1e-3,
        "metrics": metrics,
        "val_metric": val_metric,
        "early_stopping_patience": early_stopping_patience,
        "filter_rated": filter_rated,
        "eval_batch_size": eval_batch_size,
        "recommendation_limit": recommendation_limit,
        **more,
    }
