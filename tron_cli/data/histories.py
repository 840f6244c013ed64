"""The events of a split that are predicted, and the history of each.

Shapes: E predicted events, P (event, item of its history) or other (row, item) pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from tron_cli.data.dataset import Sessions


@dataclass(frozen=True)
class Predictions:
    """Predicted events, one per entry, in the order of the sessions and of their events.

    session_E, event_E: int64, session of the split and place of the target in it, both from 0.
    target_E: int64 item ids. rank_E: int64, 1 the best; 0 where the target is filtered out: a miss.
    top_EK: int32 item ids in order of rank, 0 where there are no more; None unless asked for.
    """

    session_E: np.ndarray
    event_E: np.ndarray
    target_E: np.ndarray
    rank_E: np.ndarray
    top_EK: np.ndarray | None


@dataclass(frozen=True)
class Histories:
    """Events to predict, each with its history. All arrays are int64, places are those in `items`.

    items: of the whole split. session_E: sessions of the split. begin_E: where the session begins.
    start_E: where the history begins, cut to the window. position_E: where the target is, or would
    be (`latest_histories`); the history ends just before it and holds at least one event.
    """

    items: np.ndarray
    session_E: np.ndarray
    begin_E: np.ndarray
    start_E: np.ndarray
    position_E: np.ndarray

    def __len__(self) -> int:
        return len(self.session_E)

    def __getitem__(self, index: slice | np.ndarray) -> Histories:
        return Histories(
            self.items,
            self.session_E[index],
            self.begin_E[index],
            self.start_E[index],
            self.position_E[index],
        )

    @property
    def target_E(self) -> np.ndarray:
        """Item ids of the targets: int64."""
        return self.items[self.position_E].astype(np.int64)

    @property
    def last_E(self) -> np.ndarray:
        """Item id of the last event of each history: int64."""
        return self.items[self.position_E - 1].astype(np.int64)

    @property
    def length_E(self) -> np.ndarray:
        """Number of events of each history: int64."""
        return self.position_E - self.start_E

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return event, item and step (1: the one before the target) of each history's events."""
        event_P, place_P = ranges(self.start_E, self.position_E)
        return event_P, self.items[place_P].astype(np.int64), self.position_E[event_P] - place_P

    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """Return event and item of the distinct items before each target in its whole session."""
        event_P, place_P = ranges(self.begin_E, self.position_E)
        item_P = self.items[place_P].astype(np.int64)
        return distinct_pairs(event_P, item_P)


def predicted_events(
    sessions: Sessions,
    *,
    window: int,
    protocol: str,
    full_sessions: bool = False,
    one_pass: bool = False,
    first: int = 0,
    last: int | None = None,
) -> Histories:
    """Return the predicted events of sessions first..last - 1, in order.

    protocol: every-step predicts each event of a session but the first (of its last `window`
    events, with full_sessions of all), last-item the last one. Each has a history of up to `window`
    events; with one_pass it begins where the last window + 1 events of the session begin.
    """
    last = len(sessions) if last is None else min(last, len(sessions))
    begin_S = np.asarray(sessions.offsets[first:last], dtype=np.int64)
    length_S = np.asarray(sessions.offsets[first + 1 : last + 1], dtype=np.int64) - begin_S
    first_target_S = _first_targets(length_S, window, protocol, full_sessions)
    session_E, position_E = ranges(begin_S + first_target_S, begin_S + length_S)
    begin_E = begin_S[session_E]
    last_E = begin_E + length_S[session_E] - 1
    return Histories(
        items=sessions.items,
        session_E=session_E + first,
        begin_E=begin_E,
        start_E=_history_start(begin_E, last_E if one_pass else position_E, window),
        position_E=position_E,
    )


def latest_histories(sessions: Sessions, window: int) -> Histories:
    """Return the histories from which the items after each session are recommended.

    Each is the last `window` events of a session of at least one event. The targets are not known:
    `target_E` must not be read.
    """
    begin_E = np.asarray(sessions.offsets[:-1], dtype=np.int64)
    end_E = np.asarray(sessions.offsets[1:], dtype=np.int64)
    return Histories(
        items=sessions.items,
        session_E=np.arange(len(sessions)),
        begin_E=begin_E,
        start_E=_history_start(begin_E, end_E, window),
        position_E=end_E,
    )


def count_predicted(
    sessions: Sessions,
    *,
    window: int,
    protocol: str,
    full_sessions: bool = False,
    share: tuple[int, int] = (0, 1),
) -> int:
    """Count the predicted events of all sessions; about those of a share, (rank, processes)."""
    first_target_S = _first_targets(sessions.lengths, window, protocol, full_sessions)
    return int((sessions.lengths - first_target_S).clip(min=0).sum()) // share[1]


def training_windows(
    sessions: Sessions, chosen: np.ndarray | slice, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return begin (place in `items`) and length of the training windows of chosen sessions.

    Both int64. A training step predicts the item that follows each event of a window.
    """
    last_S = sessions.offsets[1:][chosen] - 1
    start_S = _history_start(sessions.offsets[:-1][chosen], last_S, window)
    return start_S, last_S - start_S


class TrainingWindows:
    """Rows of training: windows of the sessions, each the history of its last target.

    A window is up to `window` events that lie next to each other in a session and are followed by
    another one. kind says which windows a pass has:

    - last: the last one of each session.
    - random: one of each session, drawn anew each time, all full ones equally likely.
    - all: as many as it takes. The last one ends before the session's last event, and each of the
      others `stride` events earlier, until one begins with the session. With a stride of `window`,
      each event but the first of a session is the target of one event of one window.
    - prefixes: one before each event but the first of a session.

    Windows of one session are numbered one after the other, by time. Nothing of the items is read,
    and no array has an entry for each event or window.
    """

    def __init__(
        self, sessions: Sessions, window: int, kind: str = "last", stride: int | None = None
    ) -> None:
        """Number the windows of sessions of at least two events. stride: default: window."""
        self._sessions = sessions
        self._window = window
        self._is_drawn = kind == "random"
        self._stride = 1 if kind == "prefixes" else stride or window
        self._first_S: np.ndarray | None = None  # number of the first window of each session
        if kind in ("all", "prefixes"):
            shortest = window if kind == "all" else 1
            before_S = (sessions.lengths - 1 - shortest).clip(min=0)
            self._first_S = np.append(0, np.cumsum(1 - (-before_S // self._stride)))

    def __len__(self) -> int:
        return len(self._sessions) if self._first_S is None else int(self._first_S[-1])

    def at(
        self, chosen: np.ndarray, random: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return begin (place in `items`) and length of the windows of these numbers.

        chosen: int64 [B]; both results: int64 [B]. random: draws the windows of kind random.
        """
        session_B, later_B = chosen, np.zeros_like(chosen)
        if self._first_S is not None:
            session_B = np.searchsorted(self._first_S, chosen, side="right") - 1
            later_B = self._first_S[session_B + 1] - 1 - chosen
        begin_B = self._sessions.offsets[:-1][session_B]
        target_B = self._sessions.offsets[1:][session_B] - 1 - later_B * self._stride
        if self._is_drawn:
            assert random is not None
            spare_B = (target_B - begin_B - self._window).clip(min=0)
            target_B = target_B - random.integers(spare_B + 1)
        start_B = _history_start(begin_B, target_B, self._window)
        return start_B, target_B - start_B

    def drawn(self, weight_S: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Draw as many windows as there are, with replacement: int64, their numbers.

        weight_S: float64, at least 0 and not all 0. Each window of a session has its weight.
        """
        count_S = 1 if self._first_S is None else np.diff(self._first_S)
        end_S = np.cumsum(weight_S * count_S)
        # Rounding may give the end itself, where there is no session.
        last_place = np.nextafter(end_S[-1], 0)
        place_B = np.minimum(random.random(len(self)) * end_S[-1], last_place)
        session_B = np.searchsorted(end_S, place_B, side="right")
        if self._first_S is None:
            return session_B
        before_end_B = ((end_S[session_B] - place_B) / weight_S[session_B]).astype(np.int64)
        last_B = self._first_S[session_B + 1] - 1
        return np.maximum(last_B - before_end_B, self._first_S[session_B])

    def mean_length(self) -> float:
        """Return the mean number of events of a window."""
        length_S = self._sessions.lengths - 1
        if self._first_S is None:
            return float(np.minimum(length_S, self._window).mean())
        count_S = np.diff(self._first_S)
        # In order of time, all but the first few windows of a session are full.
        first_S = length_S - (count_S - 1) * self._stride  # length of the first one
        growing_S = np.minimum(count_S, (self._window - first_S) // self._stride + 1)
        grown_S = first_S * growing_S + self._stride * growing_S * (growing_S - 1) // 2
        total = (grown_S + (count_S - growing_S) * self._window).sum()
        return float(total / len(self))


def _history_start(begin_E: np.ndarray, target_E: np.ndarray, window: int) -> np.ndarray:
    """Return where histories begin, given the places of their sessions and of their targets."""
    return np.maximum(begin_E, target_E - window)


def _first_targets(
    length_S: np.ndarray, window: int, protocol: str, full_sessions: bool
) -> np.ndarray:
    """Return the place of each session's first predicted event, or one past its end if none is."""
    if protocol == "last-item":
        first_S = length_S - 1
    elif full_sessions:
        first_S = np.ones_like(length_S)
    else:
        first_S = length_S - window
    return np.maximum(first_S, 1)


def collect(
    ranked: Iterable[tuple[Histories, np.ndarray, np.ndarray | None]],
    *,
    expected: int,
    top_items: int,
    progress: str | None,
) -> Predictions:
    """Join predictions that come for some events at a time, in order.

    expected: number of events, for the progress bar. progress: title of the bar; None: no bar. The
    best items are None unless top_items are asked for.
    """
    nothing = np.zeros(0, dtype=np.int64)
    parts = [(nothing, nothing, nothing, nothing, nothing)]
    tops = [np.zeros((0, top_items), dtype=np.int32)]
    bar = tqdm(
        total=expected,
        desc=progress,
        unit=" events",
        unit_scale=True,
        disable=None if progress else True,
    )
    for histories, rank_E, top_EK in ranked:
        event_E = histories.position_E - histories.begin_E
        parts.append(
            (histories.position_E, histories.session_E, event_E, histories.target_E, rank_E)
        )
        if top_EK is not None:
            tops.append(top_EK.astype(np.int32, copy=False))
        bar.update(len(rank_E))
    bar.close()
    position_E, *columns = map(np.concatenate, zip(*parts, strict=True))
    order = np.argsort(position_E, kind="stable")
    session_E, event_E, target_E, rank_E = (column[order] for column in columns)
    top_EK = np.concatenate(tops)[order] if top_items else None
    return Predictions(session_E, event_E, target_E, rank_E, top_EK)


def distinct_pairs(row_P: np.ndarray, item_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return row and item (int64, not negative) of each distinct pair, in ascending order."""
    width = int(item_P.max(initial=0)) + 1
    # np.unique hashes, which takes a hundred times as long.
    key_P = np.sort(row_P * width + item_P)
    return np.divmod(key_P[np.diff(key_P, prepend=-1) > 0], width)


def ranges(low_R: np.ndarray, high_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return row and number of each integer from low to high - 1 of each row."""
    count_R = np.maximum(high_R - low_R, 0)
    row = np.repeat(np.arange(len(count_R)), count_R)
    return row, np.arange(len(row)) + np.repeat(low_R - (np.cumsum(count_R) - count_R), count_R)
