"""The processes of one command, which torchrun starts and torch.distributed joins.

Each holds the whole model. They differ in the rows of a batch, and in the histories to rank, that
they compute.
"""

from __future__ import annotations

import functools
import itertools
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

from tron_cli.distributed.launch import rank_and_count
from tron_cli.errors import InputError, LostProcessError, RunError

# How long a process waits for another: longer than rank 0 takes to save a large model.
PATIENCE = timedelta(minutes=10)
# Shares of an evaluation end at different times, and the first process also writes the files.
PATIENCE_IN_RANKING = timedelta(hours=2)

# Numbers of the times that processes join, as in a script that trains and evaluates: the store
# keeps what they left in it before.
_JOINED = itertools.count()

Value = TypeVar("Value")

log = logging.getLogger("tron")


@dataclass(frozen=True)
class Processes:
    """The number of processes that work together, and the rank of this one among them.

    Methods that communicate are called by all of them, in the same order. They raise RunError where
    another process has ended.
    """

    rank: int = 0
    count: int = 1

    @property
    def share(self) -> tuple[int, int]:
        """Rank and number: this process does what has the numbers rank, rank + number, ..."""
        return self.rank, self.count

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
        with _together():
            lengths = self._lengths(tensors[0])
            return [self._gathered_rows(values, lengths) for values in tensors]

    def to_first(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Return each tensor as `gathered` in the first process, and as it is in the others.

        The tensors, on the CPU, are sent to the first process alone, which can hold many more.
        """
        if self.count == 1:
            return [*tensors]
        with _together():
            lengths = self._lengths(tensors[0])
            return [self._rows_in_first(values.contiguous(), lengths) for values in tensors]

    def _rows_in_first(self, values: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        if not self.is_first:
            if len(values):
                dist.send(values, 0)
            return values
        found = values.new_empty(sum(lengths), *values.shape[1:])
        own, *others = found.split(lengths)
        own.copy_(values)
        for rank, part in enumerate(others, start=1):
            if len(part):
                dist.recv(part, rank)
        return found

    def _lengths(self, values: torch.Tensor) -> list[int]:
        """Return the number of rows that each process has."""
        size = torch.tensor([len(values)])
        sizes = [torch.empty_like(size) for _ in range(self.count)]
        dist.all_gather(sizes, size)
        return [int(each) for each in sizes]

    def exchanged(self, values: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """Send some rows to each process, and return those that each has sent to this one.

        sent, received: how many, by rank; the rows stand in this order.
        """
        if self.count == 1:
            return values
        found = values.new_empty(sum(received), *values.shape[1:])
        with _together():
            dist.all_to_all_single(found, values.contiguous(), received, sent)
        return found

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

    def collected(self, value: Value) -> list[Value]:
        """Return the values of all processes in the first one, and nothing in the others."""
        if self.count == 1:
            return [value]
        values: list[Any] | None = [None] * self.count if self.is_first else None
        with _together():
            dist.gather_object(value, values)
        return values or []

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
        raise LostProcessError(
            "another process has ended or cannot be reached; its own message says why, and `tron "
            f"train --resume` continues a training from its last save ({reason})"
        ) from error


def started_by_torchrun() -> Processes:
    """Return rank and number of the processes that torchrun started; one without torchrun."""
    return Processes(*rank_and_count())


def device_of_process(device: torch.device) -> torch.device:
    """Return the GPU of this process where several share a machine's GPUs; else the device."""
    if started_by_torchrun().count == 1 or device.type != "cuda":
        return device
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(own)
    return own


@functools.cache
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
def joined(device: torch.device, patience: timedelta = PATIENCE) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did; only the first one logs.

    device: that of this process. patience: how long they wait for each other.
    Where several processes share a GPU, gloo takes NCCL's place.
    """
    processes = started_by_torchrun()
    if processes.count == 1:
        yield processes
        return
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes.count))
    own_gpu = device.type == "cuda" and local <= torch.cuda.device_count()
    with _together():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if own_gpu else "gloo",
            store=dist.PrefixStore(f"tron-{next(_JOINED)}", _store()),
            rank=processes.rank,
            world_size=processes.count,
            timeout=patience,
        )
    level = log.level
    if not processes.is_first:
        log.setLevel(logging.ERROR)
    try:
        yield processes
    finally:
        log.setLevel(level)
        dist.destroy_process_group()
