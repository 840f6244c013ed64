"""The batch of each training step: a function of the configuration and of the step's number."""

from __future__ import annotations

import functools
import math
from typing import Protocol

import numpy as np

from tron_cli.batches import Batch, cloze_batch, session_order, training_batch
from tron_cli.config import ExperimentConfig
from tron_cli.dataset import Sessions
from tron_cli.lanes import Lanes
from tron_cli.models import Model


class Feed(Protocol):
    """Batches on the CPU, asked for in ascending order of steps, from any first one.

    steps_per_pass: steps in which the training sessions are seen once.
    """

    steps_per_pass: int

    def batch(self, step: int) -> Batch: ...


def build_feed(config: ExperimentConfig, sessions: Sessions, model: Model, *, padded: bool) -> Feed:
    """What a configuration's model trains on. padded: see `Batch`."""
    if model.mask_item is not None:
        return Cloze(config, sessions, model.num_items)
    if config.session_parallel:
        return Lanes(
            sessions,
            lanes=config.train_batch_size,
            sequence_length=config.sequence_length,
            style=config.shuffling_style,
            seed=config.seed,
        )
    return WholeSessions(config, sessions, padded=padded)


class WholeSessions:
    """train_batch_size sessions a step, each with its last sequence_length + 1 events."""

    def __init__(self, config: ExperimentConfig, sessions: Sessions, *, padded: bool) -> None:
        self._config = config
        self._sessions = sessions
        self._padded = padded
        self.steps_per_pass = math.ceil(len(sessions) / config.train_batch_size)

    def batch(self, step: int) -> Batch:
        """What follows each event is its target."""
        length = self._config.sequence_length
        return training_batch(self._sessions, self.chosen(step), length, padded=self._padded)

    def chosen(self, step: int) -> np.ndarray:
        """int64 [B]: the sessions of a step. Passes go on across epochs, so that short epochs skip
        nothing."""
        config = self._config
        data_pass, place = divmod(step, self.steps_per_pass)
        order = _order_of_pass(len(self._sessions), config.shuffling_style, config.seed, data_pass)
        return order[place * config.train_batch_size : (place + 1) * config.train_batch_size]


class Cloze(WholeSessions):
    """The same sessions with masked events, which are the targets; masks differ in every step."""

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


@functools.lru_cache(maxsize=1)
def _order_of_pass(num_sessions: int, style: str, seed: int, data_pass: int) -> np.ndarray:
    return session_order(num_sessions, style, seed=seed, epoch=data_pass)
