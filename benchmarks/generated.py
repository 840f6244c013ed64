"""Sessions with the lengths of public data sets and items by a Zipf-like law."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tron_cli.data.dataset import Sessions

_BLOCK = 1 << 18  # sessions generated at a time


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths of sessions, rounded and clipped to [shortest, longest]."""

    median: float
    spread: float
    shortest: int = 2
    longest: int = 500

    def draw(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Draw lengths, int64 [count]."""
        drawn = random.lognormal(np.log(self.median), self.spread, count).round()
        return drawn.astype(np.int64).clip(self.shortest, self.longest)


# OTTO: the tail of its sessions, and 18 % of a padded [128, 50] batch filled, as measured on it.
# Yoochoose and Diginetica: means of 4.0 and 4.9 clicks. MovieLens-1M: 163 ratings to train on.
LENGTHS = {
    "OTTO": Lengths(median=4.5, spread=1.4),
    "Yoochoose": Lengths(median=2.85, spread=0.75, longest=200),
    "Diginetica": Lengths(median=3.45, spread=0.8, longest=70),
    "MovieLens-1M": Lengths(median=94, spread=0.98, shortest=16, longest=2300),
}


def generate_sessions(
    lengths: Lengths, num_items: int, num_sessions: int = 4096, *, seed: int = 0
) -> Sessions:
    """Generate sessions whose items follow a Zipf-like law (exponent 0.8, as in click logs)."""
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths.draw(num_sessions, random))])
    return Sessions(draw_items(num_items, int(offsets[-1]), random), offsets)


def draw_items(num_items: int, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw ids 1..num_items, int32 [count]; low ids are the most popular."""
    # The inverse of the continuous law's distribution function: no table of all items is searched.
    exponent = 1 - 0.8
    top = (num_items + 1) ** exponent
    items = np.empty(count, np.int32)
    for low in range(0, count, _BLOCK):
        uniform = random.random(min(_BLOCK, count - low))
        items[low : low + _BLOCK] = (1 + uniform * (top - 1)) ** (1 / exponent)
    return items.clip(1, num_items, out=items)


def fill(sessions: Sessions, sequence_length: int) -> float:
    """Return the share of padded [sessions, sequence_length] inputs that are events."""
    return float(np.minimum(sessions.lengths - 1, sequence_length).mean()) / sequence_length
