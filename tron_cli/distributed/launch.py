"""Place of this process among those that torchrun started; imports no torch."""

from __future__ import annotations

import os

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rank_and_count() -> tuple[int, int]:
    """Return rank and number of the processes that torchrun started; (0, 1) without torchrun."""
    if any(name not in os.environ for name in _NAMES):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
