"""Packing against plain Python loops, and the order in which sessions are visited."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.datasets import pack_sessions
from hypothesis import given, settings
from hypothesis import strategies as st

from tron_cli.data.batches import pack, session_order, training_batch
from tron_cli.data.dataset import Sessions
from tron_cli.ops.attention import packed_attention

item = st.integers(1, 99)
histories = st.lists(st.lists(item, min_size=2, max_size=40), min_size=1, max_size=25)


def rows_of(values: torch.Tensor, batch) -> list[list[int]]:
    return [row.tolist() for row in values.split(batch.lengths_B.tolist())]


@given(rows=histories, window=st.integers(1, 30), data=st.data())
@settings(max_examples=200, deadline=None)
def test_training_batch_is_the_last_events_and_what_follows_them(rows, window, data):
    """Sessions come in any order, some of them twice (as with replacement)."""
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=30))
    batch = training_batch(pack_sessions(rows), np.array(chosen), window)

    expected = sorted((rows[index][-(window + 1) :] for index in chosen), key=len)
    assert rows_of(batch.inputs_N, batch) == [row[:-1] for row in expected]
    assert rows_of(batch.targets_N, batch) == [row[1:] for row in expected]
    assert rows_of(batch.places_N, batch) == [list(range(len(row) - 1)) for row in expected]
    assert rows_of(batch.rows_N, batch) == [
        [index] * (len(row) - 1) for index, row in enumerate(expected)
    ]
    for values in (
        batch.inputs_N,
        batch.targets_N,
        batch.rows_N,
        batch.places_N,
        batch.lengths_B,
    ):
        assert values.dtype == torch.int64


@given(rows=histories)
@settings(max_examples=100, deadline=None)
def test_attention_groups_hold_each_event_once(rows):
    batch = training_batch(pack_sessions(rows), np.arange(len(rows)), 50)
    covered = []
    for group in batch.groups:
        assert covered[-1:] == ([group.start - 1] if group.start else [])
        gathered = group.gather_RW.flatten()
        covered += (gathered if group.keep is None else gathered[group.keep]).tolist()
        assert covered[-1] == group.end - 1
        height, width = group.gather_RW.shape
        # Rows of like length: padding wastes a third of the places, or three, at most.
        lengths = batch.rows_N[group.start : group.end].bincount()
        lengths = lengths[lengths > 0]
        assert len(lengths) == height
        assert lengths.max() == width
        assert width <= lengths.min() * 3 / 2 + 3
    assert covered == list(range(len(batch.inputs_N)))


@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=12),
    heads=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_grouped_attention_equals_full_attention_with_a_mask(lengths, heads, seed):
    """All events at once, where only the own row's events up to now may be seen."""
    torch.manual_seed(seed)
    lengths = sorted(lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    items = np.ones(sum(lengths), np.int32)
    batch = pack(items, starts, np.array(lengths), with_targets=False)
    qkv_N3D = torch.randn(sum(lengths), 24, dtype=torch.float64)

    row, place = batch.rows_N, batch.places_N
    visible = (row[:, None] == row) & (place[:, None] >= place)
    query, key, value = (
        part.view(-1, heads, 8 // heads).transpose(0, 1) for part in qkv_N3D.chunk(3, dim=1)
    )
    scores = query @ key.transpose(1, 2) / (8 // heads) ** 0.5
    expected = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value
    expected = expected.transpose(0, 1).reshape(-1, 8)
    found = packed_attention(qkv_N3D, batch.groups, num_heads=heads, dropout_rate=0.0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_batch_without_targets_has_the_same_inputs():
    """For prediction: the target may lie beyond the end of the array."""
    items = np.array([5, 6, 7], np.int32)
    batch = pack(items, np.array([0, 0]), np.array([1, 3]), with_targets=False)
    assert batch.targets_N is None
    assert batch.inputs_N.tolist() == [5, 5, 6, 7]


def test_packing_reads_only_the_slices_of_a_mapped_file(tmp_path):
    file = tmp_path / "items.npy"
    np.save(file, np.arange(1, 1001, dtype=np.int32))
    mapped = Sessions(np.load(file, mmap_mode="r"), np.arange(0, 1001, 10))
    batch = training_batch(mapped, np.array([99, 0]), 3)
    assert batch.inputs_N.tolist() == [997, 998, 999, 7, 8, 9]


ORDERS = ("no_shuffling", "shuffle_without_replacement", "shuffle_with_replacement")


def test_no_shuffling_keeps_the_order():
    order = session_order(50, "no_shuffling", seed=1, epoch=3)
    assert order.tolist() == list(range(50))


def test_shuffling_without_replacement_visits_each_session_once():
    for epoch in range(5):
        order = session_order(500, "shuffle_without_replacement", seed=1, epoch=epoch)
        assert sorted(order.tolist()) == list(range(500))
        assert order.tolist() != list(range(500))


def test_shuffling_with_replacement_repeats_some_and_stays_in_range():
    order = session_order(20_000, "shuffle_with_replacement", seed=1, epoch=0)
    assert len(order) == 20_000
    assert order.min() >= 0
    assert order.max() < 20_000
    # The share of sessions met at least once tends to 1 - 1/e.
    assert len(set(order.tolist())) / 20_000 == pytest.approx(1 - np.exp(-1), abs=0.02)


@pytest.mark.parametrize("style", ORDERS[1:])
def test_order_is_a_function_of_seed_and_epoch_alone(style):
    orders = [
        session_order(100, style, seed=seed, epoch=epoch).tolist()
        for seed, epoch in [(1, 0), (1, 1), (2, 0), (2, 1)]
    ]
    for one, other in pairwise(orders):
        assert one != other
    np.random.seed(7)  # noqa: NPY002 - the global state must not matter
    torch.manual_seed(7)
    assert session_order(100, style, seed=1, epoch=1).tolist() == orders[1]


@pytest.mark.parametrize("style", ORDERS)
def test_order_of_one_session(style):
    assert session_order(1, style, seed=1, epoch=0).tolist() == [0]
