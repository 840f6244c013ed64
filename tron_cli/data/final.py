"""Training and validation sessions of a dataset as the training sessions of a final model."""

from __future__ import annotations

import numpy as np

from tron_cli.data.dataset import Dataset, Sessions
from tron_cli.data.histories import ranges
from tron_cli.errors import InputError


class TrainAndValidation(Dataset):
    """A prepared dataset whose training split includes validation, which is then empty.

    Validation sessions follow the training ones, as in time. Under the last-item protocol a row of
    validation is a whole history, so it replaces that user's training row. The fingerprint of the
    training split stays that of the original; val_fingerprint is that of the validation split.
    """

    def __init__(self, original: Dataset) -> None:
        """Join the splits, in memory. Raises InputError where there is no validation."""
        train, val = original.checked_split("train"), original.checked_split("val")
        if not len(val):
            raise InputError(
                f"the validation split of {original.path} is empty, so a final model would be "
                "trained on the sessions of its run again; use the checkpoint of that run"
            )
        if original.protocol == "last-item":
            train = _without(train, _also_validate(original))
        offsets = np.concatenate([train.offsets, val.offsets[1:] + train.offsets[-1]])
        times = None
        if train.times is not None and val.times is not None:
            times = np.concatenate([train.times, val.times])
        self._sessions = Sessions(np.concatenate([train.items, val.items]), offsets, times)
        self._val = Sessions(val.items[:0], val.offsets[:1])
        self.val_fingerprint: str = original.split_info("val")["fingerprint"]
        self._original = original
        counts = {"sessions": len(offsets) - 1, "events": int(offsets[-1])}
        splits = {
            **original.info["splits"],
            "train": {**original.split_info("train"), **counts},
            "val": {**original.split_info("val"), "sessions": 0, "events": 0},
        }
        super().__init__(original.path, {**original.info, "splits": splits})

    def split(self, name: str) -> Sessions:
        """Return a split; training and validation are in memory."""
        joined = {"train": self._sessions, "val": self._val}
        return joined[name] if name in joined else self._original.split(name)

    def checked_split(self, name: str, *, fully: bool = False) -> Sessions:
        """Return a split as `Dataset.checked_split` does."""
        joined = name in ("train", "val")
        return self.split(name) if joined else self._original.checked_split(name, fully=fully)


def _also_validate(original: Dataset) -> np.ndarray:
    """Mark the training histories that a row of validation continues: bool [S].

    Raises InputError where the dataset does not name its histories.
    """
    names = [original.user_ids(split) for split in ("train", "val")]
    if names[0] is None:
        names = [original.session_ids(split) for split in ("train", "val")]
    train, val = names
    if train is None or val is None:
        raise InputError(
            f"{original.path} does not name its users, so that their histories in training and "
            "validation cannot be matched; prepare it again"
        )
    train_ids, val_ids = (each[np.arange(len(each))] for each in (train, val))
    if object in (train_ids.dtype, val_ids.dtype):
        train_ids, val_ids = train_ids.astype(str), val_ids.astype(str)
    return np.isin(train_ids, val_ids)


def _without(sessions: Sessions, is_left_out: np.ndarray) -> Sessions:
    """Return the sessions that are not marked."""
    begin_S, end_S = sessions.offsets[:-1][~is_left_out], sessions.offsets[1:][~is_left_out]
    _, place_E = ranges(begin_S, end_S)
    times = None if sessions.times is None else sessions.times[place_E]
    offsets = np.concatenate([[0], np.cumsum(end_S - begin_S)])
    return Sessions(sessions.items[place_E], offsets, times)
