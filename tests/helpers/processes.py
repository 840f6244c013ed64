"""Work done by several processes that torch.distributed joins, as torchrun would start them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from tron_cli.distributed.processes import Processes, joined


def in_processes(count: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Return what work(processes, *arguments) returns in each of `count` new processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    given = (count, port, torch.get_num_threads(), work, folder, arguments)
    multiprocessing.spawn(_one, given, nprocs=count)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _one(
    rank: int,
    count: int,
    port: int,
    threads: int,
    work: Callable[..., Any],
    folder: Path,
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(threads)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="localhost", MASTER_PORT=str(port),
    )  # fmt: skip
    with joined(torch.device("cpu")) as processes:
        torch.save(work(processes, *arguments), folder / f"{rank}.pt")


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the work of several processes returns in one."""
    return work(Processes(), *arguments)
