"""The catalogue of an earlier dataset or checkpoint, whose numbers a new dataset keeps."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tron_cli.data.catalogue import numbers_among
from tron_cli.data.dataset import Dataset, Sessions
from tron_cli.errors import InputError
from tron_cli.files import best_checkpoint
from tron_cli.prepare.filters import Steps
from tron_cli.prepare.sessions import drop_events


@dataclass(frozen=True)
class Earlier:
    """An earlier catalogue: value of --catalogue, and original ids, int64 [I] or str [I]."""

    given: str
    item_ids: np.ndarray

    @property
    def lacks(self) -> str:
        """Reason why a step dropped unknown items."""
        return f"--catalogue {self.given} lacks them"

    def numbers(self, item_ids: np.ndarray) -> np.ndarray:
        """Return the number of each of a source's ids, 0 where unknown: int32 [P].

        Raises InputError where all are unknown.
        """
        return self.checked(numbers_among(self.item_ids, item_ids), item_ids)

    def checked(self, numbers: np.ndarray, item_ids: np.ndarray) -> np.ndarray:
        """Return the numbers; raise InputError where none of the ids has one."""
        if not numbers.any():
            known, found = (", ".join(map(str, ids[:3])) for ids in (self.item_ids, item_ids))
            raise InputError(
                f"--catalogue {self.given} has none of the {len(item_ids):,} items of the source: "
                f"its ids are like {known}, the source's like {found}; name the dataset or "
                "checkpoint of the same items"
            )
        return numbers

    def known_histories(self, histories: Sessions, is_known: np.ndarray, steps: Steps) -> Sessions:
        """Return histories without unknown items, except at the end: these are targets, or lost.

        is_known: bool [P], of each position in the source's ids, by `numbers`.
        """
        is_kept = is_known[histories.items]
        is_kept[histories.offsets[1:] - 1] = True
        kept = drop_events(histories, is_kept)
        steps.record("unknown items", [kept], f"before the last: {self.lacks}")
        return kept


def earlier_catalogue(given: str | None, data_dir: Path) -> Earlier | None:
    """Read the catalogue of a checkpoint, the folder of a run, or a dataset, by folder or name.

    None where nothing is given. Raises InputError.
    """
    if given is None:
        return None
    path = Path(given)
    if path.is_file():
        return Earlier(given, _of_checkpoint(path))
    for folder in (path, data_dir / given):
        if (folder / "dataset.json").is_file():
            data = Dataset.open(folder)
            data.check_item_ids()
            return Earlier(given, np.array(data.item_ids))  # --force may replace its files
    if path.is_dir() and any(path.glob("*.pt")):
        return Earlier(given, _of_checkpoint(best_checkpoint(path)))
    raise InputError(
        f"--catalogue {given}: expected a checkpoint (.pt), the folder of a run, or a prepared "
        f"dataset, by its folder or its name in {data_dir}"
    )


def _of_checkpoint(path: Path) -> np.ndarray:
    """Read the original ids from a checkpoint, without torch."""
    try:
        with zipfile.ZipFile(path) as archive:
            described = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(described) as file:
                content = _Description(file).load()
            ids, num_items = content["item_ids"], content["dataset"]["num_items"]
            data = archive.read(f"{described.removesuffix('.pkl')}/{ids.key}")
        if ids.kind == "LongStorage":
            item_ids = np.frombuffer(data, "<i8").astype(np.int64)
        else:
            item_ids = np.array(data.decode().split("\n")[:-1], object)
        if len(item_ids) != num_items:
            raise ValueError(f"{len(item_ids):,} ids of {num_items:,} items")
    except Exception as error:  # Python raises almost anything for a damaged pickle
        raise InputError(
            f"--catalogue {path} is damaged or no tron checkpoint ({type(error).__name__}); name "
            "another, or the dataset that it was trained on"
        ) from error
    return item_ids


@dataclass(frozen=True)
class _Storage:
    """Place of a tensor's numbers in a checkpoint, and their type."""

    kind: str
    key: str


class _Description(pickle.Unpickler):
    """Unpickler that puts a `_Storage` in place of each tensor; it never runs code."""

    def persistent_load(self, pid: Any) -> _Storage:
        return _Storage(kind=pid[1], key=pid[2])

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, *shape: storage
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else name
