"""The folder of a run.

    OUTPUT_DIR/RUN/
        config.json       the resolved configuration
        metrics.jsonl     a line every 20 steps, and one for each validation
        train.log         log output
        METHOD-DATASET-step=...-R@20=....pt   the best weights by val_metric
        last.pt           the latest weights and all that resuming needs
        tables-step=...   with table_sharding=rows: what last.pt then lacks, by rows of item tables
        origin.json       the checkpoints that the run started from, if any
        .torchrun.json    the job of torchrun that made the folder, if one did (`restart.py`)

Each file but the logs is written atomically. During a run its folder holds a lock.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tron_cli.checkpoint import LAST, checkpoint_name, dataset_identity, save_checkpoint
from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import Batch, whole
from tron_cli.data.dataset import Dataset
from tron_cli.distributed.processes import ALONE, Processes
from tron_cli.errors import InputError, RunError, counted
from tron_cli.files import locked, written_aside
from tron_cli.models.base import Model
from tron_cli.training import divided
from tron_cli.training.profile import phase

LOG = "train.log"
LOCK = ".lock"
METRICS = "metrics.jsonl"
NOTE = ".torchrun.json"
# Files of a run that never saved weights: its folder may be used again.
_UNSAVED = {"config.json", "origin.json", METRICS, "trace.json", LOG, LOCK, NOTE}

log = logging.getLogger("tron")


@contextmanager
def claimed(run_dir: Path, *, resume: bool = False, numbered: bool = False) -> Iterator[Path]:
    """Create the folder of a run, and keep other processes out of it during the block.

    resume: the folder exists. numbered: if it exists, take RUN_DIR-2, RUN_DIR-3, ... instead.
    Folders that the block leaves empty are removed again. Raises InputError where the folder holds
    a run (resume: where it holds none), another process writes to it, or it cannot be created.
    """
    if resume and not (run_dir / LAST).is_file():
        raise InputError(
            f"nothing to resume: expected {run_dir / LAST}, written by tron train (but not for "
            "baselines and mixed models, which are made at once: make these anew)"
        )
    made = [folder for folder in run_dir.parents if not folder.exists()]
    try:
        if not resume:
            run_dir, is_made = _made(run_dir, numbered)
            made = [run_dir, *made] if is_made else made
        with locked(run_dir / LOCK, run_dir, "choose another --name"):
            names = {entry.name for entry in run_dir.iterdir()} - _UNSAVED
            # A run that was killed while it saved its first checkpoint saved none.
            held = sorted(
                name
                for name in names
                if not name.endswith(".pt.partial") and not name.startswith(divided.TABLES)
            )
            if held and not resume:
                is_run = any(name.endswith(".pt") for name in held)
                found = "holds a run already" if is_run else f"is not empty (it holds {held[0]})"
                cure = f"continue it with `tron train --resume {run_dir}`, or "
                raise InputError(
                    f"{run_dir} {found}; {cure if LAST in held else ''}choose another --name"
                )
            yield run_dir
    finally:
        for folder in made:
            with suppress(OSError):  # it is not empty, or was never created
                folder.rmdir()


def _made(run_dir: Path, numbered: bool) -> tuple[Path, bool]:
    """Return the folder to use, and True if it is new: only one process can have created it."""
    path, number = run_dir, 1
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                path.mkdir()
                return path, True
            except FileExistsError:
                if not numbered and path.is_dir():
                    return path, False
                if not numbered:
                    raise
                number += 1
                path = run_dir.with_name(f"{run_dir.name}-{number}")
    except OSError as error:
        raise InputError(f"cannot write to the run folder {path}: {error}") from error


@dataclasses.dataclass
class Progress:
    """Progress of a run, saved in last.pt."""

    step: int = 0
    best_file: str = ""
    best_value: float = -math.inf
    epochs_without_gain: int = 0


class RunFiles:
    """Files of every run besides its checkpoints: settings, figures and log output."""

    def __init__(
        self,
        run_dir: Path,
        config: ExperimentConfig,
        origin: dict[str, Any],
        processes: Processes = ALONE,
    ) -> None:
        """Write the settings. processes: those of the run, of which only the first one writes."""
        self.run_dir = run_dir
        self.metrics_file = run_dir / METRICS
        self.processes = processes
        if not processes.is_first:
            return
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            settings = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
            with written_aside(run_dir / "config.json") as file:
                file.write(settings)
            if origin:
                with written_aside(run_dir / "origin.json") as file:
                    file.write(json.dumps(origin, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"cannot write to the run folder {run_dir}: {error}") from error

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Copy log output into the run's train.log during the block."""
        if not self.processes.is_first:
            yield
            return
        handler = logging.FileHandler(self.run_dir / LOG, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        try:
            yield
        finally:
            log.removeHandler(handler)
            handler.close()

    def write_metrics(self, **values: Any) -> None:
        if not self.processes.is_first:
            return
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


class RunFolder(RunFiles):
    """Files of a training, written atomically, with the model, optimizer and progress to save."""

    def __init__(
        self,
        run_dir: Path,
        config: ExperimentConfig,
        dataset: Dataset,
        item_ids: torch.Tensor,
        count_popularity: Callable[[], torch.Tensor],
        model: Model,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        progress: Progress,
        origin: dict[str, Any] | None = None,
        average: Model | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """Write the settings. average: the averaged model, which is then the one to keep."""
        super().__init__(run_dir, config, origin or {}, processes)
        self.origin = origin or {}
        self.config = config
        self.model = model
        self.kept_model = model if average is None else average
        self.optimizer = optimizer
        self.scaler = scaler
        self.progress = progress
        self.identity = dataset_identity(dataset)
        self.item_ids = item_ids
        self._count_popularity = count_popularity
        self._saved_at = time.monotonic()
        self._drop_later_metrics()

    def is_out_of_patience(self) -> bool:
        """Return True, and log it, if early_stopping_patience epochs brought no improvement."""
        patience, epochs = self.config.early_stopping_patience, self.progress.epochs_without_gain
        if patience == 0 or epochs < patience:
            return False
        for_epochs = counted(epochs, "epoch")
        log.info("no better %s for %s: stopped", self.config.val_metric, for_epochs)
        return True

    def is_save_due(self, logs: bool) -> bool:
        """Return True if save_every or save_minutes asks for last.pt after this step.

        The clock is read only where a line is logged anyway, so that the log does not depend on it.
        """
        config = self.config
        minutes = (time.monotonic() - self._saved_at) / 60
        if logs and 0 < config.save_minutes <= minutes:
            return True
        return config.save_every > 0 and self.progress.step % config.save_every == 0

    def finish_epoch(self, epoch: int, values: dict[str, float]) -> None:
        """Keep the weights if they are the best so far; without validation, the last ones are."""
        config, progress = self.config, self.progress
        value = values.get(config.val_metric, -math.inf)
        if not values or value > progress.best_value:
            progress.best_value = value
            progress.epochs_without_gain = 0
            progress.best_file = checkpoint_name(
                config, progress.step, values, final="final" in self.origin
            )
            self._save(self.run_dir / progress.best_file, epoch, values, training={})
        else:
            progress.epochs_without_gain += 1
        if values:
            self.write_metrics(step=progress.step, epoch=epoch, validation=values)
            shown = ", ".join(f"{name} {figure:.4f}" for name, figure in values.items())
            mark = " (best)" if progress.epochs_without_gain == 0 else ""
            log.info("epoch %s, step %s: %s%s", epoch + 1, f"{progress.step:,}", shown, mark)
        self.save_last(epoch)
        # Only now is the previous best no longer needed to resume.
        self.drop_leftovers()

    def drop_leftovers(self) -> None:
        """Delete earlier bests and half-written files of a killed run; the user's copies stay."""
        if not self.processes.is_first:
            return
        bests = f"{self.config.method}-{self.config.dataset_name}-step=*.pt"
        whole = (bests, LAST, "config.json", "origin.json", METRICS)
        own = (bests, *(f"{pattern}.partial" for pattern in whole))
        for path in (path for pattern in own for path in self.run_dir.glob(pattern)):
            if path.is_file() and path.name != self.progress.best_file:
                path.unlink()

    def save_last(self, epoch: int) -> None:
        training: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
        }
        is_averaged = self.kept_model is not self.model
        if is_averaged:
            training["weights"] = dict(self.model.state_dict())
        if self.model.shard is not None:
            self._check_finite()
            average = self.kept_model if is_averaged else None
            with phase("save"):
                training |= divided.save_tables(
                    self.run_dir, self.progress.step, self.model, self.optimizer, average
                )
        self._save(self.run_dir / LAST, epoch, {}, training)
        if self.processes.is_first:
            divided.drop_tables(self.run_dir, kept=training.get("tables"))
        self._saved_at = time.monotonic()

    def best(self) -> Path:
        """Return the best checkpoint of the finished run. Raises RunError where it is gone."""
        self.drop_leftovers()
        best = self.run_dir / self.progress.best_file
        if not best.is_file():
            raise RunError(
                f"the best checkpoint of this run was {best}, which is gone; {self.run_dir / LAST} "
                "has the latest weights"
            )
        if self.progress.best_value == -math.inf and "final" not in self.origin:
            log.info("validation is empty: nothing was selected, the last weights are kept")
        if self._ended_while_improving():
            config = self.config
            more = f"max_epochs={2 * config.max_epochs}"
            log.info(
                "the last epoch was the best: more epochs may improve %s; %s", config.val_metric,
                f"continue with `tron train --resume {self.run_dir} {more}`"
                if config.lr_schedule == "constant" else f"train again with {more}",
            )  # fmt: skip
        log.info("%s checkpoint: %s", "final" if "final" in self.origin else "best", best)
        return best

    def _ended_while_improving(self) -> bool:
        """Return True if max_epochs ended the run, and the last of several epochs was the best."""
        progress = self.progress
        return (
            self.config.max_epochs > 1
            and progress.epochs_without_gain == 0
            and progress.best_value > -math.inf
            and "final" not in self.origin
        )

    def diverged(self, what: str) -> RunError:
        """Return the error of a diverged training; what: its symptom, such as a loss of NaN."""
        return RunError(
            f"{what} at step {self.progress.step:,}: training has diverged; try a lower lr (now "
            f"{self.config.lr:g}), clip_norm=1, or precision=float32"
        )

    def _save(
        self, path: Path, epoch: int, metrics: dict[str, float], training: dict[str, Any]
    ) -> None:
        with phase("save"), self._weights(training) as weights:
            self._check_finite()
            self._collect_lanes()
            if not self.processes.is_first:
                return
            save_checkpoint(
                path,
                config=self.config,
                model=self.kept_model,
                step=self.progress.step,
                epoch=epoch,
                metrics=metrics,
                dataset=self.identity,
                item_ids=self.item_ids,
                popularity=self.popularity,
                training=training,
                origin=self.origin,
                weights=weights,
            )

    def _weights(
        self, training: dict[str, Any]
    ) -> AbstractContextManager[dict[str, torch.Tensor] | None]:
        """Yield the weights to save, where these are not those of kept_model in this process."""
        model = self.kept_model
        if model.shard is None:
            return nullcontext()
        if training:
            return nullcontext(divided.without_tables(model, model.state_dict()))
        return divided.whole_weights(model, self.run_dir)

    def _check_finite(self) -> None:
        """Raise RunError where weights are not finite, in all processes.

        The loss was finite before the last step, but the weights may not be after it.
        """
        flawed = not all(map(_is_finite, self.model.parameters()))
        if self.model.shard is not None:
            (flawed,) = self.processes.any(flawed)
        if flawed:
            raise self.diverged("the weights are not finite")

    def _collect_lanes(self) -> None:
        """Bring together the states of session-parallel lanes, which are those of their rows."""
        if self.processes.count == 1 or not self.config.session_parallel:
            return
        own = slice(self.processes.rank, None, self.processes.count)
        for values in dict.fromkeys([*self.model.buffers(), *self.kept_model.buffers()]):
            states = torch.zeros_like(values)
            states[:, own] = values[:, own]
            values.copy_(self.processes.add_up(states))

    @cached_property
    def popularity(self) -> torch.Tensor:
        """Training events of each item, counted at the first save: a start need not wait for it."""
        return self._count_popularity()

    def _drop_later_metrics(self) -> None:
        """Drop metrics that are newer than the last save, and lines that cannot be read."""
        if not self.processes.is_first or not self.metrics_file.exists():
            return
        lines = self.metrics_file.read_bytes().splitlines(keepends=True)
        steps = [_step_of(line) for line in lines]
        # A killed run leaves a last line without a line end.
        damaged = [
            place
            for place, (line, step) in enumerate(zip(lines, steps, strict=True), start=1)
            if step is None and line.endswith(b"\n")
        ]
        if damaged:
            log.warning(
                "%s: line %d of %d is damaged and left out (%d in all)",
                self.metrics_file, damaged[0], len(lines), len(damaged),
            )  # fmt: skip
        with written_aside(self.metrics_file, "wb") as file:
            for line, step in zip(lines, steps, strict=True):
                if step is not None and step <= self.progress.step:
                    file.write(line)


class StepLog:
    """Loss and speed of the steps since the last line of metrics.jsonl, and the epoch's bar."""

    def __init__(self, run: RunFolder, steps_per_epoch: int) -> None:
        self._run = run
        self._steps_per_epoch = steps_per_epoch
        self._bar: tqdm | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        self._loss_sum: torch.Tensor | float = 0.0
        self._steps = self._events = 0
        self._clock = time.perf_counter()

    def begin(self, step: int) -> None:
        """Show a new bar if this step, from 0, is the first of its epoch in this process."""
        if self._bar is None:
            epoch, done = divmod(step, self._steps_per_epoch)
            self._bar = tqdm(
                total=self._steps_per_epoch,
                initial=done,
                desc=f"epoch {epoch + 1}/{self._run.config.max_epochs}",
                unit=" steps",
                disable=None if self._run.processes.is_first else True,
            )
            self._start_anew()

    def add(self, loss: torch.Tensor, batches: Iterable[Batch]) -> None:
        """Count a step; reading its loss is left to `write`, since that waits for the device."""
        assert self._bar is not None
        self._bar.update()
        self._loss_sum = self._loss_sum + loss
        self._steps += 1
        self._events += sum(int(whole(batch).lengths_B.sum()) for batch in batches)

    def write(self, epoch: int, rate: float) -> None:
        """Write the means of these steps; rate: the learning rate of the last one.

        With several processes, the losses are shares that add up to that of a step.
        Raises RunError where the loss is not finite.
        """
        assert self._bar is not None
        assert isinstance(self._loss_sum, torch.Tensor)
        mean_loss = float(self._run.processes.add_up(self._loss_sum)) / self._steps
        if not math.isfinite(mean_loss):
            raise self._run.diverged(f"the loss is {mean_loss}")
        speed = self._events / (time.perf_counter() - self._clock)
        self._bar.set_postfix_str(f"loss {mean_loss:.4f}, {speed:,.0f} events/s")
        step = self._run.progress.step
        self._run.write_metrics(
            step=step,
            epoch=epoch,
            loss=mean_loss,
            lr=rate,
            events_per_second=round(speed),
        )
        self._start_anew()
        if step % self._steps_per_epoch == 0:
            self._bar.close()
            self._bar = None


def last_logged(run_dir: Path) -> tuple[int, int]:
    """Return the step that a run last logged and the epochs begun until then; 0, 0 for none."""
    file = run_dir / METRICS
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    for line in reversed(lines):
        step = _step_of(line)
        if step is not None:
            return step, json.loads(line)["epoch"] + 1
    return 0, 0


def _step_of(line: bytes) -> int | None:
    """Return the step that a line of metrics.jsonl is about; None where the line is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) and line.endswith(b"\n") else None


def _is_finite(weights: torch.Tensor) -> bool:
    """Return True if all are finite, without a copy: the extremes of a tensor with NaN are NaN."""
    return not weights.numel() or all(bool(each.isfinite()) for each in weights.aminmax())
