"""The training loop, and what a run leaves behind.

    OUTPUT_DIR/RUN/
        config.json       the resolved configuration
        metrics.jsonl     a line each log_every steps, and one each validation
        train.log         what was said
        METHOD-DATASET-step=...-R@20=....pt   the best weights by val_metric
        last.pt           the latest weights and all that resuming needs

Every random number of a step comes from a generator seeded with (seed, step), so that a run that
was stopped and resumed ends with the weights of one that never was.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from tron_cli import losses
from tron_cli.batches import Batch, session_order, training_batch
from tron_cli.checkpoint import (
    LAST,
    Checkpoint,
    checkpoint_name,
    dataset_identity,
    encode_item_ids,
    save_checkpoint,
)
from tron_cli.config import ExperimentConfig
from tron_cli.dataset import Dataset, Sessions
from tron_cli.errors import InputError, RunError
from tron_cli.evaluate import predict
from tron_cli.files import written_aside
from tron_cli.logits import sampled_logits
from tron_cli.metrics import parse_measures, score
from tron_cli.models import SASRec, build_model
from tron_cli.negatives import sample_negatives
from tron_cli.optim import build_optimizer, learning_rate

_LOG_EVERY = 20  # steps; also how often the loss is checked, since reading it waits for the device

log = logging.getLogger("tron")


class InterruptedRunError(RunError):
    """The user stopped the run; it was saved."""


@dataclasses.dataclass
class Progress:
    """Where a run stands; saved in last.pt."""

    step: int = 0
    best_file: str = ""
    best_value: float = -math.inf
    epochs_without_gain: int = 0


def train(
    config: ExperimentConfig,
    dataset: Dataset,
    run_dir: Path,
    *,
    device: torch.device,
    resume: Checkpoint | None = None,
) -> Path:
    """Train, choose the best checkpoint on validation, and return its path.

    run_dir is made if it is not there, once config and dataset have proved to fit. Raises
    InputError where they do not, RunError where the loss is not finite, InterruptedRunError after
    Ctrl-C.
    """
    sessions, validation = _splits(config, dataset)
    item_ids = encode_item_ids(dataset.item_ids)
    val_metric = str(parse_measures(config.val_metric)[0])
    measures = parse_measures((*config.metrics, val_metric))
    config = dataclasses.replace(config, val_metric=val_metric)
    dtype = _training_dtype(config.precision, device)
    steps_per_pass = math.ceil(len(sessions) / config.train_batch_size)
    steps_per_epoch = min(steps_per_pass, config.max_batches_per_epoch or steps_per_pass)
    total_steps = config.max_epochs * steps_per_epoch

    _seed(config.seed, step=0)
    model = build_model(config, dataset.num_items).to(device)
    optimizer = build_optimizer(config.optimizer, model.parameters(), config.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    progress = Progress()
    if resume is not None:
        model.load_state_dict(resume.weights)
        optimizer.load_state_dict(resume.training["optimizer"])
        scaler.load_state_dict(resume.training["scaler"])
        progress = Progress(**resume.training["progress"])
    run = _Run(run_dir, config, dataset, item_ids, model, optimizer, scaler, progress)
    parameters = sum(parameter.numel() for parameter in model.parameters())

    with run.logged(), _stop_signals() as stop:
        log.info(
            "%s on %s: %s sessions, %s items, %s parameters, %s steps an epoch, %s in %s",
            config.method, dataset.name, f"{len(sessions):,}", f"{dataset.num_items:,}",
            f"{parameters:,}", f"{steps_per_epoch:,}", device, str(dtype).removeprefix("torch."),
        )  # fmt: skip
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
            for step in range(progress.step, (epoch + 1) * steps_per_epoch):
                # Set the learning rate, and the seed of everything random in this step.
                _seed(config.seed, step=step + 1)
                rate = learning_rate(
                    step, lr=config.lr, schedule=config.lr_schedule,
                    warmup_steps=config.warmup_steps, total_steps=total_steps,
                )  # fmt: skip
                for group in optimizer.param_groups:
                    group["lr"] = rate

                # Forward and backward.
                chosen = _sessions_of_step(config, step, len(sessions))
                batch = training_batch(sessions, chosen, config.sequence_length).to(device)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = training_loss(model, batch, config, dataset.num_items)
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()

                # Clip.
                if config.clip_norm:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)

                # Step.
                scaler.step(optimizer)
                scaler.update()
                progress.step = step + 1

                # Log.
                loss_sum += loss.detach()
                steps_summed += 1
                events += len(batch.inputs_N)
                bar.update()
                due_to_save = config.save_every and progress.step % config.save_every == 0
                epoch_ends = progress.step == (epoch + 1) * steps_per_epoch
                if progress.step % _LOG_EVERY == 0 or due_to_save or epoch_ends or stop:
                    mean_loss = loss_sum.item() / steps_summed
                    if not math.isfinite(mean_loss):
                        raise _diverged(f"the loss is {mean_loss}", progress.step, config)
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
                    run.save_last(epoch)
                if stop and not epoch_ends:
                    break
            bar.close()

            # Validate, keep the best, save.
            if progress.step == (epoch + 1) * steps_per_epoch:
                values = _validate(model, validation, dataset, config, measures)
                run.finish_epoch(epoch, values)
            else:
                run.save_last(epoch)
            if stop and progress.step < total_steps:
                raise InterruptedRunError(
                    f"stopped at step {progress.step:,} of {total_steps:,} and saved; go on with "
                    f"`tron train --resume {run_dir}`"
                )
    run.drop_leftovers()
    best = run_dir / progress.best_file
    if not len(validation):
        log.info("validation is empty: nothing was selected, the last weights are kept")
    log.info("best checkpoint: %s", best)
    return best


def training_loss(
    model: SASRec, batch: Batch, config: ExperimentConfig, num_items: int
) -> torch.Tensor:
    """Mean loss over the positions of a batch, with freshly drawn negatives."""
    negatives = sample_negatives(
        batch,
        num_items,
        num_uniform=config.num_uniform_negatives,
        num_batch=config.num_batch_negatives,
        sampling_style=config.sampling_style,
        reject_uniform_session_items=config.reject_uniform_session_items,
        reject_in_batch_items=config.reject_in_batch_items,
    )
    hidden_ND = model(batch)
    positive_N, negative_NK, keep_NK = sampled_logits(
        hidden_ND,
        model.item_table,
        batch,
        negatives,
        topk=config.topk_sampling_k if config.topk_sampling else None,
        mask_collisions=config.mask_collisions,
    )
    if config.loss == "bce":
        loss_N = losses.bce(positive_N, negative_NK, keep_NK)
    elif config.loss == "ssm":
        loss_N = losses.ssm(positive_N, negative_NK, keep_NK)
    else:
        loss_N = losses.bpr_max(positive_N, negative_NK, keep_NK, penalty=config.bpr_penalty)
    return loss_N.mean()


class _Run:
    """The folder of a run: its files, written aside and renamed."""

    def __init__(
        self,
        run_dir: Path,
        config: ExperimentConfig,
        dataset: Dataset,
        item_ids: torch.Tensor,
        model: SASRec,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        progress: Progress,
    ) -> None:
        self.run_dir = run_dir
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.progress = progress
        self.identity = dataset_identity(dataset)
        self.item_ids = item_ids
        self.metrics_file = run_dir / "metrics.jsonl"
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            settings = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
            with written_aside(run_dir / "config.json") as file:
                file.write(settings)
        except OSError as error:
            raise InputError(f"cannot write to the run folder {run_dir}: {error}") from error
        self._drop_later_metrics()

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Copy what is said into the run's train.log meanwhile."""
        handler = logging.FileHandler(self.run_dir / "train.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        try:
            yield
        finally:
            log.removeHandler(handler)
            handler.close()

    def write_metrics(self, **values: Any) -> None:
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def finish_epoch(self, epoch: int, values: dict[str, float]) -> None:
        """Keep the weights if they are the best so far; without validation the last are."""
        config, progress = self.config, self.progress
        value = values.get(config.val_metric, -math.inf)
        if not values or value > progress.best_value:
            progress.best_value = value
            progress.epochs_without_gain = 0
            progress.best_file = checkpoint_name(config, progress.step, values)
            self._save(self.run_dir / progress.best_file, epoch, values, training={})
        else:
            progress.epochs_without_gain += 1
        if values:
            self.write_metrics(step=progress.step, epoch=epoch, validation=values)
            shown = ", ".join(f"{name} {figure:.4f}" for name, figure in values.items())
            mark = " (best)" if progress.epochs_without_gain == 0 else ""
            log.info("epoch %s, step %s: %s%s", epoch + 1, f"{progress.step:,}", shown, mark)
        self.save_last(epoch)
        # Only now is the former best not needed to resume.
        self.drop_leftovers()

    def drop_leftovers(self) -> None:
        """Delete former bests, and what a kill left half-written."""
        for path in [*self.run_dir.glob("*.pt"), *self.run_dir.glob("*.partial")]:
            if path.name not in (self.progress.best_file, LAST):
                path.unlink()

    def save_last(self, epoch: int) -> None:
        training = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
        }
        self._save(self.run_dir / LAST, epoch, {}, training)

    def _save(
        self, path: Path, epoch: int, metrics: dict[str, float], training: dict[str, Any]
    ) -> None:
        # The loss was finite before the last step, and need not be after it.
        if not all(bool(weights.isfinite().all()) for weights in self.model.parameters()):
            raise _diverged("the weights are not finite", self.progress.step, self.config)
        save_checkpoint(
            path,
            config=self.config,
            model=self.model,
            step=self.progress.step,
            epoch=epoch,
            metrics=metrics,
            dataset=self.identity,
            item_ids=self.item_ids,
            training=training,
        )

    def _drop_later_metrics(self) -> None:
        """What a killed run wrote after its last save happens again, and is written again."""
        if not self.metrics_file.exists():
            return
        lines = self.metrics_file.read_text().splitlines(keepends=True)
        kept = [
            line
            for line in lines
            if line.endswith("\n") and json.loads(line)["step"] <= self.progress.step
        ]
        with written_aside(self.metrics_file) as file:
            file.writelines(kept)


def _splits(config: ExperimentConfig, dataset: Dataset) -> tuple[Sessions, Sessions]:
    """Training and validation sessions, cut as overfit_batches and limit_val_batches say."""
    sessions, validation = dataset.split("train"), dataset.split("val")
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
    count = (
        math.ceil(limit * len(validation)) if limit <= 1 else int(limit) * config.train_batch_size
    )
    return sessions, _first(validation, count)


def _first(sessions: Sessions, count: int) -> Sessions:
    return Sessions(sessions.items, sessions.offsets[: count + 1])


def _sessions_of_step(config: ExperimentConfig, step: int, num_sessions: int) -> np.ndarray:
    """int64 [B]: passes over the data go on across epochs, so that short epochs skip nothing."""
    steps_per_pass = math.ceil(num_sessions / config.train_batch_size)
    data_pass, place = divmod(step, steps_per_pass)
    order = _order_of_pass(num_sessions, config.shuffling_style, config.seed, data_pass)
    return order[place * config.train_batch_size : (place + 1) * config.train_batch_size]


@functools.lru_cache(maxsize=1)
def _order_of_pass(num_sessions: int, style: str, seed: int, data_pass: int) -> np.ndarray:
    return session_order(num_sessions, style, seed=seed, epoch=data_pass)


def _seed(seed: int, *, step: int) -> None:
    """Torch's generators on all devices, as a function of the seed and the step alone."""
    mixed = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed >> np.uint64(1)))


def _training_dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if precision == "fp16" and device.type != "cuda":
        raise InputError("precision=fp16 needs CUDA; use float32 or bf16 on the CPU")
    return {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _out_of_patience(config: ExperimentConfig, progress: Progress) -> bool:
    patience = config.early_stopping_patience
    return bool(patience) and progress.epochs_without_gain >= patience


def _diverged(what: str, step: int, config: ExperimentConfig) -> RunError:
    return RunError(
        f"{what} at step {step:,}: training has diverged; try a lower lr (now {config.lr:g}), "
        "clip_norm=1, or precision=float32"
    )


def _epoch_bar(config: ExperimentConfig, epoch: int, steps: int, step: int) -> tqdm:
    return tqdm(
        total=steps,
        initial=step % steps,
        desc=f"epoch {epoch + 1}/{config.max_epochs}",
        unit=" steps",
        disable=None,
    )


def _validate(
    model: SASRec,
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
