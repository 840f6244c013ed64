"""Start of a final model: validated settings and steps, for training and validation sessions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tron_cli.checkpoint import Checkpoint, dataset_identity, load_checkpoint
from tron_cli.config import ExperimentConfig
from tron_cli.data.dataset import Dataset
from tron_cli.data.final import TrainAndValidation
from tron_cli.data.integrity import sha256_of_file
from tron_cli.errors import InputError


@dataclasses.dataclass(frozen=True)
class FinalStart:
    """Settings and sessions of a final model.

    init_from: the checkpoint that the validated run started from, if any. record: facts that the
    final model's checkpoints keep of the validated one: file, sha256, metrics, steps and
    steps_per_epoch.
    """

    config: ExperimentConfig
    dataset: Dataset
    init_from: Path | None
    record: dict[str, Any]


def final_start(path: Path, data_dir: Path, init_from: Path | None = None) -> FinalStart:
    """Return the start of a final model from the best checkpoint of a run, or its folder.

    It takes as many steps as that checkpoint, with the same learning rates. init_from: the current
    path of the checkpoint that the run started from. Raises InputError where nothing was validated,
    or a dataset or checkpoint has changed.
    """
    checkpoint = load_checkpoint(path)
    _check_validated(checkpoint)
    original = Dataset.open(data_dir / checkpoint.config.dataset_name)
    if checkpoint.dataset != dataset_identity(original):
        raise InputError(
            f"{checkpoint.path} was trained on another version of {original.path}; prepare the "
            "dataset as it was, or validate anew: tron train --config, then --final"
        )
    config, steps_per_epoch = checkpoint.config, 0
    if not config.is_baseline:
        steps_per_epoch = checkpoint.step // (checkpoint.epoch + 1)
        config = dataclasses.replace(config, max_batches_per_epoch=steps_per_epoch)
    return FinalStart(
        config,
        TrainAndValidation(original),
        _init_from(checkpoint, init_from),
        {
            "file": str(checkpoint.path),
            "sha256": sha256_of_file(checkpoint.path),
            "metrics": checkpoint.metrics,
            "steps": checkpoint.step,
            "steps_per_epoch": steps_per_epoch,
        },
    )


def _check_validated(checkpoint: Checkpoint) -> None:
    path, config = checkpoint.path, checkpoint.config
    if checkpoint.is_mixed:
        raise InputError(
            f"{path} is a mixed model, which `tron mix` makes of trained ones; train final models "
            f"of its parts, and mix these: {' '.join(checkpoint.parts) or 'its networks'}"
        )
    if "final" in checkpoint.origin:
        raise InputError(f"{path} is of a final model already; name the run that it came from")
    if checkpoint.training:
        raise InputError(
            f"{path} holds the latest weights of a run, not those that validation chose; name the "
            "run's folder or its best checkpoint"
        )
    if config.overfit_batches:
        raise InputError(
            f"{path} was trained on {config.overfit_batches} batches alone (overfit_batches), which"
            " says nothing of a final model; validate a run without it first"
        )
    if not config.is_baseline and not (checkpoint.metrics and checkpoint.step):
        raise InputError(
            f"{path} was not chosen by validation, so it does not tell how many steps to train; "
            "name the run of `tron train` that validated"
        )


def _init_from(checkpoint: Checkpoint, given: Path | None) -> Path | None:
    """Return the path of the checkpoint that the validated run started from."""
    record = checkpoint.origin.get("init_from")
    if record is None:
        if given is not None:
            raise InputError(
                f"{checkpoint.path} was trained from scratch, and so is its final model; leave out "
                "--init-from, or validate a run with it first"
            )
        return None
    path = Path(record["file"]) if given is None else given
    if path.is_dir():
        path = load_checkpoint(path).path
    if not path.is_file() or sha256_of_file(path) != record["sha256"]:
        raise InputError(
            f"{checkpoint.path} was trained from {record['file']}, and {path} is "
            f"{'another file' if path.is_file() else 'not there'}; name it with --init-from"
        )
    return path
