"""`tron check`: find damage in a prepared dataset, a checkpoint or a run."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tron_cli.cli.options import DATASETS, AsJson, DataDir, Plugins, given_path
from tron_cli.errors import InputError, counted
from tron_cli.text_table import format_table

if TYPE_CHECKING:
    from tron_cli.data.dataset import Dataset


def check(
    target: Annotated[
        Path,
        typer.Argument(
            parser=given_path,
            metavar="DATASET|CKPT",
            help="Name or folder of a dataset, a .pt file, or a run folder.",
        ),
    ],
    data_dir: DataDir = DATASETS,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Find damage in a dataset, a checkpoint or a run.

    Everything is read and compared with its fingerprints or checksums.
    """
    parts = _parts(target, data_dir)
    faults = [part.fault for part in parts if part.fault is not None]
    if as_json:
        print(json.dumps({"parts": [dataclasses.asdict(part) for part in parts], "faults": faults}))
    else:
        rows = [[part.name, part.holds, "damaged" if part.fault else "sound"] for part in parts]
        print(format_table(["part", "holds", "state"], rows))
    for fault in faults:
        print(f"tron: {fault}", file=sys.stderr)
    if faults:
        raise typer.Exit(2)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Part of a dataset or a checkpoint, with a description of its content or its fault."""

    name: str
    holds: str
    fault: str | None


def _parts(path: Path, data_dir: Path) -> list[_Part]:
    """Check a checkpoint, all checkpoints of a run's folder, or a dataset, by folder or name.

    Raises InputError where there is none of these, or code that a checkpoint needs was not named.
    """
    if path.is_dir() and (files := sorted(path.glob("*.pt"))):
        return [_part(file.name, partial(_checkpoint, file)) for file in files]
    if path.is_file():
        return [_part(path.name, partial(_checkpoint, path))]
    return _dataset(path if (path / "dataset.json").is_file() else data_dir / path)


def _dataset(path: Path) -> list[_Part]:
    from tron_cli.data.dataset import Dataset
    from tron_cli.data.folder import SPLITS

    data = Dataset.open(path)
    splits = [_part(split, partial(_split, data, split)) for split in SPLITS]
    return [_part("item ids", partial(_item_ids, data)), *splits]


def _part(name: str, describe: Callable[[], str]) -> _Part:
    from tron_cli.config.plugins import UnnamedCodeError  # not needed for `tron --help`

    try:
        return _Part(name, describe(), None)
    except UnnamedCodeError:  # the file itself is sound
        raise
    except InputError as error:
        return _Part(name, "", str(error))


def _item_ids(data: Dataset) -> str:
    import numpy as np

    data.check_item_ids(fully=True)
    distinct = len(np.unique(data.item_ids))
    if distinct < data.num_items:
        raise InputError(
            f"the list of item ids of {data.path} names "
            f"{counted(data.num_items - distinct, 'item')} twice; prepare it again"
        )
    return counted(data.num_items, "item")


def _split(data: Dataset, name: str) -> str:
    sessions = data.checked_split(name, fully=True)
    data.check_files(name, fully=True)
    data.session_ids(name)
    data.user_ids(name)
    data.lost_of_sessions(name)
    return f"{counted(len(sessions), 'session')}, {counted(len(sessions.items), 'event')}"


def _checkpoint(file: Path) -> str:
    import torch

    from tron_cli.checkpoint import load_checkpoint
    from tron_cli.data.integrity import fingerprint

    found = load_checkpoint(file)
    found.build_model(torch.device("cpu"))
    known = found.dataset.get("catalogue_fingerprint")
    if known not in (None, fingerprint(found.item_ids.numpy())):
        raise InputError(f"the item ids in {file} are not those of its dataset; train again")
    bad = [name for name, values in found.weights.items() if not bool(values.isfinite().all())]
    if bad:
        raise InputError(f"{file} has weights that are not finite ({bad[0]}); train again")
    return f"{found.method}, step {found.step:,}, {counted(len(found.weights), 'array')}"
