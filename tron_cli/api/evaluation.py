"""`tron_cli.evaluate` and `tron_cli.compare`: exact figures of one checkpoint or of several."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from tron_cli.api.arguments import checked
from tron_cli.api.settings import add_plugins
from tron_cli.checkpoint import Checkpoint, load_checkpoint
from tron_cli.data.dataset import Dataset
from tron_cli.distributed.processes import PATIENCE_IN_RANKING, device_of_process, joined
from tron_cli.errors import InputError
from tron_cli.evaluation import compare as comparison
from tron_cli.evaluation.beyond_accuracy import BeyondAccuracy
from tron_cli.evaluation.compare import Difference, check_choice
from tron_cli.evaluation.evaluate import EvaluationOptions, assess
from tron_cli.ops.device import chosen_device

AnyPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Figure:
    """A mean over events and its standard error, clustered by session (None for one session).

    The last two count the predictions that preparation lost as misses; None where it lost none.
    """

    value: float
    stderr: float | None
    value_with_lost_as_misses: float | None = None
    stderr_with_lost_as_misses: float | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """Figures of a checkpoint, and what they are based on.

    metrics: a Figure for each measure, such as `metrics["R@20"].value`. checkpoint: the file.
    dataset, split: the data evaluated on. protocol: `every-step` or `last-item`. events, sessions,
    items: numbers of ranked events, of their sessions, and of the items that each is ranked among.
    filter_rated: True if items of the history could not be recommended. left_out: counts of the
    events that were not predicted, by reason. beyond_accuracy: figures of lists of `cutoff` items,
    if requested. slices: figures by kind of slice, if requested. references: figures of reference
    rankings stored with the dataset. report: the object that `tron evaluate --json` prints, with
    all of this and more.
    """

    metrics: dict[str, Figure]
    checkpoint: Path
    dataset: str
    split: str
    protocol: str
    events: int
    sessions: int
    items: int
    filter_rated: bool
    left_out: dict[str, int]
    beyond_accuracy: BeyondAccuracy | None
    slices: dict[str, dict[str, Any]]
    references: dict[str, dict[str, float]]
    report: dict[str, Any] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, as `tron evaluate --json` prints it."""
        return copy.deepcopy(self.report)


@dataclass(frozen=True)
class ComparedModel:
    """Figures of one of the compared checkpoints.

    differences: the mean difference from the reference for each measure, with its confidence
    interval; empty for the reference itself. beyond_accuracy: None where cutoff is 0.
    """

    checkpoint: Path
    metrics: dict[str, Figure]
    differences: dict[str, Difference]
    beyond_accuracy: BeyondAccuracy | None


@dataclass(frozen=True)
class ComparisonResult:
    """Figures of several checkpoints on the same events.

    models: by a short label, the reference first. reference: its label. confidence: level of the
    intervals. cutoff: length of the lists for the beyond-accuracy figures. report: the object that
    `tron compare --json` prints. The other fields are those of EvaluationResult.
    """

    models: dict[str, ComparedModel]
    reference: str
    confidence: float
    cutoff: int
    dataset: str
    split: str
    protocol: str
    events: int
    sessions: int
    items: int
    filter_rated: bool
    left_out: dict[str, int]
    report: dict[str, Any] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, as `tron compare --json` prints it."""
        return copy.deepcopy(self.report)


@checked
def evaluate(
    checkpoint: AnyPath,
    *,
    dataset: str | Dataset | None = None,
    data_dir: AnyPath = "datasets",
    split: Literal["test", "val"] = "test",
    protocol: Literal["every-step", "last-item"] | None = None,
    metrics: str | Sequence[str] | None = None,
    filter_rated: bool | None = None,
    full_sessions: bool = False,
    one_pass: bool = False,
    limit_sessions: int | None = None,
    sample_sessions: int | None = None,
    seed: int | None = None,
    drop_unknown: bool = False,
    by: Sequence[Literal["length", "position", "popularity", "repeat"]] = (),
    cutoff: int = 0,
    run: AnyPath | None = None,
    qrels: AnyPath | None = None,
    per_event: AnyPath | None = None,
    table_sharding: Literal["none", "rows"] = "none",
    plugins: Sequence[str] = (),
    device: str | torch.device = "auto",
) -> EvaluationResult:
    """Rank the target of each event among the whole catalogue, exactly.

    checkpoint: a .pt file, or the folder of a run. dataset: a prepared dataset or its name in
    data_dir; the checkpoint's by default. The other options are those of `tron evaluate`: metrics
    such as "R@20 nDCG@10" or a list of them; by: slices to report as well; cutoff: the length of
    lists for coverage, popularity, novelty and serendipity, 0 for none; run, qrels, per_event:
    files to write.

    Processes that torchrun starts rank the events together; the first one writes the files, and all
    return the same result. table_sharding: with "rows" each of them holds only an equal part of the
    item tables; figures, but not lists, of tables larger than one device.

    Raises InputError where checkpoint, dataset and options do not fit together or a file is
    missing, and RunError where scores are not finite.

    >>> import tron_cli
    >>> result = tron_cli.evaluate("runs/first", metrics=["R@5", "R@20"])
    >>> result.metrics["R@5"].value <= result.metrics["R@20"].value
    True
    >>> result.protocol, result.dataset
    ('every-step', 'shop')
    """
    add_plugins(plugins)
    loaded = load_checkpoint(Path(checkpoint))
    opened = _opened(dataset, loaded, Path(data_dir))
    options = EvaluationOptions(
        split=split,
        protocol=protocol,
        metrics=_measures(metrics),
        filter_rated=filter_rated,
        full_sessions=full_sessions,
        one_pass=one_pass,
        limit_sessions=_at_least(1, "limit_sessions", limit_sessions),
        sample_sessions=_at_least(1, "sample_sessions", sample_sessions),
        seed=_at_least(0, "seed", seed),
        run=_path(run),
        qrels=_path(qrels),
        per_event=_path(per_event),
        by=tuple(dict.fromkeys(by)),
        cutoff=cutoff,
        drop_unknown=drop_unknown,
        table_sharding=table_sharding,
    )
    used_device = device_of_process(chosen_device(device))
    with joined(used_device, PATIENCE_IN_RANKING) as processes:
        report = assess(loaded, opened, options, used_device, processes)
    return EvaluationResult(
        metrics=_figures(report),
        checkpoint=Path(report["checkpoint"]),
        beyond_accuracy=_beyond_accuracy(report),
        slices=report.get("slices", {}),
        references=report.get("references", {}),
        report=report,
        **_covered(report),
    )


@checked
def compare(
    checkpoints: Sequence[AnyPath],
    *,
    dataset: str | Dataset | None = None,
    data_dir: AnyPath = "datasets",
    reference: int = 1,
    split: Literal["test", "val"] = "test",
    protocol: Literal["every-step", "last-item"] | None = None,
    metrics: str | Sequence[str] | None = None,
    filter_rated: bool | None = None,
    full_sessions: bool = False,
    limit_sessions: int | None = None,
    sample_sessions: int | None = None,
    seed: int | None = None,
    drop_unknown: bool = False,
    cutoff: int | None = None,
    plugins: Sequence[str] = (),
    device: str | torch.device = "auto",
) -> ComparisonResult:
    """Compare checkpoints on the same events, with confidence intervals of paired differences.

    checkpoints: two or more .pt files or folders of runs. reference: the number, from 1, of the
    checkpoint that the others are compared with. dataset: a prepared dataset or its name in
    data_dir; the reference's by default. The other options are those of `tron compare`. Processes
    that torchrun starts rank the events together, and all return the same result.

    Raises InputError where the checkpoints cannot be compared on the dataset.

    >>> import tron_cli
    >>> baseline = tron_cli.train("config_synthetic", dataset_name="shop", model="popular")
    >>> result = tron_cli.compare([baseline.run_dir, "runs/first"], cutoff=0)
    >>> difference = result.models["first"].differences["R@20"]
    >>> difference.low <= difference.value <= difference.high
    True
    """
    check_choice(len(checkpoints), reference)
    add_plugins(plugins)
    loaded = [load_checkpoint(Path(path)) for path in checkpoints]
    opened = _opened(dataset, loaded[reference - 1], Path(data_dir))
    options = EvaluationOptions(
        split=split,
        protocol=protocol,
        metrics=_measures(metrics),
        filter_rated=filter_rated,
        full_sessions=full_sessions,
        limit_sessions=_at_least(1, "limit_sessions", limit_sessions),
        sample_sessions=_at_least(1, "sample_sessions", sample_sessions),
        seed=_at_least(0, "seed", seed),
        drop_unknown=drop_unknown,
    )
    used_device = device_of_process(chosen_device(device))
    with joined(used_device, PATIENCE_IN_RANKING) as processes:
        report = comparison.compare(
            loaded, opened, options, used_device,
            reference=reference - 1, cutoff=cutoff, processes=processes,
        )  # fmt: skip
    models = {
        label: ComparedModel(
            Path(found["checkpoint"]),
            _figures(found),
            {name: Difference(**each) for name, each in found.get("differences", {}).items()},
            _beyond_accuracy(found),
        )
        for label, found in report["models"].items()
    }
    return ComparisonResult(
        models=models,
        reference=report["reference"],
        confidence=report["confidence"],
        cutoff=report["cutoff"],
        report=report,
        **_covered(report),
    )


def _opened(dataset: str | Dataset | None, checkpoint: Checkpoint, data_dir: Path) -> Dataset:
    if isinstance(dataset, Dataset):
        return dataset
    return Dataset.open(data_dir / (checkpoint.dataset["name"] if dataset is None else dataset))


def _measures(metrics: str | Sequence[str] | None) -> str | None:
    return metrics if metrics is None or isinstance(metrics, str) else " ".join(metrics)


def _at_least(low: int, name: str, number: int | None) -> int | None:
    if number is not None and number < low:
        raise InputError(f"{name} must be at least {low}, got {number}")
    return number


def _path(path: AnyPath | None) -> Path | None:
    return None if path is None else Path(path)


def _figures(report: Mapping[str, Any]) -> dict[str, Figure]:
    return {name: Figure(**figure) for name, figure in report["metrics"].items()}


def _beyond_accuracy(report: Mapping[str, Any]) -> BeyondAccuracy | None:
    found = report.get("beyond_accuracy")
    return None if found is None else BeyondAccuracy(**{"intersection": None, **found})


def _covered(report: Mapping[str, Any]) -> dict[str, Any]:
    sizes = ("events", "sessions", "items")
    names = ("dataset", "split", "protocol", *sizes, "filter_rated", "left_out")
    return {name: report[name] for name in names}
