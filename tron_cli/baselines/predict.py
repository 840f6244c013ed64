"""Baseline + sessions -> exact ranks of the items that followed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from tron_cli.baselines.base import Baseline
from tron_cli.baselines.ranking import Excluded
from tron_cli.dataset import Sessions
from tron_cli.events import Predictions, predicted_events

_ROWS_AT_ONCE = 1 << 12  # sessions, then events
_WORK_AT_ONCE = 1 << 22  # numbers: some arrays of 32 MB


def predict_baseline(
    baseline: Baseline,
    sessions: Sessions,
    *,
    protocol: str,
    filter_rated: bool = False,
    full_sessions: bool = False,
    one_pass: bool = False,
    top_items: int = 0,
    progress: str | None = None,
) -> Predictions:
    """Rank the targets of `sessions` among the whole catalogue; as `evaluate.predict` does.

    Each event is predicted from its own history of up to sequence_length events; one_pass: from
    those since the sequence_length + 1 last events of its session began.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    bar = tqdm(
        total=len(sessions),
        desc=progress,
        unit=" sessions",
        unit_scale=True,
        disable=None if progress else True,
    )
    # What the histories of a session hold, together.
    length_S = sessions.lengths
    for low, high in _pieces(length_S * np.minimum(length_S, baseline.sequence_length)):
        block = predicted_events(
            sessions,
            window=baseline.sequence_length,
            protocol=protocol,
            full_sessions=full_sessions,
            one_pass=one_pass,
            first=low,
            last=high,
        )
        for first, last in _pieces(baseline.work(block)):
            histories = block[first:last]
            excluded = Excluded(*histories.seen()) if filter_rated else None
            rank_E, top_EK = baseline.rank(histories, excluded=excluded, top_items=top_items)
            event_E = histories.position_E - histories.begin_E
            columns = [histories.session_E, event_E, histories.target_E, rank_E]
            top = [] if top_EK is None else [top_EK.astype(np.int32)]
            parts.append((*columns, *top))
            bar.update(int(histories.session_E[-1]) + 1 - bar.n)
    bar.close()
    if not parts:
        nothing = np.zeros(0, dtype=np.int64)
        no_items = np.zeros((0, top_items), dtype=np.int32)
        return Predictions(nothing, nothing, nothing, nothing, no_items if top_items else None)
    session_E, event_E, target_E, rank_E, *tops = map(np.concatenate, zip(*parts, strict=True))
    return Predictions(session_E, event_E, target_E, rank_E, tops[0] if tops else None)


def _pieces(work_R: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last + 1 of a few rows at a time, so that their work fits; at least one."""
    work_before = np.cumsum(work_R)
    low = 0
    while low < len(work_R):
        done = work_before[low - 1] if low else 0
        fits = int(np.searchsorted(work_before, done + _WORK_AT_ONCE, side="right"))
        high = min(max(fits, low + 1), low + _ROWS_AT_ONCE, len(work_R))
        yield low, high
        low = high
