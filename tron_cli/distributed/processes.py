"""The processes of a training, which torchrun starts and torch.distributed joins.

Each holds the whole model. They differ in the rows of a batch, and in the histories of a
validation, that they compute.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from tron_cli.errors import InputError, RunError

# How long a process waits for another: longer than rank 0 takes to save a large model.
PATIENCE = timedelta(minutes=10)

Value = TypeVar("Value")

log = logging.getLogger("tron")


@dataclass(frozen=True)
class Processes:
    """The number of processes that train together, and the rank of this one among them.

    Methods that communicate are called by all of them, in the same order. They raise RunError where
    another process has ended.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """True in the process that writes files, logs and shows progress."""
        return self.rank == 0

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """Replace values by their sum over all processes, in place, and return them."""
        if self.count > 1:
            with _together():
                dist.all_reduce(values)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag if it is set in any process."""
        if self.count == 1:
            return [*flags]
        sums = self.add_up(torch.tensor([int(flag) for flag in flags]))
        return [count > 0 for count in sums.tolist()]

    def gathered(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Return each tensor with the rows of all processes, in the order of their ranks.

        The tensors of one process have equally many rows; each is sent with as many as any has.
        """
        if self.count == 1:
            return [*tensors]
        size = torch.tensor([len(tensors[0])])
        sizes = [torch.empty_like(size) for _ in range(self.count)]
        with _together():
            dist.all_gather(sizes, size)
            lengths = [int(each) for each in sizes]
            return [self._gathered_rows(values, lengths) for values in tensors]

    def _gathered_rows(self, values: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        padded = values.new_zeros(max(lengths), *values.shape[1:])
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def of_first(self, work: Callable[[], Value]) -> Value:
        """Return what `work` returns in the first process, or raise what it raises there."""
        if self.count == 1:
            return work()
        done: list[Any] = [None, None]
        if self.is_first:
            try:
                done[0] = work()
            except (InputError, RunError) as error:
                done[1] = error
        with _together():
            dist.broadcast_object_list(done)
        if done[1] is not None:
            raise done[1]
        return done[0]

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.any(False)


ALONE = Processes()


@contextmanager
def _together() -> Iterator[None]:
    """Raise RunError where a process cannot reach the others any more."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RunError(
            "another process of this training has ended or cannot be reached; its own message says "
            f"why, and `tron train --resume` continues from the last save ({reason})"
        ) from error


def started_by_torchrun() -> Processes:
    """Return rank and number of the processes that torchrun started; one without torchrun."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in os.environ for name in names):
        return ALONE
    return Processes(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def device_of_process(device: torch.device) -> torch.device:
    """Return the GPU of this process where several share a machine's GPUs; else the device."""
    if started_by_torchrun().count == 1 or device.type != "cuda":
        return device
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(own)
    return own


def _store() -> dist.Store:
    """Return the store in which processes find each other.

    torchrun keeps it over restarts, with the addresses of processes that have ended. On one machine
    all processes know how often they were restarted; for several see docs/scaling.md.
    """
    store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return store
    return dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did; only the first one logs.

    device: that of this process. Where several processes share a GPU, gloo takes NCCL's place.
    """
    processes = started_by_torchrun()
    if processes.count == 1:
        yield processes
        return
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes.count))
    own_gpu = device.type == "cuda" and local <= torch.cuda.device_count()
    with _together():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if own_gpu else "gloo", store=_store(), rank=processes.rank,
            world_size=processes.count, timeout=PATIENCE,
        )  # fmt: skip
    level = log.level
    if not processes.is_first:
        log.setLevel(logging.ERROR)
    try:
        yield processes
    finally:
        log.setLevel(level)
        dist.destroy_process_group()
