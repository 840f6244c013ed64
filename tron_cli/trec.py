"""Predictions as TREC files, which any evaluation tool scores to the same figures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from tron_cli.errors import InputError
from tron_cli.events import Predictions
from tron_cli.files import written_aside


def write_qrels(path: Path, predictions: Predictions, item_ids: np.ndarray) -> None:
    """`s<session>_e<event> 0 <item> 1`, a line for each predicted event."""
    names = _names(item_ids)
    _write(
        path,
        (
            f"{query} 0 {names[target - 1]} 1\n"
            for query, target in zip(_queries(predictions), predictions.target_E, strict=True)
        ),
    )


def write_run(path: Path, predictions: Predictions, item_ids: np.ndarray) -> None:
    """`s<session>_e<event> Q0 <item> <rank> <score> tron`, ranks from 1.

    The scores fall strictly with the rank, so that no tool's rule for ties can change the order.
    """
    assert predictions.top_EK is not None
    names = _names(item_ids)
    depth = predictions.top_EK.shape[1]
    _write(
        path,
        (
            f"{query} Q0 {names[item - 1]} {rank} {depth + 1 - rank} tron\n"
            for query, items in zip(_queries(predictions), predictions.top_EK, strict=True)
            for rank, item in enumerate(items, start=1)
            if item
        ),
    )


def _queries(predictions: Predictions) -> Iterator[str]:
    for session, event in zip(predictions.session_E, predictions.event_E, strict=True):
        yield f"s{session}_e{event}"


def _names(item_ids: np.ndarray) -> list[str]:
    """Ids without whitespace: it becomes %XX, as does the % that such an escape begins with."""

    def escape(match: re.Match[str]) -> str:
        return "".join(f"%{byte:02X}" for byte in match.group().encode())

    return [re.sub(r"[\s%]", escape, str(item)) for item in item_ids]


def check_writable(path: Path) -> None:
    """Raise InputError where no file can be written, before hours of ranking."""
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        partial = path.with_name(path.name + ".partial")
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error}); name a file in a folder that exists"
        ) from error


def _write(path: Path, lines: Iterable[str]) -> None:
    try:
        with written_aside(path) as file:
            file.writelines(lines)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error
