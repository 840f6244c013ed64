"""The batch of each training step: a function of the configuration and of the step's number."""

from __future__ import annotations

import functools
import math
from typing import Protocol

import numpy as np

from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import Batch, cloze_batch, session_order, training_batch
from tron_cli.data.dataset import Sessions
from tron_cli.data.histories import ranges, training_windows
from tron_cli.data.lanes import Lanes
from tron_cli.models.base import Model

_SESSIONS_AT_ONCE = 1 << 16  # counted together


class Feed(Protocol):
    """Batches on the CPU, requested in ascending order of steps, from any first one.

    steps_per_pass: steps in which the training sessions are seen once.
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
        )
    return WholeSessions(config, sessions, padded=padded)


class WholeSessions:
    """train_batch_size sessions per step, each with its last sequence_length + 1 events."""

    def __init__(self, config: ExperimentConfig, sessions: Sessions, *, padded: bool) -> None:
        self._config = config
        self._sessions = sessions
        self._padded = padded
        self.steps_per_pass = math.ceil(len(sessions) / config.train_batch_size)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, where the target of an event is the one that follows it."""
        length = self._config.sequence_length
        return training_batch(self._sessions, self.chosen(step), length, padded=self._padded)

    def chosen(self, step: int) -> np.ndarray:
        """Return the sessions of a step: int64 [B].

        Passes continue across epochs, so that short epochs skip no session.
        """
        config = self._config
        data_pass, place = divmod(step, self.steps_per_pass)
        order = _order_of_pass(len(self._sessions), config.shuffling_style, config.seed, data_pass)
        return order[place * config.train_batch_size : (place + 1) * config.train_batch_size]


class Cloze(WholeSessions):
    """Whole sessions with masked events, which are the targets; masks differ in every step."""

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
        )


def expected_in_batch(config: ExperimentConfig, sessions: Sessions, num_items: int) -> np.ndarray:
    """Return the expected count of each item among a position's in-batch negatives: float64 [I].

    They are occurrences among the unmasked inputs of a batch of randomly chosen sessions; the
    influence of the position's own session is ignored.
    """
    count_V = np.zeros(num_items + 1)
    for low in range(0, len(sessions), _SESSIONS_AT_ONCE):
        some = slice(low, low + _SESSIONS_AT_ONCE)
        start_S, length_S = training_windows(sessions, some, config.sequence_length)
        _, place = ranges(start_S, start_S + length_S)
        count_V += np.bincount(sessions.items[place], minlength=len(count_V))
    count_I = count_V[1:]
    rows = min(config.train_batch_size, len(sessions)) - int(config.reject_in_batch_items)
    inputs_per_row = 1 if config.session_parallel else count_I.sum() / len(sessions)
    expected = min(config.num_batch_negatives, rows * inputs_per_row)
    return count_I * (expected / count_I.sum())


@functools.lru_cache(maxsize=1)
def _order_of_pass(num_sessions: int, style: str, seed: int, data_pass: int) -> np.ndarray:
    return session_order(num_sessions, style, seed=seed, epoch=data_pass)
