"""Warm start of a model from an earlier checkpoint, also on another catalogue."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from tron_cli.checkpoint import Checkpoint, load_checkpoint
from tron_cli.config import ExperimentConfig
from tron_cli.data.catalogue import numbers_among
from tron_cli.data.dataset import Dataset
from tron_cli.data.integrity import sha256_of_file
from tron_cli.errors import InputError, counted
from tron_cli.models.base import Model
from tron_cli.registry import MODELS, settings_of

# Settings of networks that change neither the weights nor the function that they compute.
_OF_TRAINING = {"dropout_rate", "attention_dropout_rate", "initialization", "train_batch_size"}
# Buffers that are not learned weights: the states of session-parallel lanes.
_STATES = {"carried_LBD"}

log = logging.getLogger("tron")


def start_from(
    path: Path, model: Model, config: ExperimentConfig, dataset: Dataset
) -> dict[str, Any]:
    """Copy the weights of a checkpoint (or of a run's best one) into a new model on the CPU.

    Items are matched by original id. Those that the checkpoint lacks keep the rows that they have
    in `model`; rows that are no items, and all other weights, are copied. Returns the record that
    the new checkpoints keep of it: file, sha256, dataset and step of the checkpoint, and the counts
    kept_items, new_items and dropped_items. Raises InputError where the weights do not fit.
    """
    earlier = load_checkpoint(path)
    if earlier.is_mixed:
        raise InputError(
            f"{earlier.path} is a mixed model, and a run starts from the weights of one network; "
            f"name one that it was made of: {' '.join(earlier.network_files) or 'its networks'}"
        )
    _check_settings(earlier, model, config)
    old_ids = earlier.decoded_item_ids()
    old_of_new = torch.from_numpy(numbers_among(old_ids, dataset.item_ids)).long()
    kept = int((old_of_new > 0).sum())
    if not kept:
        raise InputError(
            f"none of the {dataset.num_items:,} items of {dataset.path} is among the "
            f"{len(old_ids):,} of {earlier.path}; start from a checkpoint of the same item ids, or "
            "leave out --init-from"
        )
    source = earlier.build_model(torch.device("cpu"))
    tables = {source.item_embedding.weight.data_ptr(), source.item_table.data_ptr()}
    old_I, new_I = old_of_new[old_of_new > 0], (old_of_new > 0).nonzero()[:, 0] + 1
    learned = source.state_dict()
    with torch.no_grad():
        for name, values in model.state_dict().items():
            if learned[name].data_ptr() in tables:
                values[new_I] = learned[name][old_I]
                values[0] = learned[name][0]
                # A mask, where the model has one.
                values[dataset.num_items + 1 :] = learned[name][len(old_ids) + 1 :]
            elif name not in _STATES and values.shape == learned[name].shape:
                values.copy_(learned[name])
            elif name not in _STATES:
                raise InputError(
                    f"{name} is {list(learned[name].shape)} in {earlier.path} but "
                    f"{list(values.shape)} in the new run, and is no table of items of "
                    f"model={config.model}; leave out --init-from"
                )
    _warn_of_known_validation(earlier, dataset)
    dropped = len(old_ids) - kept
    log.info(
        "started from %s: embeddings of %s are kept, %s new, %s of its items dropped",
        earlier.path, counted(kept, "item"), f"{dataset.num_items - kept:,}", f"{dropped:,}",
    )  # fmt: skip
    return {
        "file": str(earlier.path),
        "sha256": sha256_of_file(earlier.path),
        "dataset": earlier.dataset["name"],
        "step": earlier.step,
        "kept_items": kept,
        "new_items": dataset.num_items - kept,
        "dropped_items": dropped,
    }


def _warn_of_known_validation(earlier: Checkpoint, dataset: Dataset) -> None:
    """Warn where a final model was trained on the sessions that are to validate."""
    val = dataset.split_info("val")
    if val["sessions"] and earlier.dataset.get("val_fingerprint") == val["fingerprint"]:
        log.warning(
            "%s was trained on the validation sessions of %s, so that validation figures will be "
            "too high and choose too few steps; start from the run that it came from, or prepare "
            "newer sessions",
            earlier.path, dataset.path,
        )  # fmt: skip


def _check_settings(earlier: Checkpoint, model: Model, config: ExperimentConfig) -> None:
    """Raise InputError where the checkpoint's network computes another function of its weights."""
    if earlier.config.model != config.model:
        raise InputError(
            f"{earlier.path} holds model={earlier.config.model}, but the new run has "
            f"model={config.model}; pass model={earlier.config.model}, or start from a checkpoint "
            f"of {config.model}"
        )
    ignored = _OF_TRAINING | {"num_items"}
    depends_on_window = (
        getattr(model, "position_embedding", None) is not None
        or config.relative_positions
        or config.block == "bsarec"
        or not config.key_padding_mask
    )
    if not depends_on_window:
        ignored = ignored | {"sequence_length"}  # how far training and prediction look back
    theirs, ours = (
        settings_of(MODELS[of.model], of, num_items=0, reuse_item_embeddings=of.shares_table)
        for of in (earlier.config, config)
    )
    for name in sorted(ours.keys() - ignored):
        if theirs[name] != ours[name]:
            raise InputError(
                f"{earlier.path} was trained with {name}={theirs[name]}, but the new run has "
                f"{name}={ours[name]}; pass {name}={theirs[name]} to start from it, or leave out "
                "--init-from"
            )
