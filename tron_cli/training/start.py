"""Start of a training: everything that the loop needs before its first step."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tron_cli.checkpoint import LAST, Checkpoint, encode_item_ids, load_checkpoint
from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import Batch
from tron_cli.data.dataset import Dataset, Sessions, count_events
from tron_cli.data.shares import share_of
from tron_cli.distributed.processes import ALONE, Processes
from tron_cli.distributed.tables import TableShard
from tron_cli.errors import InputError, counted
from tron_cli.models.base import Model, build_model
from tron_cli.models.tables import dividing_tables
from tron_cli.registry import CATALOGUE_LOSSES, SAMPLERS, load, settings_of
from tron_cli.sampling.negatives import Distribution
from tron_cli.training.averaging import add_to_average
from tron_cli.training.divided import resumed
from tron_cli.training.feed import build_feed, expected_in_batch, windows_of
from tron_cli.training.graphs import CUDARecorder, GraphedSteps
from tron_cli.training.optim import faster_adam, learning_rate, optimizer_of
from tron_cli.training.profile import StepProfiler
from tron_cli.training.run import Progress, RunFolder
from tron_cli.training.step import accumulated_step, seed_generators, training_step
from tron_cli.training.validation import validate, with_measures
from tron_cli.training.warm_start import start_from

log = logging.getLogger("tron")


@dataclasses.dataclass(frozen=True)
class Training:
    """A training that is ready for its next step.

    config: the settings, resolved. run: the folder, the model, the optimizer and the progress.
    prepare: makes the batches of a step, on the CPU. take_step: takes a step on them, and returns
    their loss. total_steps: length of the learning rate's schedule. last_step: number of the last
    step; for a final model it may come before the end of the schedule.
    """

    config: ExperimentConfig
    run: RunFolder
    validation: Sessions
    measures: list[Any]
    prepare: Callable[[int], list[Batch]]
    take_step: Callable[[list[Batch]], torch.Tensor]
    steps_per_epoch: int
    total_steps: int
    last_step: int

    def validated(self, dataset: Dataset) -> dict[str, float]:
        """Return the figures of the model to keep on the validation sessions."""
        run, measures = self.run, self.measures
        return validate(
            run.kept_model, self.validation, dataset, self.config, measures, run.processes
        )


def start_training(
    config: ExperimentConfig,
    dataset: Dataset,
    run_dir: Path,
    device: torch.device,
    resume: bool,
    profiler: StepProfiler,
    init_from: Path | None = None,
    final: dict[str, Any] | None = None,
    processes: Processes = ALONE,
) -> Training:
    """Build a model, or load the one saved in run_dir, and the other parts of its training.

    init_from: a checkpoint whose weights a new model starts with. final: record of `FinalStart`.
    processes: those that train together; each builds the same model.
    Raises InputError, before it writes anything, where config and dataset do not fit.
    """
    sessions, validation = training_splits(config, dataset)
    _check_processes(config, processes, profiler, init_from)
    _check_recency(config, dataset, sessions)
    item_ids = encode_item_ids(dataset.item_ids)
    config, measures = with_measures(config)
    dtype = _training_dtype(config.precision, device)
    if config.table_sharding == "rows" and processes.count > 1 and dtype == torch.float16:
        raise InputError(
            "table_sharding=rows does not go with float16, whose gradients every process would "
            "have to check for overflow; take precision=float32, or bf16 where the GPU has it"
        )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    popularity: torch.Tensor | None = None
    average: Model | None = None
    max_epochs_before, is_auto = config.max_epochs, config.optimizer == "auto"
    if resume:
        model, optimizer, average, progress, saved = _saved(
            run_dir / LAST, device, scaler, processes
        )
        max_epochs_before, origin = saved.config.max_epochs, saved.origin
        if saved.popularity is not None:
            popularity = saved.popularity.clone()  # not mapped from a file that is replaced
    else:
        chosen = _optimizer(config, sessions, dataset.num_items)
        config = dataclasses.replace(config, optimizer=chosen)
        model = new_model(config, dataset.num_items, processes)
        origin = {} if final is None else {"final": final}
        if init_from is not None:
            origin["init_from"] = start_from(init_from, model, config, dataset)
        model = model.to(device)
        optimizer = optimizer_of(config, model)
        progress = Progress()
        if config.ema_decay:
            average = copy.deepcopy(model)
    on_gpu = device.type == "cuda"
    feed = build_feed(
        config, sessions, model, padded=on_gpu and model.fixed_shapes and processes.count == 1
    )
    per_step = config.accumulate_batches
    _check_accumulation(config, sessions, feed.steps_per_pass)
    steps_per_pass = math.ceil(feed.steps_per_pass / per_step)
    steps_per_epoch = min(steps_per_pass, config.max_batches_per_epoch or steps_per_pass)
    total_steps = config.max_epochs * steps_per_epoch
    last_step = origin["final"]["steps"] if "final" in origin else total_steps
    profiler.check_steps(last_step - progress.step)
    distribution = _distribution(config, sessions, dataset.num_items, device)

    def count_popularity() -> torch.Tensor:
        if popularity is not None:
            return popularity
        return torch.from_numpy(count_events(sessions, dataset.num_items))

    run = RunFolder(
        run_dir,
        config,
        dataset,
        item_ids,
        count_popularity,
        model,
        optimizer,
        scaler,
        progress,
        origin,
        average,
        processes,
    )

    def prepare(step: int) -> list[Batch]:
        batches = [feed.batch(number) for number in range(step * per_step, (step + 1) * per_step)]
        if processes.count > 1:
            batches = [share_of(batch, processes.rank, processes.count) for batch in batches]
        return [each.in_one_piece(pinned=True) if on_gpu else each for each in batches]

    records = model.fixed_shapes and not profiler.steps and per_step == processes.count == 1
    graphed_step = GraphedSteps(
        lambda batch: training_step(model, optimizer, scaler, batch, config, distribution, dtype),
        device,
        batch_size=config.train_batch_size,
        recorder=_recorder(config, device, dtype, records=records),
    )

    def take_step(batches: list[Batch]) -> torch.Tensor:
        if per_step == processes.count == 1:
            loss = graphed_step(batches[0])
        else:
            there = [batch.to(device) for batch in batches]
            loss = accumulated_step(
                model, optimizer, scaler, there, config, distribution, dtype, processes
            )
        if average is not None:
            step = progress.step + 1
            add_to_average(average, model, decay=config.ema_decay, step=step)
        return loss

    model.train()
    with run.logged():
        log.info(
            "%s on %s: %s, %s, %s parameters, %s per epoch, %s in %s",
            config.method, dataset.name, _rows(config, sessions),
            counted(dataset.num_items, "item"),
            f"{_count_parameters(model):,}",
            counted(steps_per_epoch, "step"), device, str(dtype).removeprefix("torch."),
        )  # fmt: skip
        if is_auto:
            log.info(
                "optimizer=auto: %s, which is faster for a table of %s items with these settings",
                config.optimizer, f"{dataset.num_items:,}",
            )  # fmt: skip
        if "final" in origin and config.shuffling_style == "no_shuffling":
            _warn_of_an_unfinished_pass(last_step, steps_per_pass)
        _warn_of_a_long_warmup(config, total_steps)
        _warn_of_a_jump(config, progress.step, steps_per_epoch, max_epochs_before)
    return Training(
        config,
        run,
        validation,
        measures,
        prepare,
        take_step,
        steps_per_epoch,
        total_steps,
        last_step,
    )


def new_model(config: ExperimentConfig, num_items: int, processes: Processes) -> Model:
    """Return a model with random weights, the same with any number of processes.

    With table_sharding=rows, this process has only its rows of the item tables.
    Raises InputError where the network does not let its tables be divided.
    """
    seed_generators(config.seed, step=0)
    if config.table_sharding == "none" or processes.count == 1:
        return build_model(config, num_items)
    with dividing_tables(functools.partial(TableShard, processes)):
        model = build_model(config, num_items)
    if model.shard is None:
        raise InputError(
            f"table_sharding=rows divides the tables of ItemTables, which model={config.model} "
            "does not extend; take table_sharding=none"
        )
    return model


def training_splits(config: ExperimentConfig, dataset: Dataset) -> tuple[Sessions, Sessions]:
    """Return training and validation sessions, cut to overfit_batches and limit_val_batches.

    Raises InputError where the training split is empty or holds sessions of fewer than two events.
    """
    sessions, validation = dataset.checked_split("train"), dataset.checked_split("val")
    if not len(sessions):
        raise InputError(f"the training split of {dataset.path} is empty; prepare more data")
    short = int((sessions.lengths < 2).sum())
    if short:
        raise InputError(
            f"the training split of {dataset.path} holds {counted(short, 'session')} of fewer than "
            "two events, which have nothing to predict; prepare the dataset again"
        )
    if config.overfit_batches:
        sessions = validation = _first(sessions, config.overfit_batches * config.train_batch_size)
    limit = config.limit_val_batches
    whole = len(validation) if limit <= 1 else config.train_batch_size
    return sessions, _spread(validation, math.ceil(min(limit * whole, len(validation))))


def _check_processes(
    config: ExperimentConfig, processes: Processes, profiler: StepProfiler, init_from: Path | None
) -> None:
    """Raise InputError where several processes cannot share the training."""
    if processes.count == 1:
        return
    if profiler.steps:
        raise InputError(
            "--profile measures the steps of one process; train it in one, without torchrun"
        )
    if config.table_sharding == "none":
        return
    if config.loss == "sce":
        raise InputError(
            "loss=sce fills its buckets from the whole item table, which table_sharding=rows "
            "divides among processes; take table_sharding=none, or loss=ce"
        )
    if init_from is not None:
        raise InputError(
            "--init-from copies whole item tables, which table_sharding=rows divides among "
            "processes; take table_sharding=none, or leave out --init-from"
        )


def _check_accumulation(config: ExperimentConfig, sessions: Sessions, batches: int) -> None:
    """Raise InputError where a step would go through the training sessions more than once."""
    if config.accumulate_batches > batches > 0:
        raise InputError(
            f"accumulate_batches={config.accumulate_batches} is more than the "
            f"{counted(batches, 'batch', 'batches')} of train_batch_size="
            f"{config.train_batch_size} that the {counted(len(sessions), 'training session')} "
            f"make; lower it to at most {batches}, or lower train_batch_size"
        )


def _check_recency(config: ExperimentConfig, dataset: Dataset, sessions: Sessions) -> None:
    """Raise InputError where the training sessions have no age of the kind that is asked for."""
    if config.recency_half_life_days and sessions.times is None:
        by_order = dataset.protocol != "last-item"
        raise InputError(
            f"recency_half_life_days={config.recency_half_life_days:g} needs the times of events, "
            f"which {dataset.path} lacks; "
            + ("use recency_half_life_sessions" if by_order else "leave it out")
        )
    if config.recency_half_life_sessions and dataset.protocol == "last-item":
        with_times = sessions.times is not None
        raise InputError(
            f"recency_half_life_sessions={config.recency_half_life_sessions} needs sessions in "
            f"time order, but those of {dataset.path} are the histories of users; "
            + ("use recency_half_life_days" if with_times else "leave it out")
        )


def _rows(config: ExperimentConfig, sessions: Sessions) -> str:
    """Describe the rows of a pass: sessions, and their windows where they are other than these."""
    count = counted(len(sessions), "session")
    if config.training_windows == "last":
        return count
    if config.training_windows == "random":
        return f"{count} (a random window of each)"
    rows = "prefixes" if config.training_windows == "prefixes" else "windows"
    return f"{count} ({len(windows_of(config, sessions)):,} {rows})"


def _first(sessions: Sessions, count: int) -> Sessions:
    return Sessions(sessions.items, sessions.offsets[: count + 1], sessions.times)


def _spread(sessions: Sessions, count: int) -> Sessions:
    """Return at most `count` sessions, evenly spaced: the first of a split are the earliest."""
    if count >= len(sessions):
        return sessions
    rows = (2 * np.arange(count) + 1) * len(sessions) // (2 * count)
    items = [sessions[row] for row in rows.tolist()]
    return Sessions(np.concatenate(items), np.concatenate([[0], np.cumsum([*map(len, items)])]))


def _count_parameters(model: Model) -> int:
    """Return the number of parameters, those of divided tables in all processes."""
    counts = [weights.numel() for weights in model.parameters()]
    if model.shard is not None:
        missing = model.shard.num_rows - (model.shard.last - model.shard.first)
        counts += [missing * table.shape[1] for table in model.divided_tables]
    return sum(counts)


def scheduled_rate(config: ExperimentConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    return learning_rate(
        step,
        lr=config.lr,
        schedule=config.lr_schedule,
        warmup_steps=config.warmup_steps,
        total_steps=total_steps,
    )


def _warn_of_an_unfinished_pass(last_step: int, steps_per_pass: int) -> None:
    """Warn where a final model ends before the validation sessions, which come last, are over."""
    if last_step < steps_per_pass:
        log.warning(
            "shuffling_style=no_shuffling: the %s steps end before the last of the %s steps that "
            "all sessions take, so not every validation session is trained on",
            f"{last_step:,}", f"{steps_per_pass:,}",
        )  # fmt: skip


def _warn_of_a_long_warmup(config: ExperimentConfig, total_steps: int) -> None:
    """Warn where the warm-up of the learning rate ends after the run."""
    if config.warmup_steps > total_steps:
        log.warning(
            "warmup_steps=%s is longer than the run of %s steps: the learning rate ends at %.3g "
            "and never reaches lr=%g; lower warmup_steps, or raise max_epochs",
            config.warmup_steps, f"{total_steps:,}",
            scheduled_rate(config, total_steps - 1, total_steps), config.lr,
        )  # fmt: skip


def _warn_of_a_jump(
    config: ExperimentConfig, step: int, steps_per_epoch: int, max_epochs_before: int
) -> None:
    """Warn where another max_epochs changes the learning rate of a resumed run."""
    if config.lr_schedule == "constant" or config.max_epochs == max_epochs_before:
        return
    before, now = (
        scheduled_rate(config, step, epochs * steps_per_epoch)
        for epochs in (max_epochs_before, config.max_epochs)
    )
    log.warning(
        "lr_schedule=%s now ends with max_epochs=%s (before: %s): the learning rate goes on at "
        "%.3g, not at %.3g; a run that begins with max_epochs=%s has no such jump",
        config.lr_schedule, config.max_epochs, max_epochs_before, now, before, config.max_epochs,
    )  # fmt: skip


def _saved(
    file: Path, device: torch.device, scaler: torch.amp.GradScaler, processes: Processes
) -> tuple[Model, torch.optim.Optimizer, Model | None, Progress, Checkpoint]:
    """Load the training state from a checkpoint; the scaler's state goes to `scaler`.

    Returns model, optimizer, averaged model if any, progress and the checkpoint. Raises InputError
    where the file holds no state, or that of another version of tron.
    """
    checkpoint = load_checkpoint(file)
    if not checkpoint.training:
        raise InputError(
            f"{file} holds only weights, as the best checkpoint of a run does, and no state to "
            f"resume from; take the {LAST} of its run, or start a new one"
        )
    before, average = checkpoint.config, None
    try:
        if before.table_sharding == "rows":
            model, optimizer, average = resumed(checkpoint, device, processes)
        else:
            model = checkpoint.build_saved_model(device, to_resume=True)
            optimizer = optimizer_of(before, model)
            optimizer.load_state_dict(checkpoint.training["optimizer"])
            if before.ema_decay:
                average = checkpoint.build_saved_model(device)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    if checkpoint.training["scaler"]:  # empty where the precision before needed none
        scaler.load_state_dict(checkpoint.training["scaler"])
    try:
        progress = Progress(**checkpoint.training["progress"])
    except TypeError as error:
        raise InputError(f"{file} was written by another version of tron: {error}") from error
    return model, optimizer, average, progress, checkpoint


def _optimizer(config: ExperimentConfig, sessions: Sessions, num_items: int) -> str:
    """Resolve the configuration's optimizer, in the same way on every machine.

    Losses over the whole catalogue have a gradient for every row of the table, averages change
    every row, and RowAdam would decay the biases of items with their rows.
    """
    if config.optimizer != "auto":
        return config.optimizer
    if config.loss in CATALOGUE_LOSSES or config.ema_decay:
        return "adam"
    if config.weight_decay and config.output_bias:
        return "adam"
    windows = windows_of(config, sessions)
    rows = min(config.train_batch_size, len(windows))
    events = rows if config.session_parallel else rows * windows.mean_length()
    sets = {"batchwise": 1, "sessionwise": rows, "eventwise": events}[config.sampling_style]
    looked_up = events + rows + config.num_uniform_negatives * sets
    looked_up *= config.accumulate_batches
    return faster_adam(num_items, looked_up, topk=config.topk_sampling)


def _distribution(
    config: ExperimentConfig, sessions: Sessions, num_items: int, device: torch.device
) -> Distribution:
    """Return the distribution of the configuration's negatives.

    Raises InputError where the sampler's weights cannot be drawn from.
    """
    if config.negative_sampler == "uniform" and not config.logq_correction:
        return Distribution(num_items)
    count_I = count_events(sessions, num_items)[1:].astype(np.float64)
    entry = SAMPLERS[config.negative_sampler]
    expected_of = None
    if config.logq_correction:
        expected_of = (config.num_uniform_negatives, expected_in_batch(config, sessions, num_items))
    weight_I = np.asarray(load(entry)(count_I, **settings_of(entry, config)), dtype=np.float64)
    # No comparison holds for NaN.
    if weight_I.shape != (num_items,) or not (weight_I.min() >= 0 and 0 < weight_I.sum() < np.inf):
        raise InputError(
            f"negative_sampler={config.negative_sampler} must give a weight for each of the "
            f"{num_items:,} items, finite and at least 0, and not all 0; correct it"
        )
    return Distribution.of(weight_I, expected_of=expected_of, device=device)


def _training_dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        # Earlier cards emulate bf16, which torch.cuda.is_bf16_supported() counts as support.
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bf16 else torch.float16
    if precision == "fp16" and device.type != "cuda":
        raise InputError("precision=fp16 needs CUDA; use float32 or bf16 on the CPU")
    return {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _recorder(
    config: ExperimentConfig, device: torch.device, dtype: torch.dtype, *, records: bool
) -> CUDARecorder | None:
    """Return the recorder of steps; None where a step waits for the device, as with a scaler."""
    records = records and config.cuda_graphs and device.type == "cuda" and dtype != torch.float16
    return CUDARecorder(device) if records else None
