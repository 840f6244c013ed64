"""Session-parallel batches: lanes, each of which goes through one session after the other.

Hidasi et al., Session-based Recommendations with Recurrent Neural Networks (ICLR 2016): a step
takes the next event of every lane; a lane whose session has ended begins the next session that no
lane has taken, lanes in ascending order.

Shapes: B lanes, S sessions, C sessions of a chunk.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterator

import numpy as np
import torch

from tron_cli.data.batches import Batch, order_of_pass, pack
from tron_cli.data.dataset import Sessions
from tron_cli.data.histories import TrainingWindows, training_windows

_SESSIONS_AT_ONCE = 1 << 13


class Lanes:
    """Batches of session-parallel training, from an endless series of passes over the sessions.

    A session contributes its last sequence_length + 1 events. A pass begins as soon as all sessions
    of the previous one have begun, while some of them still run, so that no lane is ever idle.
    steps_per_pass: number of steps that have as many events as a pass.
    """

    def __init__(
        self,
        sessions: Sessions,
        *,
        lanes: int,
        sequence_length: int,
        style: str,
        seed: int,
        padded: bool = False,
        weight_S: np.ndarray | None = None,
    ) -> None:
        """Prepare for step 0.

        sessions: of at least two events each. style, seed, weight_S: see `order_of_pass`. padded:
        mark the batches as `Batch.padded`; the shapes of lanes are fixed in any case.
        """
        self._sessions = sessions
        self._lanes = lanes
        self._style = style
        self._seed = seed
        self._padded = padded
        self._weight_S = weight_S
        self._sequence_length = sequence_length
        _, self._inputs_S = training_windows(sessions, slice(None), sequence_length)
        self.steps_per_pass = -(-int(self._inputs_S.sum()) // lanes)
        self._step = 0
        self._begin_B = np.zeros(lanes, dtype=np.int64)
        self._session_B = np.zeros(lanes, dtype=np.int64)
        self._chunks = self._schedule()
        self._chunk = next(self._chunks)
        self._begun = 0  # sessions of the chunk

    def batch(self, step: int) -> Batch:
        """Return one event per lane, each in a row of its own; places_N are places in the sessions.

        Steps must be asked for in ascending order. The first may be any: those before it are only
        scheduled, ten million sessions in seconds.
        """
        assert step >= self._step
        self._step = step
        while not self._begin_until(step):
            self._chunk, self._begun = next(self._chunks), 0
        places_B = step - self._begin_B
        start_B, _ = training_windows(self._sessions, self._session_B, self._sequence_length)
        batch = pack(
            self._sessions.items,
            start_B + places_B,
            np.ones_like(places_B),
            with_targets=True,
        )
        return dataclasses.replace(
            batch,
            places_N=torch.from_numpy(places_B),
            lanes_B=torch.arange(self._lanes),
            padded=self._padded,
        )

    def _begin_until(self, step: int) -> bool:
        """Begin the sessions of the chunk that start by this step; return whether others remain."""
        begin_C, lane_C, session_C = self._chunk
        end = int(np.searchsorted(begin_C, step, side="right"))
        # Backwards, so that the first session found of a lane is its last one.
        due = slice(self._begun, end)
        lanes, first = np.unique(lane_C[due][::-1], return_index=True)
        self._begin_B[lanes] = begin_C[due][::-1][first]
        self._session_B[lanes] = session_C[due][::-1][first]
        self._begun = end
        return end < len(begin_C)

    def _schedule(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield first step, lane and number of the sessions, in order of their first step."""
        # A heap of step * lanes + lane: when each lane becomes free.
        free = list(range(self._lanes))
        windows = TrainingWindows(self._sessions, self._sequence_length)
        for data_pass in itertools.count():
            order = order_of_pass(
                windows,
                self._style,
                seed=self._seed,
                data_pass=data_pass,
                weight_S=self._weight_S,
            )
            for first in range(0, len(order), _SESSIONS_AT_ONCE):
                session_C = order[first : first + _SESSIONS_AT_ONCE]
                spans = (self._inputs_S[session_C] * self._lanes).tolist()
                begun = [heapq.heapreplace(free, free[0] + span) for span in spans]
                begin_C, lane_C = np.divmod(np.array(begun, dtype=np.int64), self._lanes)
                yield begin_C, lane_C, session_C
