"""Settings from otto-de/TRON's JSON files (arXiv 2307.14906), for its SASRec and its GRU4Rec.

A value keeps the meaning that TRON's code gives it; `differences_from_tron` lists where tron still
differs.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tron_cli.config.experiment import FIELDS, ExperimentConfig
from tron_cli.errors import InputError

_NUMBER = (float, int)
_NOTHING = type(None)

# TRON's keys: the settings that they stand for.
_SETTINGS = {field.tron: name for name, field in FIELDS.items() if field.tron}
_GRU_KEYS = {"original_gru", "final_activation"}
_OPTIONAL_KEYS = {"bpr_penalty", "topk_sampling", "topk_sampling_k"}

# Types that values may have in JSON: those of the settings, but for these keys.
_TYPES: dict[str, tuple[type, ...]] = {
    **{
        key: _NUMBER if FIELDS[name].kind is float else (FIELDS[name].kind,)
        for key, name in _SETTINGS.items()
    },
    "bpr_penalty": (*_NUMBER, _NOTHING),
    "num_batch_negatives": (int, _NOTHING),
    "overfit_batches": _NUMBER,
    "original_gru": (bool,),
    "accelerator": (str,),
}

# Values that TRON's code knows; tron has more, which key=value words can choose.
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
    (str,): "a string",
}


def tron_settings(
    path: Path, overrides: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that one of TRON's JSON files stands for, and notes on how it was read.

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

    settings = {name: values[key] for key, name in _SETTINGS.items() if values.get(key) is not None}
    settings["overfit_batches"] = int(values["overfit_batches"])
    # Fixed in TRON's code.
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
    """Return gpu, cpu or auto: where one of TRON's JSON files asks to be trained."""
    return _read(path)["accelerator"]


def differences_from_tron(config: ExperimentConfig) -> list[str]:
    """Return where tron differs from TRON with this config, and how to have it TRON's way."""
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
    """Return the error with the JSON file in front, and the file's name of the setting."""
    named = re.match(r"\w+", str(error))
    setting = named.group() if named else ""
    if setting in overrides:
        return error
    key = FIELDS[setting].tron if setting in FIELDS else ""
    where = f"{path}, {key}" if key not in ("", setting) else f"{path}"
    return InputError(f"{where}: {error}")


def _read(path: Path) -> dict[str, Any]:
    """Return the values of a JSON file: keys known, types right, none missing that TRON needs."""
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
    needed = [key for key in _TYPES if key not in _OPTIONAL_KEYS | _GRU_KEYS]
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
    if key not in _TYPES:
        raise InputError(f"{path}: unknown key {key!r}; {_suggestion(key)}")
    types = _TYPES[key]
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
    if key in FIELDS and FIELDS[key].tron:
        return f"TRON calls it {FIELDS[key].tron}"
    near = difflib.get_close_matches(key, _TYPES, n=1, cutoff=0.7)
    if near:
        return f"did you mean {near[0]}?"
    return "settings that TRON does not have go on the command line, as key=value"
