"""Negatives: their candidates, their number and their distribution."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tron_cli.data.batches import training_batch
from tron_cli.data.dataset import Sessions
from tron_cli.sampling.negatives import Distribution, _without_replacement, sample_negatives

STYLES = ("eventwise", "sessionwise", "batchwise")


def make_batch(rows: list[list[int]], window: int = 10):
    """A batch whose row inputs are `rows` (sorted by length), with item 1 as the last target."""
    rows = sorted(rows, key=len)
    items = np.array([item for row in rows for item in [*row, 1]], np.int32)
    offsets = np.cumsum([0] + [len(row) + 1 for row in rows])
    batch = training_batch(Sessions(items, offsets), np.arange(len(rows)), window)
    assert batch.inputs_N.tolist() == [item for row in rows for item in row]
    return rows, batch


def draw(batch, num_items: int, **options):
    defaults = {
        "num_uniform": 8,
        "num_batch": 0,
        "sampling_style": "batchwise",
        "reject_uniform_session_items": False,
        "reject_in_batch_items": False,
    }
    return sample_negatives(batch, Distribution(num_items), **{**defaults, **options})


def rejected_items(rows, style, in_session, in_batch) -> list[set[int]]:
    """Return what each set of uniform negatives may not hold, by TRON's rules."""
    if style == "batchwise":
        return [{item for row in rows for item in row} if in_batch else set()]
    own = [set(row) if in_session else set() for row in rows]
    if style == "sessionwise":
        return own
    return [own[index] for index, row in enumerate(rows) for _ in row]


def kept(keep, index) -> bool:
    return keep is None or bool(keep[index])


catalogues = st.integers(1, 12).flatmap(
    lambda num_items: st.tuples(
        st.just(num_items),
        st.lists(
            st.lists(st.integers(1, num_items), min_size=1, max_size=10), min_size=1, max_size=6
        ),
    )
)


@given(
    catalogue=catalogues,
    style=st.sampled_from(STYLES),
    in_session=st.booleans(),
    in_batch=st.booleans(),
    count=st.integers(0, 9),
    seed=st.integers(0, 999),
)
@settings(max_examples=400, deadline=None)
def test_uniform_negatives_keep_to_the_allowed_items(
    catalogue, style, in_session, in_batch, count, seed
):
    num_items, rows = catalogue
    rows, batch = make_batch(rows)
    torch.manual_seed(seed)
    drawn = draw(
        batch, num_items, num_uniform=count, sampling_style=style,
        reject_uniform_session_items=in_session, reject_in_batch_items=in_batch,
    )  # fmt: skip
    rejected = rejected_items(rows, style, in_session, in_batch)
    sets = drawn.uniform[None] if style == "batchwise" else drawn.uniform
    assert sets.shape == (len(rejected), count)
    for index, out in enumerate(rejected):
        allowed = set(range(1, num_items + 1)) - out
        # A set without any allowed item is marked as not kept, and only such a set is.
        assert kept(drawn.uniform_keep, index) == bool(allowed)
        if allowed:
            assert set(sets[index].tolist()) <= allowed
        # What is not kept is looked up all the same, so it must be a valid id.
        assert all(1 <= item <= num_items for item in sets[index].tolist())


@given(
    rows=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=10), min_size=1, max_size=6),
    others_only=st.booleans(),
    count=st.integers(0, 40),
    seed=st.integers(0, 999),
)
@settings(max_examples=400, deadline=None)
def test_in_batch_negatives_are_distinct_occurrences(rows, others_only, count, seed):
    rows, batch = make_batch(rows)
    owner = batch.rows_N.tolist()
    torch.manual_seed(seed)
    drawn = draw(batch, 6, num_batch=count, reject_in_batch_items=others_only)
    for row in range(len(rows)):
        keep = drawn.in_batch_keep_BM
        chosen = [
            event
            for column, event in enumerate(drawn.in_batch_BM[row].tolist())
            if keep is None or keep[row, column]
        ]
        candidates = [
            event for event in range(len(owner)) if not others_only or owner[event] != row
        ]
        assert len(chosen) == len(set(chosen)) == min(count, len(candidates))
        assert set(chosen) <= set(candidates)


def assert_even(counts: np.ndarray) -> None:
    """Chi-square of equal chances; 6 standard deviations are generous, a skewed draw is far out."""
    expected = counts.sum() / len(counts)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    assert chi_square < freedom + 6 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("style", STYLES)
def test_uniform_negatives_are_uniform_over_what_remains(style):
    num_items, count = 40, 60_000
    # The first and the last item are rejected, as are neighbours, gaps of one, and repeats.
    session = [1, 2, 3, 7, 9, 9, 20, 39, 40]
    rows, batch = make_batch([session, [5]])
    torch.manual_seed(0)
    drawn = draw(
        batch, num_items, num_uniform=count, sampling_style=style,
        reject_uniform_session_items=True, reject_in_batch_items=True,
    )  # fmt: skip
    sets = drawn.uniform[None] if style == "batchwise" else drawn.uniform
    for items, out in zip(sets, rejected_items(rows, style, True, True), strict=True):
        counts = np.bincount(items.numpy(), minlength=num_items + 1)
        allowed = sorted(set(range(1, num_items + 1)) - out)
        assert counts[allowed].sum() == count
        assert_even(counts[allowed])


def test_without_rejection_every_item_is_drawn_alike():
    _, batch = make_batch([[1, 2, 3]])
    torch.manual_seed(0)
    counts = np.bincount(draw(batch, 50, num_uniform=100_000).uniform.numpy(), minlength=51)
    assert counts[0] == 0
    assert len(counts) == 51
    assert_even(counts[1:])


@pytest.mark.parametrize("left", [1, 25, 50])
def test_the_one_item_that_is_left_is_drawn(left):
    _, batch = make_batch([[item for item in range(1, 51) if item != left]], window=50)
    drawn = draw(
        batch, 50, sampling_style="sessionwise", reject_uniform_session_items=True, num_uniform=100
    )
    assert set(drawn.uniform.flatten().tolist()) == {left}
    assert kept(drawn.uniform_keep, 0)


def test_a_catalogue_of_millions():
    """The last item is within reach, the inputs are not."""
    num_items = 2_000_000_000
    torch.manual_seed(0)
    _, batch = make_batch([[1, num_items - 1, 5]])
    drawn = draw(batch, num_items, num_uniform=100_000, reject_in_batch_items=True).uniform
    assert drawn.max() > num_items * 0.9999
    assert drawn.min() < num_items * 0.0001
    assert drawn.max() <= num_items


@pytest.mark.parametrize("reject", [False, True])
def test_a_catalogue_of_one_item(reject):
    _, batch = make_batch([[1], [1, 1]])
    for style in STYLES:
        drawn = draw(
            batch, 1, sampling_style=style,
            reject_uniform_session_items=reject, reject_in_batch_items=reject,
        )  # fmt: skip
        assert set(drawn.uniform.flatten().tolist()) == {1}
        sets = {"eventwise": 3, "sessionwise": 2, "batchwise": 1}[style]
        assert [kept(drawn.uniform_keep, index) for index in range(sets)] == [not reject] * sets


def test_a_batch_of_one_session_has_no_other_sessions():
    _, batch = make_batch([[3, 4, 5]])
    alone = draw(batch, 9, num_batch=2, reject_in_batch_items=True)
    assert alone.in_batch_keep_BM is not None
    assert not alone.in_batch_keep_BM.any()
    among_all = draw(batch, 9, num_batch=2, reject_in_batch_items=False)
    assert among_all.in_batch_keep_BM is None or among_all.in_batch_keep_BM.all()
    assert set(among_all.in_batch_BM.flatten().tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("others_only", [False, True])
def test_each_occurrence_is_an_equally_likely_in_batch_negative(others_only):
    rows, batch = make_batch([[2], [3, 3], [4, 5, 6], [2, 2, 2, 2]])
    owner = np.repeat(range(4), [len(row) for row in rows])
    counts = np.zeros((4, 10))
    torch.manual_seed(0)
    for _ in range(3000):
        chosen = draw(batch, 9, num_uniform=0, num_batch=3, reject_in_batch_items=others_only)
        assert chosen.in_batch_keep_BM is None or chosen.in_batch_keep_BM.all()
        np.add.at(counts, (np.arange(4)[:, None], chosen.in_batch_BM.numpy()), 1)
    for row in range(4):
        candidates = owner != row if others_only else np.ones(10, bool)
        assert counts[row][~candidates].sum() == 0
        assert_even(counts[row][candidates])


@pytest.mark.parametrize("others_only", [False, True])
def test_each_set_of_in_batch_negatives_is_equally_likely_and_no_session_knows_the_other(
    others_only,
):
    _, batch = make_batch([[2], [3, 4], [5, 6], [7]])
    drawn = 8000
    torch.manual_seed(0)
    sets = np.zeros((drawn, 4), np.int64)  # as bits
    for turn in range(drawn):
        chosen = draw(batch, 9, num_uniform=0, num_batch=3, reject_in_batch_items=others_only)
        keep = chosen.in_batch_keep_BM
        assert keep is None or keep.all()
        sets[turn] = (1 << chosen.in_batch_BM).sum(dim=1).numpy()
    possible = [
        [
            sum(1 << event for event in events)
            for events in combinations(
                [event for event in range(6) if not others_only or batch.rows_N[event] != row], 3
            )
        ]
        for row in range(4)
    ]
    for row, of_row in enumerate(possible):
        assert_even(np.array([(sets[:, row] == bits).sum() for bits in of_row]))
    # What the first and the second session have together: every pair of sets alike.
    pairs = [(a, b) for a in possible[0] for b in possible[1]]
    assert_even(np.array([((sets[:, 0] == a) & (sets[:, 1] == b)).sum() for a, b in pairs]))


@pytest.mark.parametrize(("events", "count"), [(1, 1), (30, 12), (30, 30), (90, 60)])
def test_draws_without_replacement_are_fisher_and_yates(events, count):
    """Step by step, with the same random numbers; every size from none to all events at once."""
    sizes = torch.arange(events + 1)
    torch.manual_seed(0)
    drawn = _without_replacement(sizes, count)
    torch.manual_seed(0)
    random = torch.rand(events + 1, count, dtype=torch.float64)
    for size in sizes.tolist():
        left, expected = list(range(size)), set()
        for step in range(min(count, size)):
            place = step + int(random[size, step] * (size - step))
            left[step], left[place] = left[place], left[step]
            expected.add(left[step])
        assert set(drawn[size, :size].tolist()) == expected
        assert (drawn[size, size:] >= size).all()


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 8)
        return made


def test_in_batch_draws_grow_with_the_rows_not_with_rows_times_events():
    """Drawing a key for each row and event took 0.75 s at 2,048 rows."""
    largest = {}
    for rows in (64, 256):
        _, batch = make_batch([[2, 3, 4, 5, 6]] * rows)
        with Largest() as found:
            draw(batch, 9, num_uniform=0, num_batch=3, reject_in_batch_items=True)
        largest[rows] = found.elements
    assert largest[256] <= 4 * largest[64]


def test_sessions_and_events_draw_on_their_own():
    _, batch = make_batch([[2, 3], [4, 5, 6]])
    torch.manual_seed(0)
    for style, sets in (("eventwise", 5), ("sessionwise", 2)):
        drawn = draw(batch, 1000, sampling_style=style, num_uniform=20).uniform
        assert len({tuple(row) for row in drawn.tolist()}) == sets
    in_batch = draw(batch, 9, num_batch=3).in_batch_BM.tolist()
    assert len(in_batch) == 2


def test_the_seed_decides():
    _, batch = make_batch([[2, 3], [4, 5, 6]])

    def drawn(seed):
        torch.manual_seed(seed)
        found = draw(batch, 1000, num_batch=3, sampling_style="eventwise")
        return found.uniform.tolist(), found.in_batch_BM.tolist()

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_targets_alone_are_not_rejected():
    """TRON rejects inputs; a session's last target is an input of nobody, and stays in the draw."""
    items = np.array([2, 3, 4], np.int32)
    batch = training_batch(Sessions(items, np.array([0, 3])), np.arange(1), 10)
    for style in STYLES:
        drawn = draw(
            batch, 4, sampling_style=style, num_uniform=200,
            reject_uniform_session_items=True, reject_in_batch_items=True,
        )  # fmt: skip
        assert set(drawn.uniform.flatten().tolist()) == {1, 4}


def test_inputs_before_the_window_are_not_rejected():
    """Rejection knows what the model sees, as in TRON: the last sequence_length inputs."""
    items = np.array([1, 2, 3, 4], np.int32)
    batch = training_batch(Sessions(items, np.array([0, 4])), np.arange(1), 2)
    drawn = draw(
        batch, 4, sampling_style="sessionwise", num_uniform=200, reject_uniform_session_items=True
    )
    assert set(drawn.uniform.flatten().tolist()) == {1, 4}


def test_reject_in_batch_items_ends_where_no_item_is_left():
    """TRON redraws one negative at a time in Python, and never ends where no item is left."""
    _, batch = make_batch([[1, 2, 3, 4, 5]])
    drawn = draw(batch, 5, num_uniform=50_000, reject_in_batch_items=True)
    assert drawn.uniform_keep is not None
    assert not drawn.uniform_keep.any()
