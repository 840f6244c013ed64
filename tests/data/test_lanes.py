"""Session-parallel batches against the loop of the original, written out in plain Python."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from helpers.datasets import pack_sessions, random_sessions
from hypothesis import given, settings
from hypothesis import strategies as st

from tron_cli.data.batches import Batch, session_order
from tron_cli.data.dataset import Sessions
from tron_cli.data.lanes import Lanes
from tron_cli.sampling.negatives import Distribution, sample_negatives

STYLES = ("no_shuffling", "shuffle_without_replacement", "shuffle_with_replacement")


def test_uniform_negatives_of_lanes_are_not_rejected() -> None:
    """TRON's GRU4Rec rejects none; with the same events as whole sessions, some are rejected."""
    batch = Lanes(
        pack_sessions([[1, 2, 3], [2, 3, 1]]), lanes=2, sequence_length=5, style="no_shuffling",
        seed=0,
    ).batch(0)  # fmt: skip
    options = {
        "num_uniform": 200, "num_batch": 1, "sampling_style": "batchwise",
        "reject_uniform_session_items": False, "reject_in_batch_items": True,
    }  # fmt: skip
    assert batch.inputs_N.tolist() == [1, 2]
    drawn = sample_negatives(batch, Distribution(4), **options).uniform
    assert set(drawn.tolist()) == {1, 2, 3, 4}
    whole = dataclasses.replace(batch, lanes_B=None)
    assert set(sample_negatives(whole, Distribution(4), **options).uniform.tolist()) == {3, 4}


def numbered(lengths: list[int]) -> list[list[int]]:
    """Sessions whose item ids are all different: 1, 2, ..."""
    ends = np.cumsum(lengths)
    return [
        list(range(end - length + 1, end + 1)) for end, length in zip(ends, lengths, strict=True)
    ]


def original(
    sessions: list[list[int]], lanes: int, sequence_length: int, style: str, seed: int
) -> Iterator[list[tuple[int, int, int]]]:
    """The (input, target, place) of every lane, step by step, from queues of events."""

    def in_order() -> Iterator[list[int]]:
        data_pass = 0
        while True:
            for number in session_order(len(sessions), style, seed=seed, epoch=data_pass):
                yield sessions[number][-(sequence_length + 1) :]
            data_pass += 1

    coming = in_order()
    queues: list[list[tuple[int, int, int]]] = [[] for _ in range(lanes)]
    while True:
        for lane in range(lanes):
            if not queues[lane]:
                events = next(coming)
                queues[lane] = [
                    (events[place], events[place + 1], place) for place in range(len(events) - 1)
                ]
        yield [queue.pop(0) for queue in queues]


def rows(batch: Batch) -> list[tuple[int, int, int]]:
    assert batch.targets_N is not None
    columns = (batch.inputs_N, batch.targets_N, batch.places_N)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=25),
    lanes=st.integers(1, 9),
    sequence_length=st.integers(1, 8),
    style=st.sampled_from(STYLES),
    seed=st.integers(0, 5),
    skipped=st.lists(st.integers(0, 40), max_size=3),
)
def test_batches_are_those_of_the_original_also_from_any_later_step(
    lengths: list[int],
    lanes: int,
    sequence_length: int,
    style: str,
    seed: int,
    skipped: list[int],
) -> None:
    sessions = numbered(lengths)
    expected = list(itertools.islice(original(sessions, lanes, sequence_length, style, seed), 150))

    def fresh() -> Lanes:
        return Lanes(
            pack_sessions(sessions), lanes=lanes, sequence_length=sequence_length,
            style=style, seed=seed,
        )  # fmt: skip

    whole = fresh()
    assert [rows(whole.batch(step)) for step in range(150)] == expected
    resumed, step = fresh(), 0
    for gap in skipped:
        step += gap
        assert rows(resumed.batch(step)) == expected[step]


def test_chunks_of_the_schedule_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    import tron_cli.data.lanes as module

    rng = np.random.default_rng(3)
    sessions = random_sessions(rng, 40, 1000)
    monkeypatch.setattr(module, "_SESSIONS_AT_ONCE", 3)
    given_style = {"sequence_length": 6, "style": "shuffle_without_replacement", "seed": 2}
    lanes = Lanes(pack_sessions(sessions), lanes=5, **given_style)
    expected = original(sessions, 5, **given_style)
    for step in range(200):
        assert rows(lanes.batch(step)) == next(expected)
    later = Lanes(pack_sessions(sessions), lanes=5, **given_style)
    assert rows(later.batch(200)) == next(expected)


def test_every_event_is_trained_once_a_pass_and_in_order() -> None:
    rng = np.random.default_rng(4)
    sessions = numbered(rng.integers(2, 15, 60).tolist())
    lanes = Lanes(
        pack_sessions(sessions), lanes=7, sequence_length=10,
        style="shuffle_without_replacement", seed=0,
    )  # fmt: skip
    seen_part = [row[-11:] for row in sessions]
    assert lanes.steps_per_pass == math.ceil(sum(len(row) - 1 for row in seen_part) / 7)
    begun, trained = [], []
    lane_events: list[list[int]] = [[] for _ in range(7)]
    for step in range(3 * lanes.steps_per_pass + 11):  # 11: to end the sessions of the third pass
        for lane, (event, target, place) in enumerate(rows(lanes.batch(step))):
            if place == 0:
                begun.append(event)
                lane_events[lane] = []
            lane_events[lane].append(event)
            if any(row == [*lane_events[lane], target] for row in seen_part):
                trained.append(lane_events[lane][0])
    firsts = sorted(row[0] for row in seen_part)
    for data_pass in range(3):
        assert sorted(begun[60 * data_pass : 60 * (data_pass + 1)]) == firsts
    # Whatever was begun in three passes was gone through, event by event, to its last target.
    assert not Counter(begun[:180]) - Counter(trained)


def test_fewer_sessions_than_lanes_go_on_with_the_next_pass() -> None:
    lanes = Lanes(
        pack_sessions([[1, 2, 3], [4, 5]]), lanes=5, sequence_length=9, style="no_shuffling", seed=0
    )
    assert lanes.steps_per_pass == 1
    # By hand: 123, 45, 123, 45, 123 begin; then lanes 1 and 3 are free for 45 and 123; ...
    assert [lanes.batch(step).inputs_N.tolist() for step in range(3)] == [
        [1, 4, 1, 4, 1],
        [2, 4, 2, 1, 2],
        [4, 1, 4, 2, 1],
    ]
    assert lanes.batch(2).places_N.tolist() == [0, 0, 0, 1, 0]


def test_a_batch_is_rows_of_one_event_in_order_of_lanes() -> None:
    rng = np.random.default_rng(5)
    sessions = pack_sessions(random_sessions(rng, 30, 50))
    lanes = Lanes(sessions, lanes=4, sequence_length=5, style="no_shuffling", seed=0)
    batch = lanes.batch(17)
    assert batch.lanes_B is not None
    assert batch.lanes_B.tolist() == batch.rows_N.tolist() == [0, 1, 2, 3]
    assert batch.lengths_B.tolist() == [1, 1, 1, 1]
    (group,) = batch.groups
    assert (group.start, group.end, group.keep) == (0, 4, None)
    assert group.gather_RW.tolist() == [[0], [1], [2], [3]]
    assert not batch.padded


def test_a_run_resumed_late_does_not_wait_for_what_is_past() -> None:
    """Two hundred thousand sessions in well under a second, so ten million in less than 30."""
    lengths = np.random.default_rng(6).integers(2, 60, 200_000)
    sessions = Sessions(
        np.ones(lengths.sum(), dtype=np.int32), np.concatenate([[0], lengths.cumsum()])
    )
    lanes = Lanes(
        sessions, lanes=32, sequence_length=50, style="shuffle_without_replacement", seed=0
    )
    begin = time.process_time()
    lanes.batch(lanes.steps_per_pass)
    assert time.process_time() - begin < 0.6
