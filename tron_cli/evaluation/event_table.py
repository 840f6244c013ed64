"""Table of predicted events, as Parquet or CSV, from which every figure can be recomputed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars

from tron_cli.data.histories import Predictions
from tron_cli.evaluation.trec import Ids, repeat
from tron_cli.files import written_alone


def write_event_table(
    path: Path,
    predictions: Predictions,
    item_ids: np.ndarray,
    session_ids: Ids = None,
    user_ids: Ids = None,
) -> None:
    """Write a row with session, [user], event, target and rank for each event, atomically.

    session and user: original ids, where known (else the number of the session in the split, and no
    user). target: original item id. event: place of the target in the session, from 0. rank: null
    (in CSV: empty) where the target was filtered out, which is a miss. Where original session ids
    repeat, a column session_number distinguishes the sessions.
    """
    session_E = predictions.session_E
    columns: dict[str, Any] = {"session": session_E}
    if session_ids is not None:
        columns["session"] = session_ids[session_E]
        if repeat(session_ids):
            columns["session_number"] = session_E
    if user_ids is not None:
        columns["user"] = user_ids[session_E]
    columns["event"] = predictions.event_E
    columns["target"] = item_ids[predictions.target_E - 1]
    rank = polars.Series("rank", predictions.rank_E).replace(0, None)
    table = polars.DataFrame([*(_series(*column) for column in columns.items()), rank])
    with written_alone(path, "wb") as file:
        if path.suffix.lower() == ".csv":
            table.write_csv(file)
        else:
            table.write_parquet(file)


def _series(name: str, values: np.ndarray) -> polars.Series:
    """Make a column; text ids become strings, since polars would keep an array of objects as is."""
    if values.dtype == object:
        return polars.Series(name, values.tolist(), dtype=polars.String)
    return polars.Series(name, values)
