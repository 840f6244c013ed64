"""Scalable cross-entropy against a reference that goes through buckets one by one."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.whole_catalogue import DIM, ITEMS, full, gradients, problem

from tron_cli.losses import cross_entropy, scalable_cross_entropy
from tron_cli.losses.scalable_cross_entropy import buckets, sce

# Three buckets of four positions: some of twenty positions are in several, some in none.
FEW = {"sce_buckets": 3, "sce_bucket_positions": 4, "sce_bucket_items": 10, "sce_mix": False}


def seeded(*leaves, seed: int = 0, **settings):
    torch.manual_seed(seed)
    return sce(*leaves, num_items=ITEMS, **{**FEW, **settings})


def reference(hidden_ND, table_VD, targets_N, settings, seed: int = 0):
    """Position by position in plain Python, from the paper's description."""
    torch.manual_seed(seed)
    events = len(hidden_ND)
    if settings["sce_mix"]:
        weights = torch.randn(settings["sce_buckets"], events, dtype=torch.float64)
        directions = [
            sum(weight * state for weight, state in zip(row, hidden_ND.detach(), strict=True))
            for row in weights
        ]
    else:
        directions = list(torch.randn(settings["sce_buckets"], DIM, dtype=torch.float64))
    losses: dict[int, list[torch.Tensor]] = {}
    for direction in directions:
        state_scores = (hidden_ND.detach() @ direction).tolist()
        item_scores = (table_VD.detach() @ direction).tolist()
        by_state = sorted(range(events), key=lambda n: -state_scores[n])
        by_item = sorted(range(1, ITEMS + 1), key=lambda i: -item_scores[i])
        for n in by_state[: settings["sce_bucket_positions"]]:
            target = int(targets_N[n])
            others = [i for i in by_item[: settings["sce_bucket_items"]] if i != target]
            logits = torch.stack([hidden_ND[n] @ table_VD[i] for i in [target, *others]])
            losses.setdefault(n, []).append(-logits.log_softmax(dim=0)[0])
    placed = {n: max(of_buckets, key=torch.Tensor.item) for n, of_buckets in losses.items()}
    zero = torch.zeros((), dtype=torch.float64)
    return torch.stack([placed.get(n, zero) * events / len(placed) for n in range(events)])


@pytest.fixture(params=["at once", "in parts"])
def parts(request, monkeypatch):
    """Set one bucket per part and blocks of 64 items, or leave the sizes as they are."""
    if request.param == "in parts":
        monkeypatch.setitem(scalable_cross_entropy._LOGITS_AT_ONCE, "cpu", 1)
        monkeypatch.setitem(cross_entropy._LOGITS_AT_ONCE, "cpu", 1)


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("items", [1, 10, 100])
def test_losses_and_gradients_are_those_of_a_plain_loop(mix, items, parts) -> None:
    leaves = problem(20)
    settings = {**FEW, "sce_mix": mix, "sce_bucket_items": items}
    loss_N = seeded(*leaves, **settings)
    expected_N = reference(*leaves, settings)
    assert 0 < (expected_N == 0).sum() < 20
    torch.testing.assert_close(loss_N, expected_N, rtol=1e-10, atol=1e-12)
    weight_N = torch.linspace(-1, 2, 20)
    found = gradients(loss_N, *leaves[:2], weight_N=weight_N)
    expected = gradients(expected_N, *leaves[:2], weight_N=weight_N)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_buckets_hold_what_is_largest_along_a_direction(parts) -> None:
    """The directions are those that the generator gives for the same seed."""
    hidden_ND, table_VD, targets_N = problem(50)
    targets_N[::4] = 0
    torch.manual_seed(1)
    positions_BX, items_BY = buckets(
        hidden_ND.detach(), table_VD.detach(), targets_N, num_items=ITEMS, num_buckets=6,
        num_positions=7, bucket_items=30, mix=False, dtype=torch.float64,
    )  # fmt: skip
    torch.manual_seed(1)
    for direction, positions, items in zip(
        torch.randn(6, DIM, dtype=torch.float64), positions_BX, items_BY, strict=True
    ):
        state_scores = (hidden_ND.detach() @ direction).tolist()
        eligible = [n for n in range(50) if n % 4]
        eligible.sort(key=lambda n: -state_scores[n])
        assert set(positions.tolist()) == set(eligible[:7])
        item_scores = (table_VD.detach() @ direction).tolist()
        ids = sorted(range(1, ITEMS + 1), key=lambda i: -item_scores[i])
        assert set(items.tolist()) == set(ids[:30])


@pytest.mark.parametrize("rows", [ITEMS + 1, ITEMS + 2])
@pytest.mark.parametrize("num_buckets", [1, 3])
def test_buckets_that_hold_everything_are_cross_entropy(num_buckets, rows, parts) -> None:
    leaves = problem(20, rows=rows)
    loss_N = seeded(
        *leaves, sce_buckets=num_buckets, sce_bucket_positions=1000, sce_bucket_items=1000
    )
    expected_N = full(*leaves)
    torch.testing.assert_close(loss_N, expected_N, rtol=1e-10, atol=1e-12)
    found = gradients(loss_N, *leaves[:2])
    torch.testing.assert_close(found, gradients(expected_N, *leaves[:2]), rtol=1e-9, atol=1e-11)


def test_a_loss_in_buckets_is_at_most_the_full_loss() -> None:
    leaves = problem(60)
    loss_N = seeded(*leaves, sce_buckets=20, sce_bucket_positions=20)
    placed_N = loss_N > 0
    unscaled_N = loss_N * placed_N.sum() / 60
    assert (unscaled_N[placed_N] < full(*leaves)[placed_N]).all()


def test_the_mean_is_over_the_positions_in_a_bucket() -> None:
    """Padding is in none, and what it holds changes nothing."""
    hidden_ND, table_VD, targets_N = problem(40)
    targets_N[30:] = 0
    loss_N = seeded(hidden_ND, table_VD, targets_N)
    assert not loss_N[30:].any()
    short_N = seeded(hidden_ND[:30], table_VD, targets_N[:30])
    torch.testing.assert_close(loss_N[:30], short_N)
    expected_N = reference(hidden_ND[:30], table_VD, targets_N[:30], FEW)
    placed_N = expected_N > 0
    mean_of_placed = (expected_N[placed_N] * placed_N.sum() / 30).mean()
    torch.testing.assert_close(loss_N[:30].mean(), mean_of_placed)
    gradient = gradients(loss_N, hidden_ND)[0]
    assert not gradient[30:].any()
    assert not gradient[:30][~placed_N].any()


def test_padding_fills_buckets_without_a_say() -> None:
    """Four places in a bucket, two positions with a target."""
    hidden_ND, table_VD, targets_N = problem(10)
    targets_N[2:] = 0
    loss_N = seeded(hidden_ND, table_VD, targets_N)
    assert (loss_N[:2] > 0).all()
    assert not loss_N[2:].any()
    for gradient in gradients(loss_N, hidden_ND, table_VD):
        assert gradient.isfinite().all()
    nothing_N = seeded(hidden_ND, table_VD, torch.zeros_like(targets_N))
    assert not nothing_N.any()
    assert not any(gradient.any() for gradient in gradients(nothing_N, hidden_ND, table_VD))


@pytest.mark.parametrize("mix", [False, True])
def test_gradcheck(mix, parts) -> None:
    hidden_ND, table_VD, targets_N = problem(8)
    settings = {"sce_bucket_positions": 4, "sce_bucket_items": 40, "sce_mix": mix}
    assert torch.autograd.gradcheck(
        lambda hidden, table: seeded(hidden, table, targets_N, **settings),
        (hidden_ND, table_VD),
        fast_mode=True,
    )


def test_the_seed_decides() -> None:
    leaves = problem(20)
    torch.testing.assert_close(seeded(*leaves, seed=3), seeded(*leaves, seed=3), rtol=0, atol=0)
    assert not torch.equal(seeded(*leaves, seed=3), seeded(*leaves, seed=4))


@pytest.mark.parametrize("events", [1, 30, 200])
def test_by_default_there_are_twice_the_root_of_the_positions(events) -> None:
    leaves = problem(events)
    usual = round(2 * math.sqrt(events))
    found_N = seeded(*leaves, sce_buckets=0, sce_bucket_positions=0)
    expected_N = seeded(*leaves, sce_buckets=usual, sce_bucket_positions=min(usual, events))
    torch.testing.assert_close(found_N, expected_N, rtol=0, atol=0)


def test_extreme_logits() -> None:
    hidden_ND, table_VD, targets_N = problem(30, scale=1e4, dtype=torch.float32)
    loss_N = seeded(hidden_ND, table_VD, targets_N, sce_bucket_positions=30, sce_bucket_items=150)
    torch.testing.assert_close(
        loss_N.double(), full(hidden_ND, table_VD, targets_N), rtol=1e-4, atol=0.1
    )
    for gradient in gradients(loss_N, hidden_ND, table_VD):
        assert gradient.isfinite().all()


def test_under_autocast_the_loss_is_float32_and_close() -> None:
    hidden_ND, table_VD, targets_N = problem(60, scale=0.5, dtype=torch.float32)
    everything = {"sce_bucket_positions": 60, "sce_bucket_items": 150}
    with torch.autocast("cpu", torch.bfloat16):
        loss_N = seeded(hidden_ND.bfloat16(), table_VD, targets_N, **everything)
    assert loss_N.dtype == torch.float32
    expected_N = full(hidden_ND, table_VD, targets_N)
    torch.testing.assert_close(loss_N.double(), expected_N, rtol=0, atol=0.05)
    found = gradients(loss_N, hidden_ND, table_VD)
    expected = gradients(expected_N, hidden_ND, table_VD)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_nothing_to_predict() -> None:
    hidden_ND, table_VD, targets_N = problem(3)
    assert seeded(hidden_ND[:0], table_VD, targets_N[:0]).shape == (0,)
    assert seeded(
        hidden_ND[:0], table_VD, targets_N[:0], sce_buckets=0, sce_bucket_positions=0
    ).shape == (0,)
