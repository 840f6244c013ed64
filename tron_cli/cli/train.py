"""`tron train`: train a model or fit a baseline, in a new run or a resumed one."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tron_cli.cli.device import training_device
from tron_cli.cli.options import (
    CONFIG_HELP,
    DATASETS,
    AsJson,
    DataDir,
    Device,
    Overrides,
    Plugins,
    config_names,
)
from tron_cli.errors import InputError, RunError, explained

if TYPE_CHECKING:
    from tron_cli.config import ExperimentConfig
    from tron_cli.data.dataset import Dataset
    from tron_cli.training.profile import StepProfiler


def train(
    overrides: Overrides = None,
    config: Annotated[
        str | None, typer.Option(help=CONFIG_HELP, autocompletion=config_names)
    ] = None,
    data_dir: DataDir = DATASETS,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder that the run's folder is made in; default: runs.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to resume.")] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            metavar="CKPT",
            help="Start from the weights of a checkpoint or run, matching items by original id.",
        ),
    ] = None,
    profile: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Profile N steps after a short warm-up, print where the time goes, and stop: "
            "trace.json in the run's folder is a Chrome trace, and --resume continues the run.",
        ),
    ] = None,
    plugin: Plugins = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Train a model or fit a baseline.

    The checkpoint with the best validation figure is kept beside the last one.
    """
    from tron_cli.checkpoint import load_checkpoint
    from tron_cli.training.profile import StepProfiler

    profiler = None if profile is None else StepProfiler(profile)
    saved = run_training(
        config, overrides or [], data_dir, output_dir, name, resume, device, profiler, init_from
    )
    if profiler is not None:
        if profiler.result is None:
            raise RunError("the run stopped early, before all steps were profiled; profile fewer")
        found = profiler.result
        shown = {"checkpoint": str(saved), "profile": found.as_json()}
        print(json.dumps(shown) if as_json else found.as_text())
    elif as_json:
        metrics = load_checkpoint(saved).metrics
        print(json.dumps({"checkpoint": str(saved), "validation": metrics}))
    else:
        print(saved)


def run_training(
    config_name: str | None,
    overrides: list[str],
    data_dir: Path,
    output_dir: Path | None = None,
    name: str | None = None,
    resume: Path | None = None,
    device_name: str = "auto",
    profiler: StepProfiler | None = None,
    init_from: Path | None = None,
) -> Path:
    """Train as `tron train` does; return the best checkpoint, or the last one after profiling."""
    from tron_cli.config import load_config
    from tron_cli.data.dataset import Dataset
    from tron_cli.training.fit import fit
    from tron_cli.training.loop import train as train_model
    from tron_cli.training.run import LOG, claimed

    if (config_name is None) == (resume is None):
        raise InputError(
            "give either --config NAME for a new run or --resume RUN_DIR for an old one"
        )
    if resume is not None and (name is not None or output_dir is not None):
        raise InputError("a resumed run stays in its folder; leave out --name and --output-dir")
    if resume is not None and init_from is not None:
        raise InputError("a resumed run has its weights already; leave out --init-from")
    if resume is not None:
        place = claimed(resume, resume=True)
    else:
        assert config_name is not None
        experiment, _ = load_config(config_name, overrides)
        dataset = Dataset.open(data_dir / experiment.dataset_name)
        run_dir = _run_dir(output_dir or Path("runs"), name, experiment)
        place = claimed(run_dir, numbered=name is None)
    device = training_device(device_name, config_name)
    with place as run_dir, explained(run_dir / LOG):
        if resume is not None:
            experiment, dataset = _resumed(resume, overrides, data_dir)
        if not experiment.is_baseline:
            return train_model(
                experiment, dataset, run_dir, device=device, resume=resume is not None,
                profiler=profiler, init_from=init_from,
            )  # fmt: skip
        if init_from is not None:
            raise InputError(
                f"model={experiment.model} is fitted anew and has no weights to start from; leave "
                "out --init-from"
            )
        if profiler is not None:
            raise InputError(
                f"model={experiment.model} is fitted at once and has no steps to profile; leave "
                "out --profile"
            )
        return fit(experiment, dataset, run_dir)


def _resumed(
    run_dir: Path, overrides: list[str], data_dir: Path
) -> tuple[ExperimentConfig, Dataset]:
    """Return the configuration and the dataset of a run to resume."""
    from tron_cli.checkpoint import LAST, dataset_identity, load_checkpoint
    from tron_cli.config import parse_overrides
    from tron_cli.data.dataset import Dataset

    checkpoint = load_checkpoint(run_dir / LAST)
    changes = parse_overrides(overrides)
    fixed = sorted(set(changes) - {"max_epochs", "early_stopping_patience"})
    if fixed:
        raise InputError(
            f"a resumed run keeps its settings; only max_epochs and early_stopping_patience "
            f"can change, not {', '.join(fixed)}"
        )
    dataset = Dataset.open(data_dir / checkpoint.config.dataset_name)
    if checkpoint.dataset != dataset_identity(dataset):
        raise InputError(
            f"the run in {run_dir} was trained on another version of {dataset.path}; prepare the "
            "dataset as it was, or start a new run"
        )
    return dataclasses.replace(checkpoint.config, **changes), dataset


def _run_dir(output_dir: Path, name: str | None, config: ExperimentConfig) -> Path:
    """Return the folder of a new run, named by the user or after its time of start."""
    if name is not None and not re.fullmatch(r"\w[\w.+=-]*", name):
        raise InputError(
            f"--name must be a folder name of letters, digits and _ . + = -, got {name!r}"
        )
    stamp = f"{config.method}-{config.dataset_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return output_dir / (name or stamp)
