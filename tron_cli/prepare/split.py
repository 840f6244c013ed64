"""Splits of the sessions into train, val and test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tron_cli.data.dataset import Sessions
from tron_cli.errors import InputError
from tron_cli.prepare.filters import Steps, drop_short
from tron_cli.prepare.sessions import drop_events, first_times, last_times, take, take_where

DAY = 86_400_000  # ms
WHY_LATE = "in or after a held-out stretch, and sessions with fewer than 2 before it"

Rule = Callable[[Sessions, float], np.ndarray]
"""(sessions, days) -> bool [S]: the sessions of the last `days` days."""


ValUsers = int | Literal["all"]
"""Number of users that validate, each on the second last event of the history."""


@dataclass(frozen=True)
class Splits:
    """Sessions of the three splits; items are positions in the original ids.

    period: the whole training period, whose items are the catalogue. train and val come from it.
    in_others: with leave-one-out, bool [S], the histories of test that are in train or val as well.
    """

    period: Sessions
    train: Sessions
    val: Sessions
    test: Sessions
    in_others: np.ndarray | None = None


def moment(ms: int) -> str:
    """Format a time to the minute. By NumPy, whose years do not end with 9999."""
    return str(np.datetime64(int(ms), "ms").astype("datetime64[m]")).replace("T", " ")


def by_last_event(sessions: Sessions, days: float) -> np.ndarray:
    """Hold out sessions that end at most `days` before the latest start: TRON's for Yoochoose."""
    return last_times(sessions) >= first_times(sessions).max() - days * DAY


def by_start_day(sessions: Sessions, days: float) -> np.ndarray:
    """Hold out sessions that start in the last days + 1 calendar days (UTC).

    This is TRON's rule for Diginetica: the day of the latest start, and `days` before it.
    """
    starts = first_times(sessions)
    midnight = starts.max() // DAY * DAY
    return starts >= midnight - days * DAY


def by_start(sessions: Sessions, days: float) -> np.ndarray:
    """Hold out sessions that start at most `days` before the latest start."""
    starts = first_times(sessions)
    return starts >= starts.max() - days * DAY


def split_by_time(
    sessions: Sessions,
    rule: Rule,
    steps: Steps,
    *,
    test_days: float,
    val_days: float,
    max_val_sessions: int,
    seed: int,
    latest: tuple[int, str],
    cut_late_events: bool = False,
    test_from: int | None = None,
    val_from: int | None = None,
    test: Sessions | None = None,
) -> Splits:
    """Hold out test by the rule, then val from the training period by the same rule (0 days: none).

    test_from, val_from (ms): hold out the sessions that start then or later instead. test: the test
    sessions, where the source gives them. latest: the latest time of `sessions` as they were read
    (ms), and its file and line.
    cut_late_events: sessions that start earlier than a held-out stretch lose the events that lie in
    it, and are dropped where fewer than two remain. (The published splits of Yoochoose and
    Diginetica keep them.)
    """
    late_sessions = late_events = 0

    def divide(
        whole: Sessions, days: float, since: int | None, option: str
    ) -> tuple[Sessions, Sessions]:
        nonlocal late_sessions, late_events
        if not len(whole):
            return whole, whole
        held_out = rule(whole, days) if since is None else first_times(whole) >= since
        if whole is sessions and since is None:
            check_latest(first_times(whole), held_out, *latest)
        before, after = take_where(whole, ~held_out), take_where(whole, held_out)
        if since is not None and not (len(before) and len(after)):
            starts = first_times(whole)
            raise InputError(
                f"{option} {moment(since)}: {'every' if len(after) else 'no'} session to split "
                f"starts then or later; they start from {moment(starts.min())} to "
                f"{moment(starts.max())} (UTC)"
            )
        if not cut_late_events or not len(after) or not len(before):
            return before, after
        assert before.times is not None
        limit = first_times(after).min() if since is None else since
        cut = drop_short(drop_events(before, before.times < limit), 2)
        late_sessions += len(before) - len(cut)
        late_events += len(before.items) - len(cut.items)
        return cut, after

    period = sessions
    if test is None:
        period, test = divide(sessions, test_days, test_from, "--test-from")
    train, held_out = period, take_where(period, _none(period))
    if val_days > 0 or val_from is not None:
        train, held_out = divide(period, val_days, val_from, "--val-from")
    if cut_late_events:
        steps.drop("late events", late_sessions, late_events, WHY_LATE)
    val = sample(held_out, max_val_sessions, seed, steps)
    return Splits(period, train, val, test)


def check_latest(starts: np.ndarray, is_held_out: np.ndarray, latest: int, place: str) -> None:
    """Refuse a log whose latest times are wrong, so that almost nothing would be held out.

    starts: int64 [S] ms, when each session starts; is_held_out: bool [S], counted back from the
    latest time (ms), which is found at `place`. It counts as wrong if it is over a year, and over
    twice the duration of the later half of the log, after the start of all sessions not held out.
    """
    late, early = starts[is_held_out], starts[~is_held_out]
    if not len(early) or len(late) > max(1, len(starts) // 100):
        return
    gap = late.min(initial=latest) - early.max()
    if gap > max(365 * DAY, 2 * (early.max() - np.median(early))):
        raise InputError(
            f"{place}: the latest time, {moment(latest)}, is {gap / 365.25 / DAY:,.0f} years after "
            f"the other sessions, so that {len(late):,} of {len(starts):,} would be held out; "
            "correct it or remove it"
        )


def split_last_items(
    histories: Sessions, val_rows: np.ndarray, steps: Steps, *, train_without: np.ndarray
) -> Splits:
    """Split leave-one-out: every row of test is a whole history, whose last item is the target.

    val_rows: int64, histories that also validate, on their second last item. train_without: int64
    [S], how many of its last events each history keeps from training.
    """
    lengths = histories.lengths
    position = np.arange(len(histories.items)) - np.repeat(histories.offsets[:-1], lengths)
    from_end = np.repeat(lengths, lengths) - position  # 1 for the last event
    period = drop_events(histories, from_end > 1)
    train = drop_events(histories, from_end > np.repeat(train_without, lengths))
    kept = drop_short(train, 2)
    targets = len(val_rows) + len(histories)
    steps.drop(
        "held back", 0, len(histories.items) - len(train.items) - targets,
        "kept from training by the rule, and the target of no validation",
    )  # fmt: skip
    steps.drop(
        "short training histories", 0, len(train.items) - len(kept.items),
        "fewer than 2 events to train on",
    )  # fmt: skip
    in_others = train.lengths >= 2
    in_others[val_rows] = True
    return Splits(period, kept, take(period, val_rows), histories, in_others)


def split_last_two(histories: Sessions, val_users: ValUsers, seed: int, steps: Steps) -> Splits:
    """Split leave-one-out: the last items test, the second last ones of val_users validate.

    Training keeps from every history both of them, or the last one alone with 0 val_users. Fewer
    users than there are histories are drawn with the seed.
    """
    most = len(histories) if val_users == "all" else val_users
    held_back = np.full(len(histories), 2 if most else 1)
    rows = sample_rows(len(histories), most, seed)
    return split_last_items(histories, rows, steps, train_without=held_back)


def check_val_users(val_users: ValUsers, most: int | None = None) -> None:
    """Raise InputError unless val_users is all, or a number from 1 to `most`."""
    if val_users != "all" and not 1 <= val_users <= (most or val_users):
        numbers = "of at least 1" if most is None else f"from 1 to {most:,}"
        raise InputError(f"--val-users {val_users}: expected all, or a number {numbers}")


def sample(sessions: Sessions, most: int, seed: int, steps: Steps) -> Sessions:
    """Draw a seeded sample of at most `most` validation sessions, in their order."""
    sampled = take(sessions, sample_rows(len(sessions), most, seed))
    steps.drop(
        "validation sample", len(sessions) - len(sampled), len(sessions.items) - len(sampled.items),
        f"validation sessions beyond {most:,}",
    )  # fmt: skip
    return sampled


def sample_rows(count: int, most: int, seed: int) -> np.ndarray:
    """Draw at most `most` of the rows 0..count - 1 with the seed: int64, ascending."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def _none(sessions: Sessions) -> np.ndarray:
    return np.zeros(len(sessions), bool)
