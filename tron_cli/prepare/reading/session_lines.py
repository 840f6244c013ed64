"""Text files of sessions or histories: one per line, or one event per line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from tron_cli.data.dataset import Sessions
from tron_cli.errors import InputError
from tron_cli.prepare.reading.columns import BadLines
from tron_cli.prepare.reading.integers import read_integer_lines
from tron_cli.prepare.sessions import Events, to_sessions

Layout = Literal["items", "user-items", "user-item"]
"""items: a session per line, its items oldest first; user-items: the same after the user's id, as
S3-Rec and BSARec have it; user-item: an event per line, as Kang and BERT4Rec have it."""


def read_session_lines(file: Path, bad: BadLines, layout: Layout = "items") -> Sessions:
    """Read the sessions of a file, with original item ids (int64).

    Where the lines name users, these are the user_ids, and each has one session; otherwise the
    session_ids are the numbers of the lines. Raises InputError where there is no session, or where
    two lines of user-items have the same user.
    """
    if layout == "user-item":
        return _read_events(file, bad)
    numbers, counts, lines = map(np.concatenate, zip(*read_integer_lines(file, bad), strict=True))
    if not len(numbers):
        raise InputError(
            f"{file} holds no session: expected integer item ids, one session per line"
        )
    offsets = np.concatenate(([0], np.cumsum(counts)))
    if layout == "items":
        return Sessions(numbers, offsets, session_ids=lines)
    users = numbers[offsets[:-1]]
    _, first, user_S = np.unique(users, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[user_S] != np.arange(len(users)))
    if len(again):
        earlier, later = lines[first[user_S[again[0]]]], lines[again[0]]
        raise InputError(
            f"{file}, line {later}: user {users[again[0]]} has a history in line {earlier} "
            "already; expected one line per user that begins with the user's id"
        )
    items = np.delete(numbers, offsets[:-1])
    return Sessions(items, offsets - np.arange(len(offsets)), user_ids=users)


def _read_events(file: Path, bad: BadLines) -> Sessions:
    """Read `user item` lines; the sessions are in the order in which the users appear."""
    pairs = np.concatenate([block for block, *_ in read_integer_lines(file, bad, per_line=2)])
    if not len(pairs):
        raise InputError(f"{file} holds no event: expected `user item` per line")
    users, items = pairs[::2], pairs[1::2]
    lines = np.arange(len(users))  # in place of times
    sessions = to_sessions(Events(users, items, lines, np.unique(items), users))
    return replace(sessions, times=None, session_ids=None)
