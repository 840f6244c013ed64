"""`tron_cli.train`: train a model or fit a baseline, in a new run or a resumed one."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tron_cli.api.arguments import checked
from tron_cli.api.settings import add_plugins, load_config
from tron_cli.checkpoint import dataset_identity, load_checkpoint
from tron_cli.config import ExperimentConfig, requested_accelerator
from tron_cli.data.dataset import Dataset
from tron_cli.data.final import TrainAndValidation
from tron_cli.distributed.processes import Processes, device_of_process, joined
from tron_cli.errors import InputError, RunError, explained
from tron_cli.files import LAST
from tron_cli.ops.device import chosen_device
from tron_cli.training.final import final_start
from tron_cli.training.fit import fit
from tron_cli.training.loop import train as train_model
from tron_cli.training.profile import Profile, StepProfiler
from tron_cli.training.restart import claimed_again
from tron_cli.training.run import LOG, claimed, last_logged

log = logging.getLogger("tron")


@dataclass(frozen=True)
class TrainingResult:
    """A run and its best checkpoint.

    checkpoint: the weights that scored highest on validation; the last weights where validation is
    empty, and last.pt after profiling. run_dir: the folder of the run. metrics: validation figures
    of the checkpoint by measure. step: training steps of the checkpoint's weights. steps, epochs:
    those of the whole run, including an unfinished last epoch; 0 for a baseline. profile: where the
    time of a step goes, if requested.
    """

    checkpoint: Path
    run_dir: Path
    metrics: dict[str, float]
    step: int
    steps: int
    epochs: int
    profile: Profile | None = None


@checked
def train(
    config: str | os.PathLike[str] | ExperimentConfig | None = None,
    *,
    data_dir: str | os.PathLike[str] = "datasets",
    output_dir: str | os.PathLike[str] | None = None,
    name: str | None = None,
    resume: str | os.PathLike[str] | None = None,
    init_from: str | os.PathLike[str] | None = None,
    final: str | os.PathLike[str] | None = None,
    profile: int | None = None,
    plugins: Sequence[str] = (),
    device: str | torch.device = "auto",
    **settings: Any,
) -> TrainingResult:
    """Train a model, keeping the best checkpoint by validation, or fit a baseline.

    config: the name of a packaged config, a Python file, one of otto-de/TRON's JSON files, or an
    ExperimentConfig; settings override it. output_dir: the folder for the run's folder, `runs` by
    default; name: the name of the run's folder. resume: the folder of a run to continue,
    instead of a config; of its settings only max_epochs and early_stopping_patience can change.
    init_from: a checkpoint or run whose weights a new run starts with, items matched by original
    id. final: a run or its best checkpoint, instead of a config; trains with its settings, of which
    only seed can change, on the validation sessions too, for as many steps as validation chose.
    profile: profile this many steps, and stop. plugins: code from outside tron that the config
    names. device: auto, cpu, cuda or cuda:N.

    Processes that torchrun starts train together, each on rows of every batch; the first one writes
    the run's folder, which the others can read.

    In the main thread, Ctrl-C and SIGTERM end the training after the current step, which is saved,
    with a RunError; in other threads signals are left alone. A process trains one model at a time.

    Raises InputError where config, dataset and options do not fit together or a file is missing,
    and RunError where training fails.

    >>> import tron_cli
    >>> result = tron_cli.train("config_synthetic", dataset_name="shop", max_epochs=1, name="first")
    >>> result.run_dir.as_posix(), result.epochs, "R@20" in result.metrics
    ('runs/first', 1, True)
    """
    _check_together(config, resume, final, init_from, name, output_dir, settings)
    add_plugins(plugins)
    if profile is not None and profile < 1:
        raise InputError(f"profile must be a number of steps, at least 1, got {profile}")
    profiler = None if profile is None else StepProfiler(profile)
    datasets = Path(data_dir)
    earlier = None if init_from is None else Path(init_from)
    record = None
    if resume is not None:
        place = claimed(Path(resume), resume=True)
    else:
        if final is not None:
            start = final_start(Path(final), datasets, earlier)
            experiment, dataset = load_config(start.config, **settings), start.dataset
            earlier, record = start.init_from, start.record
        else:
            assert config is not None
            experiment = load_config(config, **settings)
            dataset = Dataset.open(datasets / experiment.dataset_name)
        parent = Path("runs" if output_dir is None else output_dir)
        place = claimed_again(
            new_run_dir(parent, name, experiment.method, experiment.dataset_name),
            numbered=name is None,
            settings={"config": asdict(experiment), "final": record, "init_from": str(init_from)},
        )
    used_device = device_of_process(training_device(device, config))
    with (
        joined(used_device) as processes,
        _claimed_once(place, processes) as run_dir,
        explained(run_dir / LOG),
    ):
        resumes = (run_dir / LAST).is_file()  # also after a restart by torchrun
        if resumes:
            changes = {} if resume is None else settings
            experiment, dataset = _resumed(run_dir, changes, datasets)
        if not experiment.is_baseline:
            saved = train_model(
                experiment, dataset, run_dir, device=used_device, resume=resumes,
                profiler=profiler, init_from=earlier, final=record, processes=processes,
            )  # fmt: skip
        else:
            _check_fitted(experiment.model, processes, earlier, profiler)
            saved = fit(experiment, dataset, run_dir, final=record)
    if profiler is not None and profiler.result is None:
        raise RunError("the run stopped early, before all steps were profiled; profile fewer")
    checkpoint = load_checkpoint(saved)
    steps, epochs = (0, 0) if experiment.is_baseline else last_logged(run_dir)
    return TrainingResult(
        checkpoint=saved,
        run_dir=run_dir,
        metrics=checkpoint.metrics,
        step=checkpoint.step,
        steps=steps,
        epochs=epochs,
        profile=None if profiler is None else profiler.result,
    )


def _check_fitted(
    model: str, processes: Processes, init_from: Path | None, profiler: StepProfiler | None
) -> None:
    """Raise InputError where a baseline is to be trained in a way that only networks are."""
    for given, why in (
        (processes.count > 1, "at once, by one process; leave out torchrun"),
        (init_from is not None, "anew and has no weights to start from; leave out --init-from"),
        (profiler is not None, "at once and has no steps to profile; leave out --profile"),
    ):
        if given:
            raise InputError(f"model={model} is fitted {why}")


@contextmanager
def _claimed_once(place: AbstractContextManager[Path], processes: Processes) -> Iterator[Path]:
    """Claim the folder of a run in the first of several processes, and name it to the others."""
    with ExitStack() as stack:
        yield processes.of_first(lambda: stack.enter_context(place))


def _check_together(
    config: object,
    resume: object,
    final: object,
    init_from: object,
    name: object,
    output_dir: object,
    settings: dict[str, Any],
) -> None:
    """Raise InputError where the arguments of `train` exclude each other."""
    if [config, resume, final].count(None) != 2:
        raise InputError(
            "give either --config NAME for a new run, --resume RUN_DIR for an old one, or --final "
            "RUN_DIR for a final model of one"
        )
    if resume is not None and (name is not None or output_dir is not None):
        raise InputError("a resumed run stays in its folder; leave out --name and --output-dir")
    if resume is not None and init_from is not None:
        raise InputError("a resumed run has its weights already; leave out --init-from")
    fixed = sorted(set(settings) - {"seed"})
    if final is not None and fixed:
        raise InputError(
            "a final model keeps the settings that were validated, except the seed; leave out "
            f"{fixed[0]}"
        )


def training_device(
    device: str | torch.device, config: str | os.PathLike[str] | ExperimentConfig | None
) -> torch.device:
    """Return the device to train on; auto follows the config's accelerator, where it has one."""
    accelerator = "auto"
    if device == "auto" and isinstance(config, str | os.PathLike):
        accelerator = requested_accelerator(os.fspath(config))
    found = chosen_device("cpu" if accelerator == "cpu" else device)
    if accelerator == "gpu" and found.type == "cpu":
        log.info("accelerator is gpu, but there is none here: training on the CPU")
    return found


def _resumed(
    run_dir: Path, changes: dict[str, Any], data_dir: Path
) -> tuple[ExperimentConfig, Dataset]:
    """Return the configuration and the dataset of a run to resume."""
    checkpoint = load_checkpoint(run_dir / LAST)
    fixed = sorted(set(changes) - {"max_epochs", "early_stopping_patience"})
    if fixed:
        raise InputError(
            f"a resumed run keeps its settings; only max_epochs and early_stopping_patience "
            f"can change, not {', '.join(fixed)}"
        )
    dataset = Dataset.open(data_dir / checkpoint.config.dataset_name)
    if "final" in checkpoint.origin:
        if "max_epochs" in changes:
            raise InputError(
                "a final model takes as many steps as validation chose; leave out max_epochs"
            )
        dataset = TrainAndValidation(dataset)
    if checkpoint.dataset != dataset_identity(dataset):
        raise InputError(
            f"the run in {run_dir} was trained on another version of {dataset.path}; prepare the "
            "dataset as it was, or start a new run"
        )
    return load_config(checkpoint.config, **changes), dataset


def new_run_dir(output_dir: Path, name: str | None, method: str, dataset_name: str) -> Path:
    """Return the folder of a new run, named by the user or after its time of start."""
    if name is not None and not re.fullmatch(r"\w[\w.+=-]*", name):
        raise InputError(
            f"--name must be a folder name of letters, digits and _ . + = -, got {name!r}"
        )
    stamp = f"{method}-{dataset_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return output_dir / (name or stamp)
