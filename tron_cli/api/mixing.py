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

    weight: that of session-kNN, the one with the highest val_metric; None without session-kNN.
    metrics: validation figures of the model by measure. metrics_by_weight: those of all weights
    tried; 0.0 is the networks alone.
    """

    checkpoint: Path
    run_dir: Path
    weight: float | None
    metrics: dict[str, float]
    metrics_by_weight: dict[float, dict[str, float]]


@checked
def mix(
    *parts: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] = "datasets",
    output_dir: str | os.PathLike[str] | None = None,
    name: str | None = None,
    plugins: Sequence[str] = (),
    device: str | torch.device = "auto",
) -> MixResult:
    """Average the scores of networks, and add the votes of session-kNN.

    parts: two or more checkpoints or runs, of networks and of at most one model=session_knn,
    trained on the same dataset. Validation chooses the weight of session-kNN. The new checkpoint
    holds all parts. output_dir: the folder for the run's folder, `runs` by default; name: the name
    of the run's folder. plugins: code from outside tron that the networks need. device: auto, cpu,
    cuda or cuda:N.

    Raises InputError where the parts do not fit together, or validation is empty and must choose.

    >>> import tron_cli
    >>> knn = tron_cli.train("config_synthetic", dataset_name="shop", model="session_knn")
    >>> result = tron_cli.mix("runs/first", knn.run_dir, name="both")
    >>> result.metrics["R@20"] == max(each["R@20"] for each in result.metrics_by_weight.values())
    True
    """
    add_plugins(plugins)
    found = sorted_parts([load_checkpoint(Path(part)) for part in parts])
    dataset = Dataset.open(Path(data_dir) / found.networks[0].dataset["name"])
    check_dataset(found, dataset)
    parent = Path("runs" if output_dir is None else output_dir)
    place = claimed(new_run_dir(parent, name, "mixed", dataset.name), numbered=name is None)
    with place as run_dir, explained(run_dir / LOG):
        saved, values = mix_parts(found, dataset, run_dir, chosen_device(device))
    mixed = load_checkpoint(saved)
    weight = None if mixed.knn is None else mixed.knn["weight"]
    return MixResult(saved, run_dir, weight, mixed.metrics, {} if weight is None else values)
