"""Predictions as TREC files, from which other tools compute the same figures.

The query of an event is `<session>_e<event>`, with the original id of the session, or of its user
where sessions have no id of their own. Where these repeat in the split, it is
`<id>_s<number>_e<event>`, and where there are none `s<number>_e<event>`. number is that of the
session in the split, and event is the place of the target in the session, both from 0. Only digits
follow the last `_e` and the last `_s`, so queries are unique for any ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tron_cli.data.dataset import TextIds
from tron_cli.data.histories import Predictions
from tron_cli.files import written_alone

Ids = np.ndarray | TextIds | None


def write_qrels(
    path: Path, predictions: Predictions, item_ids: np.ndarray, session_ids: Ids = None
) -> None:
    """Write a line `<query> 0 <item> 1` for each predicted event.

    session_ids: ids of all sessions of the split.
    """
    names = _names(item_ids)
    with written_alone(path) as file:
        file.writelines(
            f"{query} 0 {names[target - 1]} 1\n"
            for query, target in zip(
                _queries(predictions, session_ids), predictions.target_E, strict=True
            )
        )


def write_run(
    path: Path, predictions: Predictions, item_ids: np.ndarray, session_ids: Ids = None
) -> None:
    """Write lines `<query> Q0 <item> <rank> <score> tron`, ranks from 1.

    Scores fall strictly with the rank, so that no tool's rule for ties can change the order.
    """
    assert predictions.top_EK is not None
    names = _names(item_ids)
    depth = predictions.top_EK.shape[1]
    with written_alone(path) as file:
        file.writelines(
            f"{query} Q0 {names[item - 1]} {rank} {depth + 1 - rank} tron\n"
            for query, items in zip(
                _queries(predictions, session_ids), predictions.top_EK, strict=True
            )
            for rank, item in enumerate(items, start=1)
            if item
        )


def repeat(ids: np.ndarray | TextIds) -> bool:
    """Return True if an id of a split occurs twice."""
    rows = ids[np.arange(len(ids))]
    return len(set(rows.tolist())) < len(rows)


def _queries(predictions: Predictions, session_ids: Ids) -> Iterator[str]:
    number_S, place_E = np.unique(predictions.session_E, return_inverse=True)
    names = [f"s{number}" for number in number_S]
    if session_ids is not None:
        ids = _names(session_ids[number_S])
        if repeat(session_ids):
            names = [f"{id_}_{name}" for id_, name in zip(ids, names, strict=True)]
        else:
            names = ids
    for place, event in zip(place_E, predictions.event_E, strict=True):
        yield f"{names[place]}_e{event}"


def _names(ids: np.ndarray) -> list[str]:
    """Return ids as text, with whitespace and % escaped as %XX."""

    def escape(match: re.Match[str]) -> str:
        return "".join(f"%{byte:02X}" for byte in match.group().encode())

    return [re.sub(r"[\s%]", escape, str(id_)) for id_ in ids]
