"""Saves of tables whose rows are divided among processes.

last.pt then holds all but these tables and their optimizer state. torch.distributed.checkpoint
writes these into a folder beside it, each process its own rows, and reads them with any number of
processes. The best checkpoint is one file, for which the first process collects the rows.
"""

from __future__ import annotations

import functools
import mmap
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from tron_cli.checkpoint import Checkpoint
from tron_cli.distributed.processes import Processes
from tron_cli.distributed.tables import TableShard
from tron_cli.errors import InputError, RunError
from tron_cli.models.base import Model, build_model
from tron_cli.models.tables import dividing_tables
from tron_cli.training.optim import optimizer_of

TABLES = "tables-step="  # how the folders of the tables of a last.pt are called


def without_tables(model: Model, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a model's weights, by name, but for those of its item tables."""
    tables = {table.data_ptr() for table in model.item_tables}
    return {name: each for name, each in weights.items() if each.data_ptr() not in tables}


def save_tables(
    run_dir: Path,
    step: int,
    model: Model,
    optimizer: torch.optim.Optimizer,
    average: Model | None,
) -> dict[str, Any]:
    """Write what training keeps by rows, and return what of the training state changes by that."""
    assert model.shard is not None

    def unused() -> str:
        name = f"{TABLES}{step}"
        while (run_dir / name).exists():  # the last save may be of the same step
            name += "+"
        return name

    name = model.shard.processes.of_first(unused)
    write_rows(run_dir / name, saved_by_rows(model, optimizer, average), model.shard)
    changes = {"tables": name, "optimizer": without_rows(model, optimizer.state_dict())}
    if average is not None:
        changes["weights"] = without_tables(model, model.state_dict())
    return changes


def drop_tables(run_dir: Path, *, kept: str | None) -> None:
    """Delete the folders of tables that last.pt does not name."""
    for folder in run_dir.glob(f"{TABLES}*"):
        if folder.name != kept:
            shutil.rmtree(folder, ignore_errors=True)


def saved_by_rows(
    model: Model, optimizer: torch.optim.Optimizer, average: Model | None
) -> dict[str, torch.Tensor]:
    """Return what training keeps for each row of the item tables, by name: no copies, [V, ...]."""
    found = {}
    states = optimizer.state_dict()["state"]
    parts = [("weights", model)] + ([] if average is None else [("average", average)])
    for part, network in parts:
        for number, (name, weights) in enumerate(network.named_parameters()):
            if not any(weights is table for table in network.item_tables):
                continue
            found[f"{part}.{name}"] = weights.detach()
            if network is model:
                found |= {f"{name}.{key}": values for key, values in states[number].items()}
    return found


def without_rows(model: Model, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of an optimizer but for that of the item tables, which is empty."""
    is_table = [
        any(weights is table for table in model.item_tables) for weights in model.parameters()
    ]
    kept = [
        {} if table else tensors for table, tensors in zip(is_table, state["state"], strict=True)
    ]
    return {**state, "state": kept}


def write_rows(folder: Path, tensors: Mapping[str, torch.Tensor], shard: TableShard) -> None:
    """Write the rows of all processes. Raises RunError where a file cannot be written."""
    from torch.distributed import checkpoint  # loads much that one process does not need

    try:
        checkpoint.save(_of_all_processes(tensors, shard), checkpoint_id=folder)
    except (OSError, RuntimeError, checkpoint.CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise RunError(f"cannot write {folder} ({reason}); make room for it") from error


def read_rows(folder: Path, tensors: Mapping[str, torch.Tensor], shard: TableShard | None) -> None:
    """Fill tensors with the rows that any number of processes have written.

    shard: the rows that they hold; None: all. Raises InputError where the folder does not fit.
    """
    from torch.distributed import checkpoint

    whole = dict(tensors) if shard is None else _of_all_processes(tensors, shard)
    try:
        (folder / ".metadata").stat()  # torch would log tracebacks
        with warnings.catch_warnings():  # that there is one process
            warnings.simplefilter("ignore", UserWarning)
            checkpoint.load(whole, checkpoint_id=folder, no_dist=shard is None)
    # There are as many kinds as ways to damage a file; the latter is no Exception.
    except (Exception, checkpoint.CheckpointException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise InputError(
            f"{folder}, the tables of the run's last save, is missing or damaged ({reason}); start "
            "a new run"
        ) from error


def _of_all_processes(tensors: Mapping[str, torch.Tensor], shard: TableShard) -> dict[str, Any]:
    """Return tensors [v, ...] of this process as parts of DTensors [V, ...], in the same memory."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    device = next(iter(tensors.values())).device.type
    mesh = init_device_mesh(device, (shard.processes.count,))
    return {
        name: DTensor.from_local(
            values,
            mesh,
            [Shard(0)],
            run_check=False,
            shape=torch.Size([shard.num_rows, *values.shape[1:]]),
            stride=values.stride(),
        )
        for name, values in tensors.items()
    }


def resumed(
    saved: Checkpoint, device: torch.device, processes: Processes
) -> tuple[Model, torch.optim.Optimizer, Model | None]:
    """Return model, optimizer and averaged model of a run with table_sharding=rows.

    The save may be that of any number of processes. Raises InputError where it does not fit.
    """
    model = _empty_model(saved, device, processes)
    average = _empty_model(saved, device, processes) if saved.config.ema_decay else None
    optimizer = optimizer_of(saved.config, model)
    weights = saved.training.get("weights", saved.weights)
    by_rows, state = saved_by_rows(model, optimizer, average), saved.training["optimizer"]
    if "tables" in saved.training:
        read_rows(saved.path.parent / saved.training["tables"], by_rows, model.shard)
    else:
        one = {f"weights.{name}": each for name, each in weights.items()}
        one |= {f"average.{name}": each for name, each in saved.weights.items()}
        for (name, _), tensors in zip(model.named_parameters(), state["state"], strict=True):
            one |= {f"{name}.{key}": values for key, values in tensors.items()}
        first, last = (0, None) if model.shard is None else (model.shard.first, model.shard.last)
        for name, values in by_rows.items():
            values.copy_(one[name][first:last])
    for network, whole in ((model, weights), (average, saved.weights)):
        if network is not None:
            others = without_tables(network, network.state_dict())
            network.load_state_dict({name: whole[name] for name in others}, strict=False)
    own = optimizer.state_dict()["state"]
    tensors = [
        mine if any(weights is table for table in model.item_tables) else theirs
        for weights, mine, theirs in zip(model.parameters(), own, state["state"], strict=True)
    ]
    optimizer.load_state_dict({**state, "state": tensors})
    return model, optimizer, average


def _empty_model(saved: Checkpoint, device: torch.device, processes: Processes) -> Model:
    divides = processes.count > 1
    divide = functools.partial(TableShard, processes)
    with torch.device("meta"), dividing_tables(divide) if divides else nullcontext():
        model = build_model(saved.config, saved.dataset["num_items"])
    return model.to_empty(device=device)


@contextmanager
def whole_weights(model: Model, folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Yield all weights of a model with divided tables in the first process, none in the others.

    The tables are in nameless files in `folder`, of which memory holds a few pages at a time.
    Raises RunError where they find no room.
    """
    shard = model.shard
    assert shard is not None
    files: list[mmap.mmap] = []
    with _leaving_memory(files):
        tables = {}
        for table_vD in model.item_tables:
            rows = shard.collected(table_vD.detach())
            if shard.processes.is_first:
                shape = torch.Size([shard.num_rows, table_vD.shape[1]])
                tables[table_vD.data_ptr()] = _in_file(rows, shape, table_vD.dtype, folder, files)
            else:
                assert not [*rows]
        state = model.state_dict() if shard.processes.is_first else {}
        yield {name: tables.get(values.data_ptr(), values) for name, values in state.items()}


def _in_file(
    blocks: Iterator[torch.Tensor],
    shape: torch.Size,
    dtype: torch.dtype,
    folder: Path,
    files: list[mmap.mmap],
) -> torch.Tensor:
    """Return blocks of rows as one tensor, mapped from a file without a name, added to `files`."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            size = shape.numel() * dtype.itemsize
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # otherwise a full disk would end the process
                os.posix_fallocate(file.fileno(), 0, size)
            files.append(mmap.mmap(file.fileno(), size))
    except OSError as error:
        raise RunError(f"cannot write to {folder} ({error}); make room for it") from error
    whole = torch.frombuffer(files[-1], dtype=dtype).view(shape)
    low = 0
    for rows in blocks:
        whole[low : low + len(rows)] = rows
        low += len(rows)
    return whole


@contextmanager
def _leaving_memory(files: list[mmap.mmap]) -> Iterator[None]:
    """Unmap the pages of files again and again; those used come back from the file's cache."""
    ended = threading.Event()

    def unmap() -> None:
        while not ended.wait(0.02):
            for each in files:
                each.madvise(mmap.MADV_DONTNEED)

    thread = threading.Thread(target=unmap)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
