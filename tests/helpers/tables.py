"""Tables of events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tron_cli.data.dataset import Dataset
from tron_cli.prepare.sources.table import TableColumns

DAY = 86_400_000


MINUTE = 60_000


START = 1_700_000_000_000


Row = tuple[str, str, int, str]  # user, item, time in ms, kind


Session = list[tuple[int, Any]]  # (time, item)


USER = TableColumns("item", "time", user="user")


SESSION = TableColumns("item", "time", session="user")


def unpack(dataset: Dataset, split: str) -> list[Session]:
    sessions = dataset.split(split)
    if not len(sessions):
        return []
    assert sessions.times is not None
    return [
        [
            (int(sessions.times[at]), dataset.item_ids[sessions.items[at] - 1])
            for at in range(sessions.offsets[s], sessions.offsets[s + 1])
        ]
        for s in range(len(sessions))
    ]


def write_csv(path: Path, rows: list[Row], separator: str = ",") -> Path:
    lines = ["user,item,time,kind", *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines).replace(",", separator) + "\n")
    return path


def shop(rng: np.random.Generator, *, users: int, days: float, items: int = 8) -> list[Row]:
    """Users with a few visits each; minutes between events, hours between visits, some ties."""
    rows: list[Row] = []
    for user in range(users):
        at = START + int(rng.integers(0, days * DAY))
        for _ in range(int(rng.integers(1, 9))):
            item = f"i{int(rng.zipf(1.6)) % (4 * items) * 3}"
            rows.append((f"u{user}", item, at, str(rng.choice(["view", "cart"], p=[0.8, 0.2]))))
            at += int(rng.choice([0, 5 * MINUTE, 30 * MINUTE, 30 * MINUTE + 1, 600 * MINUTE]))
    return [rows[at] for at in rng.permutation(len(rows))]
