"""Splits: which sessions train, which validate, which test, and what is left out on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tron_cli.dataset import Sessions
from tron_cli.prepare.events import drop_events, first_times, last_times, take, take_where
from tron_cli.prepare.filters import drop_short

DAY = 86_400_000  # ms

Rule = Callable[[Sessions, float], np.ndarray]
"""(sessions, days) -> bool [S]: which sessions make up the last stretch of `days` days."""


@dataclass(frozen=True)
class Splits:
    """Sessions of the three splits; items are positions in the original ids.

    period: the whole training period, whose items are the catalogue. train and val come from it;
    left_out counts what of it is in neither, by reason.
    """

    period: Sessions
    train: Sessions
    val: Sessions
    test: Sessions
    left_out: dict[str, int] = field(default_factory=dict)


def by_last_event(sessions: Sessions, days: float) -> np.ndarray:
    """TRON's rule for Yoochoose: ends at most `days` before the latest start of any session."""
    return last_times(sessions) >= first_times(sessions).max() - days * DAY


def by_start_day(sessions: Sessions, days: float) -> np.ndarray:
    """TRON's rule for Diginetica: starts on the day (UTC) of the latest start, or up to `days`
    calendar days before it; so the stretch has days + 1 calendar days."""
    starts = first_times(sessions)
    midnight = starts.max() // DAY * DAY
    return starts >= midnight - days * DAY


def by_start(sessions: Sessions, days: float) -> np.ndarray:
    """Starts at most `days` before the latest start of any session."""
    starts = first_times(sessions)
    return starts >= starts.max() - days * DAY


def split_by_time(
    sessions: Sessions,
    rule: Rule,
    *,
    test_days: float,
    val_days: float,
    max_val_sessions: int,
    seed: int,
    cut_late_events: bool = False,
) -> Splits:
    """Test by the rule, then validation from the training period by the same rule (0 days: none).

    cut_late_events: sessions that start earlier than a held-out stretch lose the events that lie in
    it, and are dropped where fewer than two remain. (The published splits of Yoochoose and
    Diginetica keep them.)
    """
    late = {"late_sessions": 0, "late_events": 0}

    def divide(whole: Sessions, days: float) -> tuple[Sessions, Sessions]:
        held_out = rule(whole, days) if len(whole) else np.zeros(0, bool)
        before, after = take_where(whole, ~held_out), take_where(whole, held_out)
        if not cut_late_events or not len(after) or not len(before):
            return before, after
        assert before.times is not None
        cut = drop_short(drop_events(before, before.times < first_times(after).min()), 2)
        late["late_sessions"] += len(before) - len(cut)
        late["late_events"] += len(before.items) - len(cut.items)
        return cut, after

    period, test = divide(sessions, test_days)
    train, held_out = (
        divide(period, val_days) if val_days > 0 else (period, take_where(period, _none(period)))
    )
    val = sample(held_out, max_val_sessions, seed)
    return Splits(
        period,
        train,
        val,
        test,
        {
            "val_sessions_beyond_sample": len(held_out) - len(val),
            "val_events_beyond_sample": len(held_out.items) - len(val.items),
            **(late if cut_late_events else {}),
        },
    )


def split_last_items(
    histories: Sessions, val_rows: np.ndarray, *, train_without: np.ndarray
) -> Splits:
    """Leave-one-out: every row of test is a whole history, whose last item is the target.

    val_rows: int64, histories that also validate, on their second last item. train_without: int64
    [S], how many of its last events each history keeps from training.
    """
    lengths = histories.lengths
    position = np.arange(len(histories.items)) - np.repeat(histories.offsets[:-1], lengths)
    from_end = np.repeat(lengths, lengths) - position  # 1 for the last event
    period = drop_events(histories, from_end > 1)
    train = drop_events(histories, from_end > np.repeat(train_without, lengths))
    kept = drop_short(train, 2)
    return Splits(
        period,
        kept,
        take(period, val_rows),
        histories,
        {
            "short_train_sessions": len(train) - len(kept),
            "short_train_events": len(train.items) - len(kept.items),
        },
    )


def sample(sessions: Sessions, most: int, seed: int) -> Sessions:
    """A seeded sample of at most `most` sessions, in their order."""
    if len(sessions) <= most:
        return sessions
    return take(sessions, sample_rows(len(sessions), most, seed))


def sample_rows(count: int, most: int, seed: int) -> np.ndarray:
    """int64: at most `most` of the rows 0..count - 1, chosen with the seed, ascending."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def _none(sessions: Sessions) -> np.ndarray:
    return np.zeros(len(sessions), bool)
