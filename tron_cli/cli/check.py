"""Read all of a prepared dataset or of a checkpoint: is it what was written?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tron_cli.data.dataset import Dataset
from tron_cli.data.folder import SPLITS
from tron_cli.data.integrity import fingerprint
from tron_cli.errors import InputError
from tron_cli.plugins import UnnamedCodeError


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of what was checked: what it holds, or the sentence that names its fault."""

    name: str
    holds: str
    fault: str | None


def check(target: str, data_dir: Path) -> list[Part]:
    """Check a checkpoint, all checkpoints of a run's folder, or a dataset, by folder or name.

    Raises InputError where there is none of these, or a checkpoint's code was not named.
    """
    path = Path(target)
    if path.is_dir() and (files := sorted(path.glob("*.pt"))):
        return [_checkpoint(file) for file in files]
    if path.is_file():
        return [_checkpoint(path)]
    return _dataset(path if (path / "dataset.json").is_file() else data_dir / target)


def _dataset(path: Path) -> list[Part]:
    data = Dataset.open(path)
    return [
        _part("item ids", lambda: _check_item_ids(data)),
        *(_part(split, lambda split=split: _check_split(data, split)) for split in SPLITS),  # type: ignore[misc]
    ]


def _checkpoint(file: Path) -> Part:
    return _part(file.name, lambda: _check_checkpoint(file))


def _part(name: str, look: Callable[[], str]) -> Part:
    try:
        return Part(name, look(), None)
    except UnnamedCodeError:  # nothing is wrong with the file
        raise
    except InputError as error:
        return Part(name, "", str(error))


def _check_item_ids(data: Dataset) -> str:
    data.check_item_ids(fully=True)
    distinct = len(np.unique(data.item_ids))
    if distinct < data.num_items:
        raise InputError(
            f"the list of item ids of {data.path} names {data.num_items - distinct:,} items twice; "
            "prepare it again"
        )
    return f"{data.num_items:,} items"


def _check_split(data: Dataset, name: str) -> str:
    sessions = data.checked_split(name, fully=True)
    data.check_files(name, fully=True)
    data.session_ids(name)
    data.user_ids(name)
    data.lost_of_sessions(name)
    return f"{len(sessions):,} sessions, {len(sessions.items):,} events"


def _check_checkpoint(file: Path) -> str:
    import torch

    from tron_cli.checkpoint import load_checkpoint

    found = load_checkpoint(file)
    found.build_model(torch.device("cpu"))
    known = found.dataset.get("catalogue_fingerprint")
    if known not in (None, fingerprint(found.item_ids.numpy())):
        raise InputError(f"the item ids in {file} are not those of its dataset; train again")
    bad = [name for name, values in found.weights.items() if not bool(values.isfinite().all())]
    if bad:
        raise InputError(f"{file} has weights that are not finite ({bad[0]}); train again")
    return f"{found.config.method}, step {found.step:,}, {len(found.weights)} arrays"
