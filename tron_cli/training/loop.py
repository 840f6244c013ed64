"""The training loop.

Every random number of a step comes from a generator seeded with (seed, step), so that a run that
was stopped and resumed ends with the weights of one that never was.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from tron_cli.baselines.base import Baseline
from tron_cli.checkpoint import LAST, encode_item_ids, load_checkpoint
from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import Batch, prepared_ahead
from tron_cli.data.dataset import Dataset, Sessions
from tron_cli.errors import InputError, RunError
from tron_cli.evaluation.metrics import parse_measures, score
from tron_cli.evaluation.predict import predict
from tron_cli.losses.sampled import build_loss
from tron_cli.models.base import Model, build_model
from tron_cli.registry import CATALOGUE_LOSSES, SAMPLERS, load, settings_of
from tron_cli.sampling.logits import sampled_logits
from tron_cli.sampling.lookup import BeforeLookup, look_up, look_up_inputs
from tron_cli.sampling.negatives import Distribution, sample_negatives
from tron_cli.training.feed import build_feed, expected_in_batch
from tron_cli.training.graphs import CUDARecorder, GraphedSteps
from tron_cli.training.optim import (
    Optimizer,
    build_optimizer,
    clip_gradients,
    faster_adam,
    gradients_are_sparse,
    learning_rate,
)
from tron_cli.training.profile import StepProfiler, phase
from tron_cli.training.run import Progress, RunFolder

_LOG_EVERY = 20  # steps; also how often the loss is checked, since reading it waits for the device

log = logging.getLogger("tron")


class InterruptedRunError(RunError):
    """The user stopped the run; it was saved."""


def train(
    config: ExperimentConfig,
    dataset: Dataset,
    run_dir: Path,
    *,
    device: torch.device,
    resume: bool = False,
    profiler: StepProfiler | None = None,
) -> Path:
    """Train, choose the best checkpoint on validation, and return its path.

    run_dir is made if it is not there, once config and dataset have proved to fit. resume: go on
    with the run saved there. With a profiler training ends when that has its steps, and the path is
    that of the saved run. Raises InputError where config and dataset do not fit, RunError where the
    loss is not finite, InterruptedRunError after Ctrl-C.
    """
    sessions, validation = training_splits(config, dataset)
    item_ids = encode_item_ids(dataset.item_ids)
    val_metric = str(parse_measures(config.val_metric)[0])
    measures = parse_measures((*config.metrics, val_metric))
    config = dataclasses.replace(config, val_metric=val_metric)
    dtype = _training_dtype(config.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    epochs_before, is_auto = config.max_epochs, config.optimizer == "auto"
    if resume:
        model, optimizer, progress, epochs_before = _saved(run_dir / LAST, device, scaler)
    else:
        chosen = _optimizer(config, sessions, dataset.num_items)
        config = dataclasses.replace(config, optimizer=chosen)
        _seed(config.seed, step=0)
        model = build_model(config, dataset.num_items).to(device)
        optimizer = build_optimizer(config.optimizer, model.parameters(), config.lr)
        progress = Progress()
    on_gpu = device.type == "cuda"
    feed = build_feed(config, sessions, model, padded=on_gpu and model.fixed_shapes)
    steps_per_epoch = min(feed.steps_per_pass, config.max_batches_per_epoch or feed.steps_per_pass)
    total_steps = config.max_epochs * steps_per_epoch
    distribution = _distribution(config, sessions, dataset.num_items, device)
    if profiler is not None and total_steps - progress.step < profiler.steps_needed:
        raise InputError(
            f"profiling takes {profiler.steps_needed:,} steps, warm-up included, and this run has "
            f"{total_steps - progress.step:,} to go; profile fewer, or raise max_epochs"
        )
    run = RunFolder(run_dir, config, dataset, item_ids, model, optimizer, scaler, progress)
    parameters = sum(parameter.numel() for parameter in model.parameters())

    def prepare(step: int) -> Batch:
        batch = feed.batch(step)
        return batch.in_one_piece(pinned=True) if on_gpu else batch

    take_step = GraphedSteps(
        lambda batch: training_step(model, optimizer, scaler, batch, config, distribution, dtype),
        device,
        batch_size=config.train_batch_size,
        recorder=_recorder(config, device, dtype, records=model.fixed_shapes and profiler is None),
    )
    profiling = nullcontext() if profiler is None else profiler.running(device, run_dir)
    with run.logged(), _stop_signals() as stop, profiling, ThreadPoolExecutor(1) as thread:
        log.info(
            "%s on %s: %s sessions, %s items, %s parameters, %s steps an epoch, %s in %s",
            config.method, dataset.name, f"{len(sessions):,}", f"{dataset.num_items:,}",
            f"{parameters:,}", f"{steps_per_epoch:,}", device, str(dtype).removeprefix("torch."),
        )  # fmt: skip
        if is_auto:
            log.info(
                "optimizer=auto: %s, which is faster for a table of %s items with these settings",
                config.optimizer, f"{dataset.num_items:,}",
            )  # fmt: skip
        if config.lr_schedule != "constant" and config.max_epochs != epochs_before:
            old, new = (
                _rate(config, progress.step, epochs * steps_per_epoch)
                for epochs in (epochs_before, config.max_epochs)
            )
            log.warning(
                "lr_schedule=%s is drawn anew for max_epochs=%s (before: %s): the learning rate "
                "goes on at %.3g, not at %.3g; a run that begins with max_epochs=%s has no such "
                "jump",
                config.lr_schedule, config.max_epochs, epochs_before, new, old, config.max_epochs,
            )  # fmt: skip
        saved_at = time.monotonic()
        while progress.step < total_steps:
            epoch = progress.step // steps_per_epoch
            if progress.step % steps_per_epoch == 0 and _out_of_patience(config, progress):
                log.info("no better %s for %s epochs: stopped",
                         config.val_metric, progress.epochs_without_gain)  # fmt: skip
                break
            bar = _epoch_bar(config, epoch, steps_per_epoch, progress.step)
            loss_sum = torch.zeros((), device=device)
            steps_summed = events = 0
            clock = time.perf_counter()
            model.train()
            steps = range(progress.step, (epoch + 1) * steps_per_epoch)
            batches = prepared_ahead(prepare, steps, thread)
            for step in steps:
                # Set the learning rate, and the seed of everything random in this step.
                _seed(config.seed, step=step + 1)
                rate = _rate(config, step, total_steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate

                optimizer.load_lr()

                # Forward, backward, clip and step.
                with phase("batch"):
                    batch = next(batches)
                loss = take_step(batch)
                progress.step = step + 1
                if profiler is not None:
                    profiler.step()
                ends = bool(stop) or (profiler is not None and profiler.result is not None)

                # Log.
                loss_sum += loss
                steps_summed += 1
                events += int(batch.lengths_B.sum())
                bar.update()
                logs = progress.step % _LOG_EVERY == 0
                minutes = (time.monotonic() - saved_at) / 60
                # By the clock where a line is logged anyway: what is logged does not depend on it.
                due_to_save = (0 < config.save_minutes <= minutes and logs) or (
                    config.save_every > 0 and progress.step % config.save_every == 0
                )
                epoch_ends = progress.step == (epoch + 1) * steps_per_epoch
                if logs or due_to_save or epoch_ends or ends:
                    mean_loss = loss_sum.item() / steps_summed
                    if not math.isfinite(mean_loss):
                        raise run.diverged(f"the loss is {mean_loss}")
                    speed = events / (time.perf_counter() - clock)
                    bar.set_postfix_str(f"loss {mean_loss:.4f}, {speed:,.0f} events/s")
                    run.write_metrics(
                        step=progress.step, epoch=epoch, loss=mean_loss, lr=rate,
                        events_per_second=round(speed),
                    )  # fmt: skip
                    loss_sum.zero_()
                    steps_summed = events = 0
                    clock = time.perf_counter()

                # Save, so that little is lost.
                if due_to_save and not epoch_ends:
                    with phase("save"):
                        run.save_last(epoch)
                    saved_at = time.monotonic()
                if ends and not epoch_ends:
                    break
            bar.close()

            # Validate, keep the best, save.
            if progress.step == (epoch + 1) * steps_per_epoch:
                optimizer.catch_up_all()
                with phase("validation"):
                    values = validate(model, validation, dataset, config, measures)
                with phase("save"):
                    run.finish_epoch(epoch, values)
                saved_at = time.monotonic()
            else:
                run.save_last(epoch)
            if profiler is not None and profiler.result is not None:
                return run_dir / LAST
            if stop and progress.step < total_steps:
                raise InterruptedRunError(
                    f"stopped at step {progress.step:,} of {total_steps:,} and saved; go on with "
                    f"`tron train --resume {run_dir}`"
                )
    run.drop_leftovers()
    best = run_dir / progress.best_file
    if not best.is_file():
        raise RunError(
            f"the best checkpoint of this run was {best}, which is gone; {run_dir / LAST} has the "
            "latest weights"
        )
    if not len(validation):
        log.info("validation is empty: nothing was selected, the last weights are kept")
    log.info("best checkpoint: %s", best)
    return best


def training_step(
    model: Model,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    config: ExperimentConfig,
    distribution: Distribution,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Forward, backward, clip and step; the loss, without gradients."""
    with torch.autocast(batch.inputs_N.device.type, dtype, enabled=dtype != torch.float32):
        loss = training_loss(model, batch, config, distribution, before_lookup=optimizer.catch_up)
    with phase("backward"):
        optimizer.zero_grad()
        scaler.scale(loss).backward()
    with phase("optimizer"):
        if config.clip_norm:
            scaler.unscale_(cast(torch.optim.Optimizer, optimizer))
            clip_gradients(model.parameters(), config.clip_norm)
        scaler.step(cast(torch.optim.Optimizer, optimizer))
        scaler.update()
    return loss.detach()


def training_loss(
    model: Model,
    batch: Batch,
    config: ExperimentConfig,
    distribution: Distribution,
    *,
    before_lookup: BeforeLookup | None = None,
) -> torch.Tensor:
    """Mean loss over the positions of a batch that have a target, with freshly drawn negatives.

    Raises InputError where the loss is not one number for each position.
    """
    if config.loss in CATALOGUE_LOSSES:
        loss_N = _catalogue_loss(model, batch, config, before_lookup)
    else:
        loss_N = _sampled_loss(model, batch, config, distribution, before_lookup)
    assert batch.targets_N is not None
    if loss_N.shape != batch.targets_N.shape:
        raise InputError(
            f"loss={config.loss} must give a number for each of {len(batch.targets_N):,} "
            f"positions, but gave a tensor of the shape {list(loss_N.shape)}; correct it"
        )
    if not batch.padded:
        return loss_N.mean()
    padding_N = batch.inputs_N == 0
    return loss_N.masked_fill(padding_N, 0.0).sum() / (~padding_N).sum()


def _sampled_loss(
    model: Model,
    batch: Batch,
    config: ExperimentConfig,
    distribution: Distribution,
    before_lookup: BeforeLookup | None,
) -> torch.Tensor:
    """Loss of each position with a target, among sampled negatives."""
    with phase("negatives"):
        negatives = sample_negatives(
            batch,
            distribution,
            num_uniform=config.num_uniform_negatives,
            num_batch=config.num_batch_negatives,
            sampling_style=config.sampling_style,
            reject_uniform_session_items=config.reject_uniform_session_items,
            reject_in_batch_items=config.reject_in_batch_items,
        )
    with phase("lookup"):
        sparse = gradients_are_sparse(config.optimizer)
        before = before_lookup if sparse else None
        looked = look_up(model.item_table, batch, negatives, sparse=sparse, before=before)
        inputs, rows_UD = looked.batch, looked.rows_UD
        if not config.shares_table:
            inputs, rows_UD = look_up_inputs(
                model.item_embedding.weight, batch, sparse=sparse, before=before
            )
    with phase("forward"):
        hidden_ND = _with_target(model(inputs, rows_UD), batch)
    with phase("logits"):
        positive_N, negative_NK, keep_NK = sampled_logits(
            hidden_ND,
            looked.rows_UD,
            looked.batch,
            looked.negatives,
            topk=config.topk_sampling_k if config.topk_sampling else None,
            mask_collisions=config.mask_collisions,
        )
    with phase("loss"):
        if config.final_activation:
            positive_N, negative_NK = F.elu(positive_N, 0.5), F.elu(negative_NK, 0.5)
        loss = build_loss(config, distribution.num_items)
        return loss(positive_N, negative_NK, keep_NK)


def _catalogue_loss(
    model: Model, batch: Batch, config: ExperimentConfig, before_lookup: BeforeLookup | None
) -> torch.Tensor:
    """Loss of each position with a target, among all items."""
    with phase("lookup"):
        sparse = gradients_are_sparse(config.optimizer) and not config.shares_table
        inputs, rows_UD = look_up_inputs(
            model.item_embedding.weight,
            batch,
            sparse=sparse,
            before=before_lookup if sparse else None,
        )
    with phase("forward"):
        hidden_ND = _with_target(model(inputs, rows_UD), batch)
    with phase("loss"):
        loss = build_loss(config, model.num_items)
        return loss(hidden_ND, model.item_table, batch.targets_N)


def _with_target(hidden_ND: torch.Tensor, batch: Batch) -> torch.Tensor:
    return hidden_ND if batch.predicting_P is None else hidden_ND[batch.predicting_P]


def _distribution(
    config: ExperimentConfig, sessions: Sessions, num_items: int, device: torch.device
) -> Distribution:
    """Return the distribution of the configuration's negatives.

    Raises InputError where the sampler gives weights that nothing can be drawn by.
    """
    if config.negative_sampler == "uniform" and not config.logq_correction:
        return Distribution(num_items)
    count_I = np.bincount(sessions.items, minlength=num_items + 1)[1:].astype(np.float64)
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


def _recorder(
    config: ExperimentConfig, device: torch.device, dtype: torch.dtype, *, records: bool
) -> CUDARecorder | None:
    """Return what records steps; None where they wait for the device: a scaler, a profiler do."""
    records = records and config.cuda_graphs and device.type == "cuda" and dtype != torch.float16
    return CUDARecorder(device) if records else None


def _optimizer(config: ExperimentConfig, sessions: Sessions, num_items: int) -> str:
    """Return the configuration's optimizer, resolved: the same for the same data, on any machine.

    Losses over the whole catalogue have a gradient for every row of the table.
    """
    if config.optimizer != "auto":
        return config.optimizer
    if config.loss in CATALOGUE_LOSSES:
        return "adam"
    rows = min(config.train_batch_size, len(sessions))
    inputs = np.minimum(sessions.lengths - 1, config.sequence_length).mean()
    events = rows if config.session_parallel else rows * inputs
    sets = {"batchwise": 1, "sessionwise": rows, "eventwise": events}[config.sampling_style]
    looked_up = events + rows + config.num_uniform_negatives * sets
    return faster_adam(num_items, looked_up, topk=config.topk_sampling)


def _rate(config: ExperimentConfig, step: int, total_steps: int) -> float:
    return learning_rate(
        step,
        lr=config.lr,
        schedule=config.lr_schedule,
        warmup_steps=config.warmup_steps,
        total_steps=total_steps,
    )


def _saved(
    file: Path, device: torch.device, scaler: torch.amp.GradScaler
) -> tuple[Model, Optimizer, Progress, int]:
    """Load the training state, and the max_epochs of so far; put the scaler's into `scaler`.

    Raises InputError where the file holds none, or that of another version of tron.
    """
    checkpoint = load_checkpoint(file)
    model, optimizer = checkpoint.build_training(device)
    if checkpoint.training["scaler"]:  # empty where the precision of so far needed none
        scaler.load_state_dict(checkpoint.training["scaler"])
    try:
        progress = Progress(**checkpoint.training["progress"])
    except TypeError as error:
        raise InputError(f"{file} was written by another version of tron: {error}") from error
    return model, optimizer, progress, checkpoint.config.max_epochs


def training_splits(config: ExperimentConfig, dataset: Dataset) -> tuple[Sessions, Sessions]:
    """Training and validation sessions, cut as overfit_batches and limit_val_batches say."""
    sessions, validation = dataset.checked_split("train"), dataset.checked_split("val")
    if not len(sessions):
        raise InputError(f"the training split of {dataset.path} is empty; prepare more data")
    short = int((sessions.lengths < 2).sum())
    if short:
        raise InputError(
            f"the training split of {dataset.path} holds {short:,} sessions of fewer than two "
            "events, which have nothing to predict; prepare the dataset again"
        )
    if config.overfit_batches:
        sessions = validation = _first(sessions, config.overfit_batches * config.train_batch_size)
    limit = config.limit_val_batches
    whole = len(validation) if limit <= 1 else config.train_batch_size
    return sessions, _spread(validation, math.ceil(min(limit * whole, len(validation))))


def _first(sessions: Sessions, count: int) -> Sessions:
    return Sessions(sessions.items, sessions.offsets[: count + 1])


def _spread(sessions: Sessions, count: int) -> Sessions:
    """At most `count` sessions, evenly spaced: the first of a split are the earliest."""
    if count >= len(sessions):
        return sessions
    rows = (2 * np.arange(count) + 1) * len(sessions) // (2 * count)
    items = [sessions[row] for row in rows.tolist()]
    return Sessions(np.concatenate(items), np.concatenate([[0], np.cumsum([*map(len, items)])]))


def _seed(seed: int, *, step: int) -> None:
    """Torch's generators on all devices, as a function of the seed and the step alone."""
    mixed = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed >> np.uint64(1)))


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


def _out_of_patience(config: ExperimentConfig, progress: Progress) -> bool:
    patience = config.early_stopping_patience
    return bool(patience) and progress.epochs_without_gain >= patience


def _epoch_bar(config: ExperimentConfig, epoch: int, steps: int, step: int) -> tqdm:
    return tqdm(
        total=steps,
        initial=step % steps,
        desc=f"epoch {epoch + 1}/{config.max_epochs}",
        unit=" steps",
        disable=None,
    )


def validate(
    model: Model | Baseline,
    validation: Sessions,
    dataset: Dataset,
    config: ExperimentConfig,
    measures: list[Any],
) -> dict[str, float]:
    """Serving-like figures on the validation sessions; empty without any."""
    if not len(validation):
        return {}
    found = predict(
        model,
        validation,
        protocol=dataset.protocol,
        filter_rated=config.filter_rated,
        batch_size=config.eval_batch_size,
        progress="validation",
    )
    figures = score(found.rank_E, found.session_E, measures)
    return {name: figure.value for name, figure in figures.items()}


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that becomes true at the first Ctrl-C or SIGTERM; a second one stops at once."""
    received: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        log.warning("stopping after this step; once more to stop at once")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
