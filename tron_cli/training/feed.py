"""The batch of each training step: a function of the configuration and of the step's number."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import Batch, cloze_batch, order_of_pass, training_batch
from tron_cli.data.dataset import Sessions
from tron_cli.data.histories import TrainingWindows, ranges
from tron_cli.data.lanes import Lanes
from tron_cli.models.base import Model

_WINDOWS_AT_ONCE = 1 << 16  # counted together
_DAY = 86_400_000  # ms


class Feed(Protocol):
    """Batches on the CPU, requested in ascending order of steps, from any first one.

    A step is one batch here, of which a training step takes accumulate_batches.
    steps_per_pass: steps in which the training sessions, or all their windows, are seen once.
    """

    steps_per_pass: int

    def batch(self, step: int) -> Batch: ...


def build_feed(config: ExperimentConfig, sessions: Sessions, model: Model, *, padded: bool) -> Feed:
    """Return the batches of a configuration's model. padded: see `Batch`."""
    if model.mask_item is not None:
        return Cloze(config, sessions, model.num_items)
    if config.session_parallel:
        return Lanes(
            sessions,
            lanes=config.train_batch_size,
            sequence_length=config.sequence_length,
            style=config.shuffling_style,
            seed=config.seed,
            padded=padded,
            weight_S=recency_weights(config, sessions),
        )
    return WholeSessions(config, sessions, padded=padded)


def windows_of(config: ExperimentConfig, sessions: Sessions) -> TrainingWindows:
    """Return the windows of the training sessions that a configuration asks for."""
    kind, stride = config.training_windows, config.window_stride or config.sequence_length
    return TrainingWindows(sessions, config.sequence_length, kind, stride)


def recency_weights(config: ExperimentConfig, sessions: Sessions) -> np.ndarray | None:
    """Return the weight of each session in the draws of training, 1 for the latest: float64 [S].

    None where all weigh the same. The age of a session is that of its last event, or the number of
    sessions after it.
    """
    if config.recency_half_life_sessions:
        age_S = np.arange(len(sessions))[::-1] / config.recency_half_life_sessions
    elif config.recency_half_life_days:
        assert sessions.times is not None
        last_S = sessions.times[sessions.offsets[1:] - 1]
        age_S = (last_S.max() - last_S) / (_DAY * config.recency_half_life_days)
    else:
        return None
    weights: np.ndarray = np.exp2(-age_S)
    return weights


class WholeSessions:
    """train_batch_size rows per step: sessions, each with one of its windows, or all windows."""

    def __init__(self, config: ExperimentConfig, sessions: Sessions, *, padded: bool) -> None:
        self._config = config
        self._sessions = sessions
        self._padded = padded
        self._windows = windows_of(config, sessions)
        self._weight_S = recency_weights(config, sessions)
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))  # a pass and its order
        self.steps_per_pass = math.ceil(len(self._windows) / config.train_batch_size)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, where the target of an event is the one that follows it."""
        config = self._config
        return training_batch(
            self._sessions,
            self.chosen(step),
            config.sequence_length,
            padded=self._padded,
            windows=self._windows,
            random=self.random_windows(step),
            last_only=config.training_windows == "prefixes",
        )

    def chosen(self, step: int) -> np.ndarray:
        """Return the numbers of the windows of a step, int64 or uint32 [B].

        Passes continue across epochs, so that short epochs skip nothing.
        """
        config = self._config
        data_pass, place = divmod(step, self.steps_per_pass)
        if self._order[0] != data_pass:
            order = order_of_pass(
                self._windows,
                config.shuffling_style,
                seed=config.seed,
                data_pass=data_pass,
                weight_S=self._weight_S,
            )
            self._order = data_pass, order
        return self._order[1][
            place * config.train_batch_size : (place + 1) * config.train_batch_size
        ]

    def random_windows(self, step: int) -> np.random.Generator | None:
        """Return the generator of a step's windows where they are drawn."""
        if self._config.training_windows != "random":
            return None
        return np.random.default_rng([self._config.seed, step, 1])


class Cloze(WholeSessions):
    """Windows of sessions with masked events, which are the targets; masks differ in every step."""

    def __init__(self, config: ExperimentConfig, sessions: Sessions, num_items: int) -> None:
        super().__init__(config, sessions, padded=False)
        self._num_items = num_items

    def batch(self, step: int) -> Batch:
        return cloze_batch(
            self._sessions,
            self.chosen(step),
            self._config.sequence_length,
            num_items=self._num_items,
            mask_probability=self._config.mask_probability,
            random=np.random.default_rng([self._config.seed, step]),
            windows=self._windows,
            random_windows=self.random_windows(step),
        )


def expected_in_batch(config: ExperimentConfig, sessions: Sessions, num_items: int) -> np.ndarray:
    """Return the expected count of each item among a position's in-batch negatives: float64 [I].

    They are occurrences among the unmasked inputs of a batch of randomly chosen windows; the
    influence of the position's own window is ignored.
    """
    count_V = np.zeros(num_items + 1)
    if not config.num_batch_negatives:
        return count_V[1:]
    windows = windows_of(config, sessions)
    for low in range(0, len(windows), _WINDOWS_AT_ONCE):
        some = np.arange(low, min(low + _WINDOWS_AT_ONCE, len(windows)))
        start_S, length_S = windows.at(some)
        _, place = ranges(start_S, start_S + length_S)
        count_V += np.bincount(sessions.items[place], minlength=len(count_V))
    count_I = count_V[1:]
    rows = min(config.train_batch_size, len(windows)) - int(config.reject_in_batch_items)
    inputs_per_row = 1 if config.session_parallel else count_I.sum() / len(windows)
    expected = min(config.num_batch_negatives, rows * inputs_per_row)
    return count_I * (expected / count_I.sum())
