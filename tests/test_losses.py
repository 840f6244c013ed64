"""Losses and sampled logits against closed forms in float64, brute force and gradcheck."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tron_cli import logits, losses
from tron_cli.logits import dot_products

LOSSES = {
    "bce": losses.bce,
    "ssm": losses.ssm,
    "bpr-max": partial(losses.bpr_max, penalty=0.0),
    "bpr-max with penalty": partial(losses.bpr_max, penalty=0.7),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def closed_form(name: str, positive: float, negatives: list[float]) -> float:
    """The loss of one position in plain Python floats."""
    if name == "bce":
        mean = sum(map(_softplus, negatives)) / len(negatives) if negatives else 0.0
        return _softplus(-positive) + mean
    if not negatives:
        return 0.0
    if name == "ssm":
        return math.log(sum(math.exp(x) for x in [positive, *negatives])) - positive
    total = sum(math.exp(x) for x in negatives)
    weights = [math.exp(x) / total for x in negatives]
    gain = sum(w / (1 + math.exp(x - positive)) for w, x in zip(weights, negatives, strict=True))
    penalty = 0.7 if name == "bpr-max with penalty" else 0.0
    return -math.log(gain) + penalty * sum(
        w * x * x for w, x in zip(weights, negatives, strict=True)
    )


scores = st.floats(-20, 20, allow_nan=False)


@every_loss
@given(
    positive=scores, negatives=st.lists(st.tuples(scores, st.booleans()), min_size=1, max_size=6)
)
@settings(max_examples=60, deadline=None)
def test_value_is_the_closed_form_of_the_kept_negatives(name, positive, negatives):
    values = torch.tensor([[value for value, _ in negatives]], dtype=torch.float64)
    keep = torch.tensor([[kept for _, kept in negatives]])
    positive_N = torch.tensor([positive], dtype=torch.float64)

    masked = LOSSES[name](positive_N, values, keep).item()
    kept_only = closed_form(name, positive, [value for value, kept in negatives if kept])
    assert masked == pytest.approx(kept_only, rel=1e-10, abs=1e-10)

    unmasked = LOSSES[name](positive_N, values, None).item()
    everything = closed_form(name, positive, [value for value, _ in negatives])
    assert unmasked == pytest.approx(everything, rel=1e-10, abs=1e-10)


@every_loss
def test_gradients_by_finite_differences(name):
    generator = torch.Generator().manual_seed(1)
    positive_N = torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True)
    negative_NK = torch.randn(5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    keep_NK = torch.rand(5, 4, generator=generator) < 0.6
    keep_NK[0] = False
    assert torch.autograd.gradcheck(LOSSES[name], (positive_N, negative_NK, keep_NK))
    assert torch.autograd.gradcheck(LOSSES[name], (positive_N, negative_NK, None))


@every_loss
def test_masked_negatives_are_as_good_as_absent(name):
    """Value and gradients, whatever the masked logits are."""
    generator = torch.Generator().manual_seed(2)
    positive_N = torch.randn(3, dtype=torch.float64, generator=generator, requires_grad=True)
    kept_NK = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    for masked in (0.0, 1e4, -1e4):
        wide_NK = torch.cat([kept_NK, torch.full((3, 2), masked, dtype=torch.float64)], dim=1)
        keep_NK = torch.tensor([[True] * 4 + [False] * 2]).expand(3, 6)
        with_masked = LOSSES[name](positive_N, wide_NK, keep_NK)
        without = LOSSES[name](positive_N, kept_NK, None)
        torch.testing.assert_close(with_masked, without, rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(
            torch.autograd.grad(with_masked.sum(), (positive_N, kept_NK)),
            torch.autograd.grad(without.sum(), (positive_N, kept_NK)),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@every_loss
def test_no_negative_left_gives_no_pull_on_negatives_and_no_nan(name):
    positive_N = torch.tensor([0.3, -1.0], requires_grad=True)
    negative_NK = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    loss_N = LOSSES[name](positive_N, negative_NK, torch.zeros(2, 2, dtype=torch.bool))
    loss_N.sum().backward()
    expected = [closed_form(name, value, []) for value in (0.3, -1.0)]
    assert loss_N.tolist() == pytest.approx(expected, abs=1e-6)
    assert not negative_NK.grad.any()
    assert positive_N.grad.isfinite().all()
    assert positive_N.grad.any() == (name == "bce")


@every_loss
def test_large_logits_stay_finite(name):
    """float32 scores of +-1e4, with and without masked negatives, in the loss and its gradients."""
    extremes = [-1e4, 0.0, 1e4]
    rows = torch.cartesian_prod(*[torch.tensor(extremes)] * 4)
    for keep_NK in (None, torch.tensor([[True, False, True]]).expand(len(rows), 3)):
        positive_N = rows[:, 0].clone().requires_grad_()
        negative_NK = rows[:, 1:].clone().requires_grad_()
        loss_N = LOSSES[name](positive_N, negative_NK, keep_NK)
        loss_N.sum().backward()
        assert loss_N.isfinite().all()
        assert positive_N.grad.isfinite().all()
        assert negative_NK.grad.isfinite().all()


def test_bpr_max_with_masked_negatives_is_not_nan():
    """A mask of -inf would be 0 * inf in softmax * logit^2."""
    loss_N = losses.bpr_max(
        torch.tensor([1.0]),
        torch.tensor([[2.0, 3.0]]),
        torch.tensor([[True, False]]),
        penalty=1.0,
    )
    assert loss_N.item() == pytest.approx(_softplus(1.0) + 4.0, rel=1e-6)


# --- dot products ---------------------------------------------------------------------------------


def _tables(num_events: int, num_ids: int, *, items: int = 7, dim: int = 3):
    generator = torch.Generator().manual_seed(num_events * 31 + num_ids)
    hidden_ND = torch.randn(num_events, dim, dtype=torch.float64, generator=generator)
    table_VD = torch.randn(items, dim, dtype=torch.float64, generator=generator)
    ids_NK = torch.randint(items, (num_events, num_ids), generator=generator)
    return hidden_ND.requires_grad_(), table_VD.requires_grad_(), ids_NK


def _check_dot_products(hidden_ND, table_VD, ids_NK):
    """Values and both gradients against a gathered einsum."""
    found = dot_products(hidden_ND, table_VD, ids_NK)
    expected = torch.einsum("nd,nkd->nk", hidden_ND, table_VD[ids_NK])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(found.shape, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), (hidden_ND, table_VD)),
        torch.autograd.grad((expected * weight).sum(), (hidden_ND, table_VD)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# Few ids of many rows are gathered; many ids of few rows are picked from all products.
WAYS = pytest.mark.parametrize("items", [7, 2000])


@WAYS
@pytest.mark.parametrize(("num_events", "num_ids"), [(1, 1), (5, 1), (1, 6), (6, 4), (40, 30)])
def test_dot_products(num_events, num_ids, items):
    _check_dot_products(*_tables(num_events, num_ids, items=items))


@WAYS
@pytest.mark.parametrize("limit", [1, 24, 25, 1000])
def test_dot_products_cut_into_parts(monkeypatch, limit, items):
    """A limit below one event's rows, between, and above: the same numbers."""
    monkeypatch.setitem(logits._ELEMENTS_AT_ONCE, "cpu", limit)
    _check_dot_products(*_tables(9, 4, items=items))


def test_dot_products_across_the_real_limit():
    hidden_ND, table_VD, ids_NK = _tables(2000, 70, items=3000, dim=32)
    assert ids_NK.numel() * 32 > logits._ELEMENTS_AT_ONCE["cpu"]
    _check_dot_products(hidden_ND, table_VD, ids_NK)
    hidden_ND, table_VD, ids_NK = _tables(2100, 100, items=2100)
    assert len(hidden_ND) * len(table_VD) > logits._ELEMENTS_AT_ONCE["cpu"]
    _check_dot_products(hidden_ND, table_VD, ids_NK)


@pytest.mark.parametrize(
    ("columns", "topk"), [(1, 1), (5, 5), (31, 1), (32, 2), (48, 2), (1000, 3), (1607, 100)]
)
def test_the_top_columns_are_those_of_a_sort(columns, topk):
    """Also with ties, and with columns that do not count."""
    generator = torch.Generator().manual_seed(columns)
    values = torch.randn(20, columns, generator=generator)
    values[10:] = values[10:].round()
    values[15:][torch.rand(5, columns, generator=generator) < 0.5] = -torch.inf
    found, column = logits._top_columns(values, topk)
    expected = values.sort(dim=1, descending=True).values[:, :topk]
    torch.testing.assert_close(found.sort(dim=1, descending=True).values, expected)
    torch.testing.assert_close(values.gather(1, column), found)
    assert all(len(set(row)) == topk for row in column.tolist())


def test_dot_products_gradient_adds_up_over_duplicate_ids():
    hidden_ND = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    table_VD = torch.ones(3, 2, requires_grad=True)
    dot_products(hidden_ND, table_VD, torch.tensor([[1, 1], [1, 2]])).sum().backward()
    assert table_VD.grad.tolist() == [[0, 0], [5, 8], [3, 4]]
    assert hidden_ND.grad.tolist() == [[2, 2], [2, 2]]


@WAYS
def test_dot_products_gradcheck(items):
    hidden_ND, table_VD, ids_NK = _tables(4, 3, items=min(items, 120))
    assert torch.autograd.gradcheck(
        lambda hidden, table: dot_products(hidden, table, ids_NK), (hidden_ND, table_VD)
    )


def test_dot_products_keep_their_precision_under_autocast():
    torch.manual_seed(0)
    hidden, table = torch.randn(5, 8), torch.randn(20, 8)
    ids = torch.randint(20, (5, 3))
    with torch.autocast("cpu", torch.bfloat16):
        found = dot_products(hidden, table, ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (hidden[:, None] * table[ids]).sum(-1))
