"""Splits of the sessions into train, val and test."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tron_cli.data.dataset import Sessions
from tron_cli.errors import InputError
from tron_cli.prepare.filters import Steps, drop_short
from tron_cli.prepare.sessions import (
    drop_events,
    first_keys,
    first_times,
    last_times,
    take,
    take_where,
)

DAY = 86_400_000  # ms
WHY_LATE = "in or after a held-out stretch, and sessions with fewer than 2 before it"


@dataclass(frozen=True)
class Rule:
    """Rule by which the sessions of the last days are held out.

    Held out are those whose `times` (int64 [S], ms) are not before since(latest start, days).
    """

    times: Callable[[Sessions], np.ndarray]
    since: Callable[[int, float], float]


# The last `days` before the latest start, by the last event: TRON's rule for Yoochoose.
by_last_event = Rule(last_times, lambda latest, days: latest - days * DAY)
# The last days + 1 calendar days (UTC), by the start: TRON's rule for Diginetica.
by_start_day = Rule(first_times, lambda latest, days: latest // DAY * DAY - days * DAY)
# The last `days` before the latest start, by the start.
by_start = Rule(first_times, lambda latest, days: latest - days * DAY)

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


@dataclass(frozen=True)
class Timeline:
    """Times of the sessions to split, in the order of their parts: int64 [S] each, ms.

    starts; seconds: of the second events; times: those of the rule. places: in the log.
    """

    starts: np.ndarray
    seconds: np.ndarray
    times: np.ndarray
    places: np.ndarray
    rule: Rule

    @classmethod
    def of(cls, parts: Iterable[Sessions], rule: Rule = by_start) -> Timeline:
        """Return the times of sessions of two events or more, in one part or several with places.

        They are 24 bytes per session, or 32 where the rule needs others than the starts.
        """
        starts, seconds, times, places = ([np.zeros(0, np.int64)] for _ in range(4))
        by_starts = rule.times is first_times
        for sessions in parts:
            assert sessions.times is not None
            starts.append(first_times(sessions))
            seconds.append(sessions.times[sessions.offsets[:-1] + 1])
            if not by_starts:
                times.append(rule.times(sessions))
            places.append(first_keys(sessions)[1])
        whole = np.concatenate(starts)
        others = whole if by_starts else np.concatenate(times)
        return cls(whole, np.concatenate(seconds), others, np.concatenate(places), rule)

    def __len__(self) -> int:
        return len(self.starts)

    def last_days(self, among: np.ndarray, days: float) -> np.ndarray:
        """Return which sessions of those (bool [S], not none) the rule holds out: bool [S]."""
        return among & (self.times >= self.rule.since(int(self.starts[among].max()), days))

    def sample(self, among: np.ndarray, most: int, seed: int) -> np.ndarray:
        """Draw at most so many of the sessions of those (bool [S]) with the seed: bool [S]."""
        rows = np.flatnonzero(among)
        rows = rows[np.argsort(self.places[rows], kind="stable")]
        sampled = np.zeros(len(among), bool)
        sampled[rows[sample_rows(len(rows), most, seed)]] = True
        return sampled


# Fate of a session that is split by time. TRAIN to BEYOND are the training period; too few events
# of LATE and SHORT are left before test and val; BEYOND are held out, but not sampled.
LATE, TRAIN, SHORT, VAL, BEYOND, TEST = range(6)


@dataclass(frozen=True)
class TimeSplit:
    """Split by time, decided for all sessions; `__call__` carries it out on a part of them.

    fate: int8 [S], in the order of the parts. test_limit, val_limit: earlier sessions lose the
    events from then on (ms); None where they keep them.
    """

    fate: np.ndarray
    test_limit: int | None
    val_limit: int | None
    max_val_sessions: int
    cuts_late_events: bool

    def __call__(self, sessions: Sessions, rows: slice, steps: Steps) -> Splits:
        """Split the sessions of some rows of `fate`, and record what they lose."""
        fate = self.fate[rows]
        test = take_where(sessions, fate == TEST)
        is_early = (fate >= TRAIN) & (fate <= BEYOND)
        period, fate = _before(take_where(sessions, is_early), self.test_limit), fate[is_early]
        train = _before(take_where(period, fate == TRAIN), self.val_limit)
        held_out = take_where(period, fate >= VAL)
        val = take_where(held_out, fate[fate >= VAL] == VAL)
        if self.cuts_late_events:
            early = len(sessions) - len(test) - len(held_out) - len(train)
            events = _events(sessions) - _events(test) - _events(held_out) - _events(train)
            steps.drop("late events", early, events, WHY_LATE)
        record_sample(held_out, val, self.max_val_sessions, steps)
        return Splits(period, train, val, test)


def _events(sessions: Sessions) -> int:
    return len(sessions.items)


def _before(sessions: Sessions, limit: int | None) -> Sessions:
    """Drop the events from a time on (ms)."""
    if limit is None:
        return sessions
    assert sessions.times is not None
    return drop_events(sessions, sessions.times < limit)


def split_by_time(
    line: Timeline,
    *,
    test_days: float,
    val_days: float,
    max_val_sessions: int,
    seed: int,
    latest: tuple[int, str],
    cut_late_events: bool = False,
    test_from: int | None = None,
    val_from: int | None = None,
    has_test: bool = False,
) -> TimeSplit:
    """Hold out test by the rule, then val from the training period by the same rule (0 days: none).

    test_from, val_from (ms): hold out the sessions that start then or later instead. has_test: the
    source gives the test sessions. latest: the latest time of the sessions as they were read (ms),
    and its file and line.
    cut_late_events: sessions that start earlier than a held-out stretch lose the events that lie in
    it, and are dropped where fewer than two remain. (The published splits of Yoochoose and
    Diginetica keep them.)
    """

    def divide(
        whole: np.ndarray, days: float, since: int | None, option: str
    ) -> tuple[np.ndarray, np.ndarray, int | None]:
        """Return (what is left of `whole` before the held-out sessions, these, the limit)."""
        if not whole.any():
            return whole, whole, None
        held_out = line.last_days(whole, days) if since is None else whole & (line.starts >= since)
        before = whole & ~held_out
        if since is None and whole.all():
            check_latest(line.starts, held_out, *latest)
        if since is not None and not (before.any() and held_out.any()):
            starts = line.starts[whole]
            raise InputError(
                f"{option} {moment(since)}: {'no' if before.any() else 'every'} session to split "
                f"starts then or later; they start from {moment(starts.min())} to "
                f"{moment(starts.max())} (UTC)"
            )
        if not cut_late_events or not held_out.any() or not before.any():
            return before, held_out, None
        limit = int(line.starts[held_out].min()) if since is None else since
        return before & (line.seconds < limit), held_out, limit

    period, test = np.ones(len(line), bool), np.zeros(len(line), bool)
    test_limit = val_limit = None
    if not has_test:
        period, test, test_limit = divide(period, test_days, test_from, "--test-from")
    train, held_out = period, np.zeros(len(line), bool)
    if val_days > 0 or val_from is not None:
        train, held_out, val_limit = divide(period, val_days, val_from, "--val-from")
    fate = np.full(len(line), LATE, np.int8)
    fate[test], fate[period], fate[train], fate[held_out] = TEST, SHORT, TRAIN, BEYOND
    fate[line.sample(held_out, max_val_sessions, seed)] = VAL
    return TimeSplit(fate, test_limit, val_limit, max_val_sessions, cut_late_events)


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
    record_sample(sessions, sampled, most, steps)
    return sampled


def record_sample(sessions: Sessions, sampled: Sessions, most: int, steps: Steps) -> None:
    """Record what a sample of at most so many validation sessions leaves out."""
    dropped = len(sessions) - len(sampled), _events(sessions) - _events(sampled)
    steps.drop("validation sample", *dropped, f"validation sessions beyond {most:,}")


def sample_rows(count: int, most: int, seed: int) -> np.ndarray:
    """Draw at most `most` of the rows 0..count - 1 with the seed: int64, ascending."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))
