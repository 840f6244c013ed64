"""Negatives by popularity and mixed: what is drawn follows the weights of what rejection leaves.

Most tests put an evenly spaced grid in the place of the random numbers: then each item must come
up in its exact share of the draws, to within one draw, and no test needs luck.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.datasets import pack_sessions, tiny_settings
from hypothesis import given, settings
from hypothesis import strategies as st

from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import Batch, training_batch
from tron_cli.registry import SAMPLERS
from tron_cli.sampling import samplers
from tron_cli.sampling.negatives import Distribution, Negatives, sample_negatives
from tron_cli.training.start import _distribution

CPU = torch.device("cpu")
STYLES = ("eventwise", "sessionwise", "batchwise")


def make_batch(rows: list[list[int]], *, padded: bool = False) -> Batch:
    """A batch whose inputs are `rows`, in ascending order of length."""
    rows = sorted(rows, key=len)
    sessions = pack_sessions([[*row, 1] for row in rows])
    return training_batch(sessions, np.arange(len(rows)), 10, padded=padded)


def weighing(weights: list[float]) -> Distribution:
    return Distribution.of(np.array(weights, np.float64), expected_of=None, device=CPU)


def draw(batch: Batch, distribution: Distribution, count: int, **options: Any) -> Negatives:
    defaults = {
        "num_uniform": count,
        "num_batch": 0,
        "sampling_style": "batchwise",
        "reject_uniform_session_items": False,
        "reject_in_batch_items": False,
    }
    return sample_negatives(batch, distribution, **{**defaults, **options})


def sets_of(batch: Batch, negatives: Negatives, style: str) -> list[tuple[list[int], bool]]:
    """Items and whether they count, of each set."""
    sets = negatives.uniform[None] if style == "batchwise" else negatives.uniform
    keep = negatives.uniform_keep
    kept = [True] * len(sets) if keep is None else keep.tolist()
    return list(zip(sets.tolist(), kept, strict=True))


def rejected_of(batch: Batch, style: str, rejects: bool) -> list[set[int]]:
    """Return what each set may not hold: the inputs of the batch or of the own session."""
    inputs, rows = batch.inputs_N.tolist(), batch.rows_N.tolist()
    if not rejects:
        own = [set()] * len(batch.lengths_B)
        return {"batchwise": [set()], "sessionwise": own, "eventwise": [set() for _ in rows]}[style]
    if style == "batchwise":
        return [{item for item in inputs if item}]
    own = [{i for i, r in zip(inputs, rows, strict=True) if r == row and i} for row in range(
        len(batch.lengths_B))]  # fmt: skip
    return own if style == "sessionwise" else [own[row] for row in rows]


def grid(*shape: Any, **options: Any) -> torch.Tensor:
    """Evenly spaced numbers in each row, shuffled, in the place of torch.rand."""
    size = torch.Size(shape[0] if len(shape) == 1 else shape)
    places = (torch.arange(size[-1], dtype=torch.float64) + 0.5) / size[-1]
    return places[torch.randperm(size[-1])].expand(size)


# --- what the samplers weigh ----------------------------------------------------------------------

COUNTS = np.array([0.0, 1.0, 5.0, 0.0, 20.0])


def test_the_uniform_sampler_weighs_all_alike() -> None:
    assert samplers.uniform(COUNTS).tolist() == [1.0] * 5


@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0, 2.0])
def test_popularity_weighs_by_a_power_of_the_count(alpha: float) -> None:
    found = samplers.popularity(COUNTS, popularity_alpha=alpha)
    expected = np.array([0.0, 1.0, 5.0**alpha, 0.0, 20.0**alpha])
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=1e-14)


def test_popularity_of_alpha_0_is_uniform_also_for_items_that_training_never_shows() -> None:
    found = samplers.popularity(COUNTS, popularity_alpha=0.0)
    assert found.tolist() == [1.0] * 5
    assert weighing(found.tolist()).cumulative_V is None


def test_a_very_large_alpha_is_the_most_popular_item_alone() -> None:
    """1,000,000 to the power of 400 is no float64."""
    found = samplers.popularity(np.array([3.0, 1e6, 10.0]), popularity_alpha=400.0)
    assert (found / found.sum()).tolist() == pytest.approx([0.0, 1.0, 0.0])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_mixture_has_shares_of_both(share: float) -> None:
    found = samplers.mixed(COUNTS, popularity_alpha=1.0, mixed_share=share)
    expected = [share * count / 26 + (1 - share) / 5 for count in COUNTS]
    assert (found / found.sum()).tolist() == pytest.approx(expected, rel=1e-12)
    # Without a share by popularity nothing is left to weigh.
    assert (weighing(found.tolist()).cumulative_V is None) == (share == 0.0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_training_weighs_by_the_training_occurrences(name: str) -> None:
    """By the settings of the configuration, events of any place, items never seen included."""
    sessions = pack_sessions([[1, 2, 2], [2, 5], [5, 1, 2, 2]])
    count_I = np.array([2, 5, 0, 0, 2, 0])
    changes = {"popularity": {"popularity_alpha": 0.5},
               "mixed": {"popularity_alpha": 0.5, "mixed_share": 0.25}}  # fmt: skip
    config = ExperimentConfig(**tiny_settings(negative_sampler=name, **changes.get(name, {})))
    found = _distribution(config, sessions, 6, CPU)
    assert found.num_items == 6
    assert found.log_expected_V is None
    if name == "uniform":
        assert found.cumulative_V is None
        return
    popular_I = count_I**0.5 / (count_I**0.5).sum()
    expected_I = popular_I if name == "popularity" else 0.25 * popular_I + 0.75 / 6
    assert found.cumulative_V is not None
    weight_I = found.cumulative_V.diff().double()
    assert (weight_I / weight_I.sum()).tolist() == pytest.approx(expected_I.tolist(), rel=1e-12)


# --- what is drawn --------------------------------------------------------------------------------

catalogues = st.integers(2, 12).flatmap(
    lambda num_items: st.tuples(
        st.lists(
            st.sampled_from([0.0, 0.0, 1.0, 1.0, 2.0, 7.5, 100.0, 1e-3]),
            min_size=num_items, max_size=num_items,
        ).filter(any),
        st.lists(
            st.lists(st.integers(1, num_items), min_size=1, max_size=10), min_size=1, max_size=5
        ),
    )
)  # fmt: skip


@given(
    catalogue=catalogues,
    style=st.sampled_from(STYLES),
    rejects=st.booleans(),
    padded=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_each_item_has_its_exact_share_of_the_draws(
    catalogue: tuple[list[float], list[list[int]]], style: str, rejects: bool, padded: bool
) -> None:
    """Draws come from what rejection leaves, never items of no weight; empty sets do not count."""
    weights, rows = catalogue
    distribution = weighing(weights)
    if distribution.cumulative_V is None:
        return  # the path of uniform negatives, which test_negatives.py is about
    batch = make_batch(rows, padded=padded)
    count = 1000
    with mock.patch.object(torch, "rand", grid):
        drawn = draw(
            batch, distribution, count, sampling_style=style,
            reject_uniform_session_items=rejects, reject_in_batch_items=rejects,
        )  # fmt: skip
    sets = sets_of(batch, drawn, style)
    rejected = rejected_of(batch, style, rejects)
    assert len(sets) == len(rejected)
    for (items, kept), out in zip(sets, rejected, strict=True):
        left = {i: w for i, w in enumerate(weights, start=1) if i not in out and w > 0}
        assert kept == bool(left)
        assert all(1 <= item <= len(weights) for item in items)  # looked up also where not kept
        if left:
            found = np.bincount(items, minlength=len(weights) + 1)
            total = sum(map(Fraction, left.values()))
            for item in range(1, len(weights) + 1):
                share = Fraction(left.get(item, 0.0)) / total
                assert abs(found[item] - count * share) <= 1 if share else found[item] == 0


def test_whole_weights_are_the_shares_and_tiny_ones_stay_possible() -> None:
    weights = np.array([1.0, 0.0, 1e-30, 3.0, 1e-300, 0.0])
    cumulative_V = weighing(weights.tolist()).cumulative_V
    assert cumulative_V is not None
    whole_I = cumulative_V.diff().tolist()
    assert whole_I[1] == whole_I[5] == 0
    assert whole_I[2] == whole_I[4] == 1
    assert Fraction(whole_I[3], whole_I[0]) == 3


@pytest.mark.parametrize("rejects", [False, True])
@pytest.mark.parametrize("lucky", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_random_numbers_are_items_of_weight(rejects: bool, lucky: float) -> None:
    """The first and the last items have none."""
    weights = [0.0, 1 / 3, 0.0, 2 / 3, 1e-40, 1e-40, 1e-40, 0.0, 0.0]
    batch = make_batch([[9, 3]])

    def constant(*shape: Any, **options: Any) -> torch.Tensor:
        return torch.full(shape[0], lucky, dtype=torch.float64)

    with mock.patch.object(torch, "rand", constant):
        drawn = draw(batch, weighing(weights), 5, reject_in_batch_items=rejects)
    assert set(drawn.uniform.tolist()) == {7 if lucky else 2}


@pytest.mark.parametrize("style", STYLES)
def test_a_million_draws_hold_nothing_rejected_and_follow_the_weights(style: str) -> None:
    num_items = 2000
    random = np.random.default_rng(5)
    weights = (1 / np.arange(1, num_items + 1)) * (random.random(num_items) > 0.1)
    # The most popular items are rejected, neighbours and repeats among them.
    rows = [[1, 2, 3, 3, 10, 400, 2000, 17], [1, 5, 5, 1999], [2, 2]]
    batch = make_batch(rows)
    torch.manual_seed(0)
    count = {"eventwise": 80_000, "sessionwise": 350_000, "batchwise": 1_000_000}[style]
    drawn = draw(
        batch, weighing(weights.tolist()), count, sampling_style=style,
        reject_uniform_session_items=True, reject_in_batch_items=True,
    )  # fmt: skip
    rejected = rejected_of(batch, style, True)
    for (items, kept), out in zip(sets_of(batch, drawn, style), rejected, strict=True):
        assert kept
        found_I = np.bincount(items, minlength=num_items + 1)[1:]
        left_I = weights.copy()
        left_I[[item - 1 for item in out]] = 0.0
        assert found_I[left_I == 0].sum() == 0
        expected_I = count * left_I / left_I.sum()
        often = expected_I >= 5
        chi_square = ((found_I - expected_I)[often] ** 2 / expected_I[often]).sum()
        freedom = often.sum() - 1
        assert chi_square < freedom + 6 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("style", STYLES)
def test_where_all_weight_is_rejected_nothing_counts(style: str) -> None:
    """Items are left, which are never drawn."""
    batch = make_batch([[2, 4, 4]])
    drawn = draw(
        batch, weighing([0.0, 3.0, 0.0, 1.0, 0.0]), 7, sampling_style=style,
        reject_uniform_session_items=True, reject_in_batch_items=True,
    )  # fmt: skip
    assert not any(kept for _, kept in sets_of(batch, drawn, style))


# --- uniform negatives are what they were ---------------------------------------------------------


@given(
    num_items=st.integers(1, 15),
    rows=st.lists(st.lists(st.integers(1, 15), min_size=1, max_size=10), min_size=1, max_size=5),
    style=st.sampled_from(STYLES),
    rejects=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=200, deadline=None)
def test_uniform_negatives_take_the_same_random_numbers(
    num_items: int, rows: list[list[int]], style: str, rejects: bool, padded: bool, seed: int
) -> None:
    """Draw the floor(random * left)-th of the items left in each set: one number per draw, so
    that runs of before there were other samplers can be repeated."""
    rows = [[min(item, num_items) for item in row] for row in rows]
    batch = make_batch(rows, padded=padded)
    torch.manual_seed(seed)
    drawn = draw(
        batch, Distribution(num_items), 6, sampling_style=style,
        reject_uniform_session_items=rejects, reject_in_batch_items=rejects,
    )  # fmt: skip
    torch.manual_seed(seed)
    rejected = rejected_of(batch, style, rejects)
    if not rejects:
        expected = torch.randint(1, num_items + 1, (len(rejected), 6))
        assert drawn.uniform.reshape(-1, 6).tolist() == expected.tolist()
        return
    numbers = torch.rand(len(rejected), 6, dtype=torch.float64).tolist()
    for (items, kept), out, row in zip(
        sets_of(batch, drawn, style), rejected, numbers, strict=True
    ):
        left = [item for item in range(1, num_items + 1) if item not in out]
        assert kept == bool(left)
        if left:
            assert items == [left[int(number * len(left))] for number in row]


def test_distributions_are_told_apart_by_nothing_but_weights() -> None:
    """A sampler whose weights are all alike draws what the uniform one draws."""
    assert weighing([0.1] * 9) == Distribution(9)
