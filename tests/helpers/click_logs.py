"""Logs in the forms of Yoochoose and Diginetica."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

DAY = 86_400_000


Event = tuple[int, int, int]  # session, item, time in ms


def write_yoochoose(path: Path, events: list[Event]) -> Path:
    with path.open("w") as file:
        for session, item, at in events:
            moment = datetime.fromtimestamp(at // 1000, timezone.utc)
            file.write(f"{session},{moment:%Y-%m-%dT%H:%M:%S}.{at % 1000:03d}Z,{item},S\n")
    return path


def write_diginetica(path: Path, events: list[Event]) -> Path:
    with path.open("w") as file:
        file.write("sessionId;userId;itemId;timeframe;eventdate\n")
        for session, item, at in events:
            moment = datetime.fromtimestamp(at // 1000, timezone.utc)
            file.write(f"{session};NA;{item};{at % DAY};{moment:%Y-%m-%d}\n")
    return path
