"""`tron_cli.mix`: join networks, and session-kNN, in one model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tron_cli.api.arguments import checked
from tron_cli.api.settings import add_plugins
from tron_cli.api.training import new_run_dir
from tron_cli.checkpoint import load_checkpoint
from tron_cli.data.dataset import Dataset
from tron_cli.errors import explained
from tron_cli.ops.device import chosen_device
from tron_cli.training.mix import check_dataset, sorted_parts
from tron_cli.training.mix import mix as mix_parts
from tron_cli.training.run import LOG, claimed


@dataclass(frozen=True)
class MixResult:
    """A mixed model's run and checkpoint.

    weight: that of session-kNN, the one with the highest val_metric unless it was given; None
    without session-kNN. metrics: validation figures of the model by measure, empty without
    validation. metrics_by_weight: those of all weights tried; 0.0 is the networks alone.
    """

    checkpoint: Path
    run_dir: Path
    weight: float | None
    metrics: dict[str, float]
    metrics_by_weight: dict[float, dict[str, float]]


@checked
def mix(
    *parts: str | os.PathLike[str],
    weight: float | None = None,
    data_dir: str | os.PathLike[str] = "datasets",
    output_dir: str | os.PathLike[str] | None = None,
    name: str | None = None,
    plugins: Sequence[str] = (),
    device: str | torch.device = "auto",
) -> MixResult:
    """Average the scores of networks, and add the votes of session-kNN.

    parts: two or more checkpoints or runs, of networks and of at most one model=session_knn,
    trained on the same dataset. The new checkpoint holds all of them. weight: that of session-kNN,
    from 0 to 256; chosen on validation by default. Final models can be mixed with each other, with
    a given weight and without validation figures. output_dir: the folder for the run's folder,
    `runs` by default; name: the name of the run's folder. plugins: code from outside tron that the
    networks need. device: auto, cpu, cuda or cuda:N.

    Raises InputError where the parts do not fit together, or validation is empty and must choose.

    >>> import tron_cli
    >>> knn = tron_cli.train("config_synthetic", dataset_name="shop", model="session_knn")
    >>> result = tron_cli.mix("runs/first", knn.run_dir, name="both")
    >>> result.metrics["R@20"] == max(each["R@20"] for each in result.metrics_by_weight.values())
    True
    """
    add_plugins(plugins)
    found = sorted_parts([load_checkpoint(Path(part)) for part in parts], weight)
    dataset_name, dataset = found.networks[0].dataset["name"], None
    if not found.are_final:
        dataset = Dataset.open(Path(data_dir) / dataset_name)
        check_dataset(found, dataset, weight)
    parent = Path("runs" if output_dir is None else output_dir)
    place = claimed(new_run_dir(parent, name, "mixed", dataset_name), numbered=name is None)
    with place as run_dir, explained(run_dir / LOG):
        saved, values = mix_parts(found, dataset, run_dir, chosen_device(device), weight=weight)
    mixed = load_checkpoint(saved)
    if mixed.knn is None:
        return MixResult(saved, run_dir, None, mixed.metrics, {})
    return MixResult(saved, run_dir, mixed.knn["weight"], mixed.metrics, values)
