"""The training loop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import prepared_ahead
from tron_cli.data.dataset import Dataset
from tron_cli.distributed.processes import ALONE, Processes
from tron_cli.errors import InputError, RunError
from tron_cli.files import LAST
from tron_cli.training.optim import catch_up_all, set_rate
from tron_cli.training.profile import StepProfiler, phase
from tron_cli.training.run import StepLog
from tron_cli.training.start import scheduled_rate, start_training
from tron_cli.training.step import seed_generators

_LOG_EVERY = 20  # steps; also how often the loss is checked, since reading it waits for the device

log = logging.getLogger("tron")
_training = threading.Lock()


class InterruptedRunError(RunError):
    """The user stopped the run, which was saved."""


@contextmanager
def _alone() -> Iterator[None]:
    """Refuse a second training in this process: torch's random numbers are those of the process."""
    if not _training.acquire(blocking=False):
        raise InputError(
            "another training is under way in this process, and both would draw from the same "
            "random numbers; wait for its end, or train in a process of its own"
        )
    try:
        yield
    finally:
        _training.release()


@_alone()
def train(
    config: ExperimentConfig,
    dataset: Dataset,
    run_dir: Path,
    *,
    device: torch.device,
    resume: bool = False,
    profiler: StepProfiler | None = None,
    init_from: Path | None = None,
    final: dict[str, Any] | None = None,
    processes: Processes = ALONE,
) -> Path:
    """Train, choose the best checkpoint on validation, and return its path.

    run_dir is created if it does not exist, once config and dataset have been checked. resume:
    continue the run saved there. init_from: a checkpoint whose weights a new run starts with.
    final: the record of a `FinalStart`, whose number of steps the run takes. With a profiler,
    training ends after its last step, and the path is that of last.pt. processes: those that train
    together, each of which calls this with the same arguments. Raises InputError where the
    arguments do not fit or another training is running in this process, RunError where the loss is
    not finite, InterruptedRunError after Ctrl-C.
    """
    profiler = profiler or StepProfiler(0)
    start = start_training(
        config, dataset, run_dir, device, resume, profiler, init_from, final, processes
    )
    config, run, progress = start.config, start.run, start.run.progress
    step_log = StepLog(run, start.steps_per_epoch)
    steps, stops = range(progress.step, start.last_step), False
    with (
        run.logged(),
        _stop_signals() as stop,
        profiler.running(device, run_dir),
        ThreadPoolExecutor(1) as thread,
    ):
        prepared = prepared_ahead(start.prepare, steps, thread)
        for step in steps:
            epoch, place = divmod(step, start.steps_per_epoch)
            if place == 0 and run.is_out_of_patience():
                break
            step_log.begin(step)

            # Set the learning rate, and the seed of everything random in this step.
            rate = scheduled_rate(config, step, start.total_steps)
            set_rate(run.optimizer, rate)
            seed_generators(config.seed, step=step + 1)

            # Forward, backward, clip and update.
            with phase("batch"):
                batches = next(prepared)
            loss = start.take_step(batches)
            progress.step = step + 1
            profiler.step()

            # Log.
            logs = progress.step % _LOG_EVERY == 0
            epoch_ends = progress.step % start.steps_per_epoch == 0
            stops = bool(stop) or profiler.result is not None
            saves, stops = processes.any(run.is_save_due(logs), stops)
            step_log.add(loss, batches)
            if logs or saves or epoch_ends or stops:
                step_log.write(epoch, rate)

            # Validate, keep the best and save; or only save, so that little is lost.
            if epoch_ends:
                catch_up_all(run.optimizer)
                run.finish_epoch(epoch, start.validated(dataset))
                (stops,) = processes.any(stops or bool(stop))
            elif saves or stops:
                run.save_last(epoch)

            # Stop, also if this was requested during validation.
            if stops:
                break
    processes.wait()  # for the last save
    if profiler.result is not None:
        return run_dir / LAST
    if stops and progress.step < start.last_step:
        raise InterruptedRunError(_stopped(progress.step, start.last_step, run_dir))
    return run.best()


def _stopped(step: int, last_step: int, run_dir: Path) -> str:
    return (
        f"stopped at step {step:,} of {last_step:,} and saved; resume with "
        f"`tron train --resume {run_dir}`"
    )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Yield a list that is empty until the first Ctrl-C or SIGTERM; a second one stops at once.

    Only the main thread can handle signals: in another one the list stays empty.
    """
    received: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        log.warning("stopping after this step; press Ctrl-C again to stop at once")

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Handlers that were not installed from Python could not be restored.
    ours = {number: handler for number, handler in before.items() if handler is not None}
    try:
        for number in ours:
            signal.signal(number, note)
        yield received
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
