"""Bulk recommendations: lists for files and streams of sessions, and counts of their items."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np

from tron_cli.distributed.processes import ALONE, Processes
from tron_cli.errors import counted
from tron_cli.serving.list_files import Write
from tron_cli.serving.recommender import Recommender, Scope
from tron_cli.serving.session_files import Session

_WARNINGS = 10

log = logging.getLogger("tron")


@dataclass(frozen=True)
class RecommendOptions:
    """Options of `Recommender.recommend`, with candidates and exclusions as a scope."""

    k: int
    filter_rated: bool | None
    scope: Scope
    on_unknown: str
    on_empty: str


@dataclass
class Counts:
    """Numbers of sessions and events read, and of those with items that the model lacks."""

    sessions: int = 0
    events: int = 0
    unknown_events: int = 0
    sessions_with_unknown: int = 0
    without_known: int = 0
    first_unknown: str = ""

    def __str__(self) -> str:
        text = counted(self.sessions, "session")
        if self.unknown_events:
            text += (
                f"; left out {self.unknown_events:,} of {counted(self.events, 'event')}, on items "
                f"that the model does not know, in {counted(self.sessions_with_unknown, 'session')}"
                f", the first {self.first_unknown}"
            )
        if self.without_known:
            without = counted(self.without_known, "session")
            text += f"; {without} without known items got the popular items"
        return text


def recommend_sessions(
    recommender: Recommender,
    batches: Iterable[list[Session]],
    write: Write,
    options: RecommendOptions,
    processes: Processes = ALONE,
) -> Counts:
    """Write the items recommended after each session, and return counts.

    The first process reads and writes; each makes the lists of every N-th batch, as one process
    does. Raises InputError, with the place of the session, where the options refuse one.
    """
    counts = Counts()
    unread = iter(batches)

    def dealt_out() -> list[list[np.ndarray]]:
        ids[:], found = [], []
        for batch in islice(unread, processes.count):
            found.append([_known(recommender, session, options, counts) for session in batch])
            ids.append([session.id for session in batch])
        return found

    ids: list[list[str | int]] = []
    while histories := processes.of_first(dealt_out):
        own = histories[processes.rank] if processes.rank < len(histories) else []
        lists = recommender.best(
            own, k=options.k, filter_rated=options.filter_rated, scope=options.scope
        )
        for of_batch, found in zip(ids, processes.collected(lists), strict=False):
            write(of_batch, found)
    return counts


def _known(
    recommender: Recommender, session: Session, options: RecommendOptions, counts: Counts
) -> np.ndarray:
    """Return the numbers of a session's known items, and count them."""
    numbers = recommender.known_numbers(
        session.items, session.place, "raise" if options.on_unknown == "raise" else "skip"
    )
    unknown = len(session.items) - len(numbers)
    counts.sessions += 1
    counts.events += len(session.items)
    counts.unknown_events += unknown
    if unknown:
        if not counts.first_unknown:
            is_known = recommender.lookup.numbers(session.items, session.place) > 0
            first = session.items[int(np.argmin(is_known))]
            counts.first_unknown = f"{first!r} ({session.place}); {recommender.looks}"
        counts.sessions_with_unknown += 1
        if options.on_unknown == "warn" and counts.sessions_with_unknown <= _WARNINGS:
            recommender.known_numbers(session.items, session.place, "warn")
    if not len(numbers):
        counts.without_known += 1
        if options.on_empty == "raise":
            raise recommender.no_known_item(session.place)
    return numbers
