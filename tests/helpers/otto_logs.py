"""Random logs of OTTO, spelled as the published files are."""

from __future__ import annotations

import numpy as np

START = 1_659_304_800_025


DAY = 86_400_000


Session = list[tuple[int, int, str]]  # (aid, ts, type)


def published_line(session: int, events: Session) -> str:
    """A line exactly as the published files have it."""
    inner = ",".join(f'{{"aid":{a},"ts":{t},"type":"{kind}"}}' for a, t, kind in events)
    return f'{{"session":{session},"events":[{inner}]}}'


def random_events(rng: np.random.Generator, count: int, items: int, days: float) -> Session:
    times = START + int(rng.integers(0, int(days * DAY))) + rng.integers(0, DAY // 4, count)
    if rng.random() < 0.8:
        times = np.sort(times)
    times[rng.random(count) < 0.2] = times[0] if count else 0
    aids = rng.integers(0, items, count) ** 2  # gaps in the ids
    kinds = rng.choice(["clicks", "clicks", "clicks", "carts", "orders"], count)
    return [(int(a), int(t), str(k)) for a, t, k in zip(aids, times, kinds, strict=True)]


def random_log(seed: int, sessions: int, items: int = 40, days: float = 10) -> list[Session]:
    rng = np.random.default_rng(seed)
    lengths = rng.choice([0, 1, 2, 3, 5, 12], sessions, p=[0.05, 0.2, 0.25, 0.25, 0.15, 0.1])
    return [random_events(rng, int(n), items, days) for n in lengths]


def expected_clicks(session: Session) -> Session:
    return sorted((e for e in session if e[2] == "clicks"), key=lambda e: e[1])
