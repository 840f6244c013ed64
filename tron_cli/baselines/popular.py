"""Most popular items, whatever the history."""

from __future__ import annotations

import numpy as np

from tron_cli.baselines.base import SparseBaseline
from tron_cli.baselines.ranking import Candidates
from tron_cli.data.histories import Histories


class Popular(SparseBaseline):
    """Rank items by how often they occur in training."""

    def work(self, histories: Histories) -> np.ndarray:
        return np.ones(len(histories), dtype=np.int64)

    def candidates(self, histories: Histories) -> Candidates:
        nothing = np.zeros(len(histories) + 1, dtype=np.int64)
        return Candidates(nothing, np.zeros(0, dtype=np.int64), np.zeros(0))
