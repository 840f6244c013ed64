"""BERT4Rec with random weights, and cloze batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from helpers.datasets import pack_sessions
from helpers.networks import random_model
from tron_cli.data.batches import Batch, cloze_batch
from tron_cli.models.bert4rec import BERT4Rec

ITEMS, LENGTH = 40, 5
MASK = ITEMS + 1
BLOCKS: dict[str, dict[str, Any]] = {
    "pre-norm": {"feed_forward_dim": 12},
    "post-norm": {"activation": "gelu"},
}


def cloze(
    rows: Sequence[Sequence[int]],
    *,
    length: int = LENGTH,
    probability: float = 0.3,
    num_items: int = ITEMS,
    seed: int = 0,
) -> Batch:
    """Make a batch of all sessions, masked."""
    return cloze_batch(
        pack_sessions(rows),
        np.arange(len(rows)),
        length,
        num_items=num_items,
        mask_probability=probability,
        random=np.random.default_rng(seed),
    )


def make_model(positions: str = "end", block: str = "pre-norm", **changes: Any) -> BERT4Rec:
    settings = {"num_items": ITEMS, "sequence_length": LENGTH, "positions": positions}
    return random_model(BERT4Rec, block=block, **{**settings, **BLOCKS[block], **changes})
