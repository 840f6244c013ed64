"""Import of another tool's checkpoint, which is read without running its code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tron_cli.checkpoint import damaged_part, encode_item_ids, load_checkpoint, save_checkpoint
from tron_cli.config import ExperimentConfig, load_config, parse_overrides
from tron_cli.data.catalogue import numbers_among
from tron_cli.data.dataset import Dataset, count_events
from tron_cli.data.integrity import sha256_of_file
from tron_cli.errors import InputError
from tron_cli.files import locked
from tron_cli.importing.layouts import LAYOUTS, Foreign, Weights
from tron_cli.models.base import Model, build_model

log = logging.getLogger("tron")


def import_checkpoint(
    tool: str,
    path: Path,
    output: Path,
    *,
    dataset: Dataset | None,
    item_ids_file: Path | None,
    config_name: str | None = None,
    overrides: Sequence[str] = (),
    force: bool = False,
) -> dict[str, Any]:
    """Write the weights of a file of `tool` (a key of LAYOUTS) as a checkpoint, and describe it.

    dataset: gives the original ids of the items; None needs item_ids_file. With both, a file of
    TRON's sessions is matched with those of the dataset. Settings that the file does not hold come
    from the config and its overrides. Raises InputError where the file is damaged or holds anything
    but plain data, or settings, ids and tensors do not fit together.
    """
    if output.exists() and (not force or (path.exists() and output.samefile(path))):
        raise InputError(
            f"{output} exists already; name another file with --output"
            + ("" if force else ", or pass --force to replace it")
        )
    foreign = LAYOUTS[tool](_content(path), path)
    config = _config(foreign, path, dataset, config_name, overrides)
    model = _model(foreign, config, path)
    item_ids = _item_ids(tool, foreign, path, dataset, item_ids_file)
    encoded = encode_item_ids(item_ids)
    known = popularity = None
    if dataset is not None:
        number_I = np.append(0, numbers_among(item_ids, dataset.item_ids))
        known = int((number_I > 0).sum())
        if not known:
            raise InputError(
                f"none of the {dataset.num_items:,} items of {dataset.path} is among the "
                f"{foreign.num_items:,} of {path}; pass the dataset that it was trained on, or "
                "--item-ids"
            )
        log.info(
            "%s items in %s; %s of the %s items of %s are among them",
            f"{foreign.num_items:,}", path, f"{known:,}", f"{dataset.num_items:,}", dataset.path,
        )  # fmt: skip
        sessions = dataset.checked_split("train")
        counts = np.zeros(foreign.num_items + 1, np.int64)
        counts[number_I] = count_events(sessions, dataset.num_items)
        counts[0] = 0  # entry 0 counts items that the file lacks
        popularity = torch.from_numpy(counts)
    origin = {"import": {"tool": tool, "file": str(path), "sha256": sha256_of_file(path)}}
    with locked(output.with_name(f".{output.name}.lock"), output, "name another file"):
        save_checkpoint(
            output,
            config=config,
            model=model,
            step=foreign.step,
            epoch=foreign.epoch,
            metrics={},
            dataset={
                "name": config.dataset_name,
                "protocol": "every-step" if dataset is None else dataset.protocol,
                "num_items": foreign.num_items,
                "catalogue_fingerprint": hashlib.sha256(encoded.numpy().tobytes()).hexdigest(),
                "train_fingerprint": "",  # unknown, so that evaluation warns of other sessions
            },
            item_ids=encoded,
            training={},
            popularity=popularity,
            origin=origin,
        )
    load_checkpoint(output)
    return {
        "checkpoint": str(output),
        "model": config.model,
        "items": foreign.num_items,
        "items_of_dataset": known,
        "step": foreign.step,
    }


def _content(path: Path) -> Any:
    """Read tensors and plain data; a file that asks for any other code is refused, and runs none.

    Raises InputError.
    """
    if not path.is_file():
        raise InputError(f"no file at {path}: expected a checkpoint (.ckpt or .pt)")
    try:
        is_zip = zipfile.is_zipfile(path)
        damaged = damaged_part(path) if is_zip else None
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch's own message advises unsafe loading
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked is not None:
            raise InputError(
                f"{path} asks for {asked[1]}, and reading it would run code; expected tensors and "
                "plain data alone: with the tool that wrote it, save its state_dict and "
                "hyper_parameters again"
            ) from error
        raise InputError(
            f"{path} is truncated or not a PyTorch checkpoint ({type(error).__name__}); take "
            "another copy"
        ) from error
    if damaged is not None:
        raise InputError(f"{path} is damaged: {damaged} in it does not have its checksum")
    if isinstance(content, dict) and "format_version" in content:
        raise InputError(f"{path} is a tron checkpoint already; use it without importing it")
    return content


def _config(
    foreign: Foreign,
    path: Path,
    dataset: Dataset | None,
    config_name: str | None,
    overrides: Sequence[str],
) -> ExperimentConfig:
    """Return the settings, taken from the tensors, then the caller, then hints, then defaults."""
    given = parse_overrides(overrides)
    decided = dict(foreign.settings)
    if dataset is not None:
        decided["dataset_name"] = dataset.name
    if config_name is not None:
        config, origins = load_config(config_name, overrides)
        given = {key: getattr(config, key) for key in origins if origins[key] != "default"}
        given.pop("dataset_name", None)
        given |= {key: getattr(config, key) for key in foreign.needed}
    for key in sorted(given.keys() & decided.keys()):
        if given[key] != decided[key] and given[key] is not None:
            raise InputError(
                f"{key}={given[key]} was given, but {path} holds a network of {key}={decided[key]};"
                f" leave out {key}"
            )
    missing = [f"{key}={example}" for key, example in foreign.needed.items() if key not in given]
    if missing:
        raise InputError(
            f"{path} does not hold {missing[0].partition('=')[0]}; pass the value of its training, "
            f"such as {' '.join(missing)}, or its config with --config"
        )
    if config_name is not None:
        return dataclasses.replace(config, **decided)
    return ExperimentConfig(**{"dataset_name": "imported", **foreign.hints, **given, **decided})


def _model(foreign: Foreign, config: ExperimentConfig, path: Path) -> Model:
    """Return our network with the weights of the file. Raises InputError where they do not fit."""
    with torch.device("meta"):
        model = build_model(config, foreign.num_items)
    expected, found = model.state_dict(), dict(foreign.weights)
    if "output_embedding.weight" not in found and config.shares_table:
        found["output_embedding.weight"] = found["item_embedding.weight"]
    if found.keys() != expected.keys():
        odd = min(found.keys() ^ expected.keys())
        what = "is missing" if odd in expected else "is unknown"
        raise InputError(
            f"{path}: {odd} {what} in a {config.model} with num_blocks={config.num_blocks}; "
            "expected the weights of one network, as its tool saves them"
        )
    _check_weights(found, expected, path)
    model.to_empty(device="cpu")
    model.load_state_dict({name: values.float() for name, values in found.items()})
    return model


def _check_weights(found: Weights, expected: Weights, path: Path) -> None:
    for name, values in found.items():
        if values.shape != expected[name].shape or not values.is_floating_point():
            kinds = (f"{list(each.shape)} {each.dtype}" for each in (values, expected[name]))
            raise InputError(
                f"{path}: {name} is {' but expected '.join(kinds)}".replace("torch.", "")
                + "; the file is damaged, or of another version of its tool: take another copy"
            )
        if not all(bool(extreme.isfinite()) for extreme in values.aminmax()):
            raise InputError(f"{path}: {name} holds numbers that are not finite; take another copy")


def _item_ids(
    tool: str, foreign: Foreign, path: Path, dataset: Dataset | None, file: Path | None
) -> np.ndarray:
    """Return the original id of each item of the file: int64 [I] or str [I]."""
    count = foreign.num_items
    if file is not None and file.suffix == ".jsonl":
        return _ids_by_sessions(file, count, dataset)
    if file is not None:
        return _listed_ids(file, count, path)
    if dataset is None:
        raise InputError(
            "expected --dataset, the prepared dataset of the checkpoint's items, or --item-ids, "
            "their original ids, one per line in the order of its rows"
        )
    dataset.check_item_ids()
    if tool == "gsasrec":
        ids = dataset.item_ids
        if ids.dtype == object or not 1 <= ids.min() <= ids.max() <= count:
            raise InputError(
                f"items of gSASRec are numbers 1..{count:,}, as in its files, but those of "
                f"{dataset.path} are like {ids[-1]}; pass --item-ids, their ids, one per line"
            )
        return np.arange(1, count + 1)
    if dataset.info.get("source") != "otto":
        raise InputError(
            f"{path} numbers items in the order of TRON's preparation, which {dataset.path} does "
            "not hold; pass its training sessions, such as --item-ids "
            f"datasets/{dataset.name}/{dataset.name}_train.jsonl, or a list of ids, one per line"
        )
    return np.arange(count)  # TRON adds 1 to OTTO's ids, which begin with 0


def _listed_ids(file: Path, count: int, path: Path) -> np.ndarray:
    try:
        lines = file.read_bytes().decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the item ids in {file}: {error}") from error
    lines = [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    if len(lines) != count:
        raise InputError(
            f"{file} has {len(lines):,} lines, but {path} has {count:,} items; expected the id of "
            "each, one per line in the order of its rows, without padding"
        )
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line or line in line_of:
            why = f"repeats line {line_of[line]}" if line else "is empty"
            raise InputError(f"{file}, line {number} {why}; expected one id per item")
        line_of[line] = number
    if all(re.fullmatch(r"0|-?[1-9]\d{0,17}", line) for line in lines):
        return np.array(lines, dtype=np.int64)
    return np.array(lines, dtype=object)


def _ids_by_sessions(file: Path, count: int, dataset: Dataset | None) -> np.ndarray:
    """Return the ids of TRON's items by comparing its sessions with those of the dataset.

    file: `{"session": ..., "events": [{"aid": ...}, ...]}` per line. Raises InputError.
    """
    if dataset is None:
        raise InputError(f"{file} is matched with the sessions of a dataset; pass --dataset")
    known: dict[str, np.ndarray] = {}
    for split in ("train", "val"):
        sessions, names = dataset.checked_split(split), dataset.session_ids(split)
        if names is None:
            raise InputError(
                f"{dataset.path} has no session ids to match those of {file} with; pass a list of "
                "item ids, one per line, with --item-ids"
            )
        for number, name in enumerate(names[np.arange(len(sessions))]):
            known[str(name)] = sessions[number]
    number_of_row = np.zeros(count + 1, np.int64)
    place = 0
    try:
        with file.open("rb") as lines:
            for line in lines:
                place += 1
                session = json.loads(line)
                items = known.get(str(session["session"]))
                rows = np.array([event["aid"] for event in session["events"]], np.int64)
                if items is None or len(items) != len(rows):
                    continue
                if rows.min() < 1 or rows.max() > count:
                    raise ValueError(f"item {rows.max()} of {count:,}")
                earlier = number_of_row[rows]
                if ((earlier > 0) & (earlier != items)).any():
                    raise ValueError(f"session {session['session']} is another in {dataset.path}")
                number_of_row[rows] = items
    except OSError as error:
        raise InputError(f"cannot read {file}: {error}") from error
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{file}, line {place} does not fit ({type(error).__name__}: {error!s:.100}); expected "
            "the training sessions that TRON prepared from the log of the dataset"
        ) from error
    unknown = int((number_of_row[1:] == 0).sum())
    if unknown:
        raise InputError(
            f"{unknown:,} of {count:,} items stand in no session that {file} and {dataset.path} "
            "share; prepare the dataset from the same log, with all of its validation sessions "
            "(--max-val-sessions)"
        )
    return dataset.item_ids[number_of_row[1:] - 1]
