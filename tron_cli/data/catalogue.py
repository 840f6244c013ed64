"""Catalogues by original id: the same items under the numbers of another dataset or checkpoint."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tron_cli.data.dataset import Dataset, Sessions
from tron_cli.data.histories import Predictions, ranges


def numbers_among(known: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the number in `known` of each of `ids`: int32 [I], from 1, and 0 where it lacks one.

    Both are original ids, int64 or str objects, each without repeats; 7 and "7" are one item.
    """
    if known.dtype == object or ids.dtype == object or not len(known):
        number_of = {str(item): number for number, item in enumerate(known.tolist(), start=1)}
        return np.array([number_of.get(str(item), 0) for item in ids.tolist()], np.int32)
    order = np.argsort(known, kind="stable")
    place = np.searchsorted(known, ids, sorter=order).clip(max=len(known) - 1)
    return np.where(known[order[place]] == ids, order[place] + 1, 0).astype(np.int32)


class RenumberedDataset(Dataset):
    """A prepared dataset under the item numbers of another catalogue, to evaluate one split.

    Events on items that the catalogue lacks are left out. Their sessions stay, only shorter, and
    the lost predictions are counted with those lost in preparation. Under the last-item protocol a
    session whose target is unknown becomes empty.

    number_I: int32 [I + 1], the number here of each item of the original dataset, 0 if unknown.
    unknown_items, unknown_events: int, their numbers in the split. predictions: int, the number
    that is left where whole sessions are predicted.
    """

    def __init__(
        self, original: Dataset, item_ids: np.ndarray, *, split: str, protocol: str
    ) -> None:
        """Renumber a split. item_ids: original ids; protocol: that of the evaluation."""
        self._original, self._split = original, split
        self.number_I = np.append(np.int32(0), numbers_among(item_ids, original.item_ids))
        sessions = original.checked_split(split)
        is_known = self.number_I[sessions.items] > 0
        self.unknown_items = len(np.unique(sessions.items[~is_known]))
        self.unknown_events = int(np.count_nonzero(~is_known))
        if protocol == "last-item" and self.unknown_events:
            ends = is_known[sessions.offsets[1:] - 1]  # an empty session has no event to keep
            is_known &= np.repeat(ends, sessions.lengths)
        self._sessions = self._renumbered(sessions, is_known)
        self._place_E = ranges(np.zeros_like(sessions.lengths), sessions.lengths)[1][is_known]
        most = 1 if protocol == "last-item" else None
        before, left = (
            (part.lengths - 1).clip(min=0, max=most) for part in (sessions, self._sessions)
        )
        self.predictions, self._lost = int(left.sum()), before - left
        counts = dict(original.split_info(split))
        counts["lost_predictions"] += int(self._lost.sum())
        splits = {**original.info["splits"], split: counts}
        super().__init__(
            original.path, {**original.info, "num_items": len(item_ids), "splits": splits}
        )
        self.item_ids = item_ids

    def split(self, name: str) -> Sessions:
        """Return a split, in memory, as `Dataset.checked_split` does."""
        if name == self._split:
            return self._sessions
        sessions = self._original.checked_split(name)
        return self._renumbered(sessions, self.number_I[sessions.items] > 0)

    def checked_split(self, name: str, *, fully: bool = False) -> Sessions:
        """Return a split, in memory; `fully` has no effect."""
        return self.split(name)

    def lost_of_sessions(self, split: str) -> np.ndarray | None:
        """Return `Dataset.lost_of_sessions` plus the predictions lost with unknown items."""
        before = self._original.lost_of_sessions(split)
        if before is None or split != self._split:
            return before
        lost = before.copy()
        lost[: len(self._lost)] += self._lost.astype(lost.dtype)
        return lost

    def at_original_places(self, predictions: Predictions) -> Predictions:
        """Return predictions with the places that targets have in sessions of the original.

        session_E are numbers of sessions in the split.
        """
        place_E = self._sessions.offsets[predictions.session_E] + predictions.event_E
        return replace(predictions, event_E=self._place_E[place_E])

    def _renumbered(self, sessions: Sessions, is_kept: np.ndarray) -> Sessions:
        """Return the sessions of the kept events (bool [E])."""
        offsets = np.concatenate([[0], np.cumsum(is_kept)])[sessions.offsets]
        times = None if sessions.times is None else sessions.times[is_kept]
        return Sessions(self.number_I[sessions.items[is_kept]], offsets, times)
