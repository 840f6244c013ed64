"""The folder of a run.

    OUTPUT_DIR/RUN/
        config.json       the resolved configuration
        metrics.jsonl     a line every 20 steps, and one for each validation
        train.log         log output
        METHOD-DATASET-step=...-R@20=....pt   the best weights by val_metric
        last.pt           the latest weights and all that resuming needs

Each file but the logs is written aside and renamed. While a run goes on, its folder holds a lock.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from tron_cli.checkpoint import LAST, checkpoint_name, dataset_identity, save_checkpoint
from tron_cli.config import ExperimentConfig
from tron_cli.data.dataset import Dataset
from tron_cli.errors import InputError, RunError
from tron_cli.files import locked, written_aside
from tron_cli.models.base import Model
from tron_cli.training.optim import Optimizer

LOG = "train.log"
LOCK = ".lock"
# What a run leaves that never saved its weights: its folder may be used again.
_UNSAVED = {"config.json", "metrics.jsonl", "trace.json", LOG, LOCK}

log = logging.getLogger("tron")


@contextmanager
def claimed(run_dir: Path, *, resume: bool = False, numbered: bool = False) -> Iterator[Path]:
    """Make the folder of a run, and keep other processes out of it during the block.

    resume: it is there already. numbered: where it is, take RUN_DIR-2, RUN_DIR-3, ... instead.
    Folders that the block leaves empty are removed again. Raises InputError where the folder holds
    a run (resume: where it holds none), another process writes to it, or it cannot be made.
    """
    if resume and not (run_dir / LAST).is_file():
        raise InputError(
            f"nothing to resume: expected {run_dir / LAST}, written by tron train (but not for "
            "baselines, which are fitted at once: start these anew)"
        )
    made = [folder for folder in run_dir.parents if not folder.exists()]
    try:
        if not resume:
            run_dir, is_made = _made(run_dir, numbered)
            made = [run_dir, *made] if is_made else made
        busy = f"another tron train writes to {run_dir}; wait for its end, or choose another --name"
        with locked(run_dir / LOCK, busy):
            held = sorted({entry.name for entry in run_dir.iterdir()} - _UNSAVED)
            if held and not resume:
                cure = f", or go on with its run: --resume {run_dir}" if LAST in held else ""
                raise InputError(
                    f"{run_dir} is in use (it holds {held[0]}); choose another --name{cure}"
                )
            yield run_dir
    finally:
        for folder in made:
            with suppress(OSError):  # it is not empty, or was never made
                folder.rmdir()


def _made(run_dir: Path, numbered: bool) -> tuple[Path, bool]:
    """The folder to use, and whether it is new: only one process can have made it."""
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
    """Where a run stands; saved in last.pt."""

    step: int = 0
    best_file: str = ""
    best_value: float = -math.inf
    epochs_without_gain: int = 0


class RunFiles:
    """Files that every run leaves, but its checkpoints: settings, figures and log output."""

    def __init__(self, run_dir: Path, config: ExperimentConfig) -> None:
        self.run_dir = run_dir
        self.metrics_file = run_dir / "metrics.jsonl"
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            settings = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
            with written_aside(run_dir / "config.json") as file:
                file.write(settings)
        except OSError as error:
            raise InputError(f"cannot write to the run folder {run_dir}: {error}") from error

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Copy what is said into the run's train.log meanwhile."""
        handler = logging.FileHandler(self.run_dir / LOG, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        try:
            yield
        finally:
            log.removeHandler(handler)
            handler.close()

    def write_metrics(self, **values: Any) -> None:
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


class RunFolder(RunFiles):
    """The files of a training, written aside and renamed, and what they hold of it meanwhile."""

    def __init__(
        self,
        run_dir: Path,
        config: ExperimentConfig,
        dataset: Dataset,
        item_ids: torch.Tensor,
        model: Model,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        progress: Progress,
    ) -> None:
        super().__init__(run_dir, config)
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.progress = progress
        self.identity = dataset_identity(dataset)
        self.item_ids = item_ids
        self._drop_later_metrics()

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
        """Delete former bests, and what a kill left half-written; a person's own copies stay."""
        bests = f"{self.config.method}-{self.config.dataset_name}-step=*.pt"
        whole = (bests, LAST, "config.json", "metrics.jsonl")
        own = (bests, *(f"{pattern}.partial" for pattern in whole))
        for path in (path for pattern in own for path in self.run_dir.glob(pattern)):
            if path.is_file() and path.name != self.progress.best_file:
                path.unlink()

    def save_last(self, epoch: int) -> None:
        training = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
        }
        self._save(self.run_dir / LAST, epoch, {}, training)

    def diverged(self, what: str) -> RunError:
        """Return the error to raise where `what` shows that training cannot go on."""
        return RunError(
            f"{what} at step {self.progress.step:,}: training has diverged; try a lower lr (now "
            f"{self.config.lr:g}), clip_norm=1, or precision=float32"
        )

    def _save(
        self, path: Path, epoch: int, metrics: dict[str, float], training: dict[str, Any]
    ) -> None:
        # The loss was finite before the last step, and need not be after it.
        if not all(map(_is_finite, self.model.parameters())):
            raise self.diverged("the weights are not finite")
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
        """Drop metrics that are newer than the last save, and lines that cannot be read."""
        if not self.metrics_file.exists():
            return
        lines = self.metrics_file.read_bytes().splitlines(keepends=True)
        steps = [_step_of(line) for line in lines]
        # A last line without an end is what a kill leaves.
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


def _step_of(line: bytes) -> int | None:
    """Return the step that a line of metrics.jsonl is about; None where the line is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) and line.endswith(b"\n") else None


def _is_finite(weights: torch.Tensor) -> bool:
    """Look without a copy: the extremes of a tensor with NaN are NaN."""
    return all(bool(extreme.isfinite()) for extreme in weights.aminmax())
