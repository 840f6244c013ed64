"""Losses and sampled logits against closed forms in float64, brute force and gradcheck."""

import math
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.datasets import pack_sessions, random_sessions, tiny_settings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import pack, training_batch
from tron_cli.losses import sampled as losses
from tron_cli.models.base import build_model
from tron_cli.ops import products
from tron_cli.sampling import logits
from tron_cli.sampling.logits import dot_products
from tron_cli.sampling.negatives import Negatives, sample_negatives
from tron_cli.training import loop as training

LOSSES = {
    "bce": losses.bce,
    "gbce": partial(losses.gbce, gbce_t=0.75, num_uniform_negatives=2, num_items=11),
    "ssm": losses.ssm,
    "bpr": losses.bpr,
    "bpr-max": partial(losses.bpr_max, bpr_penalty=0.0),
    "bpr-max with penalty": partial(losses.bpr_max, bpr_penalty=0.7),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def closed_form(name: str, positive: float, negatives: list[float]) -> float:
    """The loss of one position in plain Python floats."""
    if name == "bce":
        mean = sum(map(_softplus, negatives)) / len(negatives) if negatives else 0.0
        return _softplus(-positive) + mean
    if name == "gbce":
        # beta = 0.2 * (0.75 * (1 - 1 / 0.2) + 1 / 0.2) = 0.4 for 2 negatives of 11 items
        terms = [0.4 * _softplus(-positive), *map(_softplus, negatives)]
        return sum(terms) / len(terms)
    if not negatives:
        return 0.0
    if name == "bpr":
        return sum(_softplus(x - positive) for x in negatives) / len(negatives)
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
    assert positive_N.grad.any() == (name in ("bce", "gbce"))


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
        bpr_penalty=1.0,
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_picked_and_gathered_products_are_the_same(monkeypatch, dtype):
    """Values and gradients, with ids that repeat, in parts and whole, known before or not."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(150, 6, dtype=torch.float64, generator=generator)
    table = torch.randn(40, 6, dtype=torch.float64, generator=generator)
    ids = torch.randint(40, (150, 9), generator=generator)
    weight = torch.randn(150, 9, dtype=torch.float64, generator=generator)
    expected = torch.einsum("nd,nkd->nk", hidden, table[ids])
    expected_hidden = torch.einsum("nk,nkd->nd", weight, table[ids])
    expected_table = torch.zeros_like(table)
    expected_table.index_add_(
        0, ids.flatten(), (weight[:, :, None] * hidden[:, None]).flatten(0, 1)
    )
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    for limit in (1, 40 * 70, 1 << 20):
        monkeypatch.setitem(logits._ELEMENTS_AT_ONCE, "cpu", limit)
        for share in (0, 1000):
            monkeypatch.setattr(logits, "_PRODUCTS_A_GATHER", share)
            for known in (None, expected.to(dtype)):
                hidden_ND = hidden.to(dtype, copy=True).requires_grad_()
                table_VD = table.to(dtype, copy=True).requires_grad_()
                found = dot_products(hidden_ND, table_VD, ids, known)
                way = "_PickedProducts" if share else "_GatheredProducts"
                assert way in type(found.grad_fn).__name__
                (found * weight.to(dtype)).sum().backward()
                for ours, exact in (
                    (found, expected),
                    (hidden_ND.grad, expected_hidden),
                    (table_VD.grad, expected_table),
                ):
                    assert ours.dtype == dtype
                    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=tolerance)


# --- top-k and sampled logits ---------------------------------------------------------------------

# Small whole numbers: float32 and bf16 compute with them exactly, and they tie.
ties = st.one_of(st.integers(-3, 3).map(float), st.just(-math.inf))


@given(
    rows=st.integers(1, 70).flatmap(
        lambda columns: st.lists(
            st.lists(ties, min_size=columns, max_size=columns), min_size=1, max_size=4
        )
    ),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_the_top_columns_are_those_of_a_sorted_list(rows, data):
    topk = data.draw(st.integers(1, len(rows[0])))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    with mock.patch.object(logits, "_GROUP", data.draw(st.sampled_from([2, 3, 16]))):
        found_nk, column_nk = logits._top_columns(torch.tensor(rows, dtype=dtype), topk)
    assert found_nk.dtype == dtype
    for row, found, columns in zip(rows, found_nk.tolist(), column_nk.tolist(), strict=True):
        assert sorted(found, reverse=True) == sorted(row, reverse=True)[:topk]
        assert [row[column] for column in columns] == found
        assert len(set(columns)) == topk


def brute_force(hidden, table, batch, negatives, mask_collisions):
    """The logit of each position's target, and of each of its negatives that count."""
    inputs, targets = batch.inputs_N.tolist(), batch.targets_N.tolist()
    num_events, num_sessions = len(inputs), len(batch.lengths_B)
    found = []
    for event, row in enumerate(batch.rows_N.tolist()):
        uniform, keep = negatives.uniform.tolist(), negatives.uniform_keep
        if negatives.uniform.dim() == 1:
            kept = keep is None or bool(keep[0])
        else:
            by_event = len(uniform) == num_events != num_sessions
            kept = keep is None or bool(keep[event if by_event else row])
            uniform = uniform[event if by_event else row]
        items = list(uniform) if kept else []
        for column, other in enumerate(negatives.in_batch_BM[row].tolist()):
            if negatives.in_batch_keep_BM is None or negatives.in_batch_keep_BM[row, column]:
                items.append(inputs[other])
        if mask_collisions:
            items = [item for item in items if item != targets[event]]
        score = [table[item] @ hidden[event] for item in items]
        found.append((table[targets[event]] @ hidden[event], score))
    return found


@st.composite
def sampled(draw):
    """A batch, its negatives, hidden states and a table, all small enough to collide and tie."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(sorted))
    num_events, num_sessions = sum(lengths), len(lengths)
    num_items = draw(st.sampled_from([1, 3, 12]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def integers(high, *shape, low=0):
        return torch.randint(low, high, shape, generator=generator)

    items = integers(num_items + 1, num_events + num_sessions, low=1).numpy().astype(np.int32)
    starts = np.cumsum([0, *(length + 1 for length in lengths[:-1])])
    batch = pack(items, starts, np.array(lengths), with_targets=True)
    sets = draw(st.sampled_from([None, num_sessions, num_events]))
    num_in_batch = draw(st.integers(0, num_events))
    num_uniform = draw(st.integers(0 if num_in_batch else 1, 40))
    shape = (num_uniform,) if sets is None else (sets, num_uniform)
    uniform_keep = in_batch_keep_BM = None
    if draw(st.booleans()):
        uniform_keep = integers(2, sets or 1).bool()
    if draw(st.booleans()):
        in_batch_keep_BM = integers(2, num_sessions, num_in_batch).bool()
    negatives = Negatives(
        uniform=integers(num_items + 1, *shape, low=1),
        uniform_keep=uniform_keep,
        in_batch_BM=torch.rand(num_sessions, num_events, generator=generator).argsort()[
            :, :num_in_batch
        ],
        in_batch_keep_BM=in_batch_keep_BM,
    )
    if draw(st.booleans()):
        hidden, table = integers(4, num_events, 3, low=-3), integers(4, num_items + 1, 3, low=-3)
    else:
        hidden = torch.randn(num_events, 3, generator=generator)
        table = torch.randn(num_items + 1, 3, generator=generator)
    return batch, negatives, hidden.double(), table.double()


@given(
    case=sampled(),
    topk=st.one_of(st.none(), st.integers(1, 60)),
    mask=st.booleans(),
    limit=st.sampled_from([1, 30, 1 << 20]),
    group=st.sampled_from([2, 3, 16]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=300, deadline=None)
def test_sampled_logits_are_those_of_lists(case, topk, mask, limit, group, dtype):
    """Which negatives count and how high they are; gradients; what top-k leaves away."""
    batch, negatives, hidden, table = case
    hidden_ND, table_VD = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, table))
    with (
        mock.patch.dict(logits._ELEMENTS_AT_ONCE, {"cpu": limit}),
        mock.patch.object(logits, "_GROUP", group),
    ):
        positive_N, negative_NK, keep_NK = logits.sampled_logits(
            hidden_ND, table_VD, batch, negatives, topk=topk, mask_collisions=mask
        )
    width = negatives.uniform.shape[-1] + negatives.in_batch_BM.shape[1]
    assert negative_NK.shape == (len(hidden), min(topk or width, width))
    assert positive_N.dtype == negative_NK.dtype == dtype
    assert negative_NK.isfinite().all()
    if keep_NK is None:
        assert not mask
        keep_NK = torch.ones_like(negative_NK, dtype=torch.bool)

    exact_hidden, exact_table = hidden.requires_grad_(), table.requires_grad_()
    total = exact_hidden.new_zeros(())
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    for event, (positive, scores_K) in enumerate(
        brute_force(exact_hidden, exact_table, batch, negatives, mask)
    ):
        assert positive_N[event].item() == pytest.approx(positive.item(), abs=tolerance)
        scores_K = sorted(scores_K, key=torch.Tensor.item, reverse=True)[: topk or width]
        kept = negative_NK[event][keep_NK[event]].tolist()
        assert sorted(kept, reverse=True) == pytest.approx(
            [score.item() for score in scores_K], abs=tolerance
        )
        total = total + 0.5 * positive**2 + sum(score**3 / 3 for score in scores_K)
    # Weights that do not depend on the order. Of items that tie at the k-th place either may stay,
    # so gradients are compared where nothing but copies of one item can tie.
    ours = 0.5 * positive_N.square().sum() + (negative_NK**3 / 3)[keep_NK].sum()
    ours.backward()
    total.backward()
    if hidden.frac().any():
        torch.testing.assert_close(
            hidden_ND.grad.double(), exact_hidden.grad, rtol=1e-4, atol=10 * tolerance
        )
        torch.testing.assert_close(
            table_VD.grad.double(), exact_table.grad, rtol=1e-4, atol=10 * tolerance
        )


@pytest.mark.parametrize("sets", [(), (29,)], ids=["batchwise", "eventwise"])
@pytest.mark.parametrize("autocast", [False, True])
def test_top_k_on_threads_gives_the_bits_of_one_thread(autocast, sets):
    torch.manual_seed(3)
    items, starts, lengths = np.arange(1, 32, dtype=np.int32), np.array([0, 11]), np.array([10, 19])
    batch = pack(items, starts, lengths, with_targets=True)
    negatives = Negatives(
        torch.randint(1, 400, (*sets, 300)), None, torch.arange(20).view(2, 10) + 9, None
    )
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        hidden_ND = torch.randn(29, 16, generator=torch.Generator().manual_seed(0))
        table_VD = torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
        parameters = hidden_ND.requires_grad_(), table_VD.requires_grad_()
        with (
            mock.patch.dict(logits._ELEMENTS_AT_ONCE, {"cpu": 600}),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            positive_N, negative_NK, _ = logits.sampled_logits(
                *parameters, batch, negatives, topk=5, mask_collisions=True
            )
        (negative_NK.exp().sum() - positive_N.sum()).backward()
        found.append((positive_N, negative_NK, *(values.grad for values in parameters)))
    torch.set_num_threads(before)
    for alone, on_threads in zip(*found, strict=True):
        assert torch.equal(alone, on_threads)


@pytest.mark.parametrize("enabled", [False, True])
def test_top_k_under_autocast_picks_by_what_it_returns(enabled):
    """Each kept logit is the highest left, and its gradient is the row of an item so high."""
    torch.manual_seed(3)
    items, starts, lengths = np.arange(1, 32, dtype=np.int32), np.array([0, 11]), np.array([10, 19])
    batch = pack(items, starts, lengths, with_targets=True)
    negatives = Negatives(
        torch.randint(1, 400, (300,)), None, torch.arange(20).view(2, 10) + 9, None
    )
    hidden_ND, table_VD = torch.randn(29, 16, requires_grad=True), torch.randn(400, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        positive_N, negative_NK, keep_NK = logits.sampled_logits(
            hidden_ND, table_VD, batch, negatives, topk=5, mask_collisions=True
        )
    assert keep_NK.all()
    assert positive_N.dtype == negative_NK.dtype == torch.float32
    exact = brute_force(hidden_ND.detach().double(), table_VD.double(), batch, negatives, True)
    for event, (positive, scores_K) in enumerate(exact):
        assert positive_N[event].item() == pytest.approx(float(positive), rel=1e-5, abs=1e-5)
        best = sorted(map(float, scores_K), reverse=True)[:5]
        rounding = 0.02 * max(map(abs, best)) if enabled else 1e-4
        found = sorted(negative_NK[event].tolist(), reverse=True)
        assert found == pytest.approx(best, abs=rounding)
        for column in range(5):
            (row_ND,) = torch.autograd.grad(
                negative_NK[event, column], hidden_ND, retain_graph=True
            )
            logit = float(row_ND[event] @ hidden_ND[event].detach())
            assert logit == pytest.approx(negative_NK[event, column].item(), abs=rounding)


# --- products of rows -----------------------------------------------------------------------------

ROUND = (1, 2, 63, 64, 65, 127, 128, 129)


@pytest.fixture(params=[True, False], ids=["oneDNN", "plain"])
def one_dnn(request, monkeypatch):
    if request.param and not products._one_dnn():
        pytest.skip("this processor or build has no AVX-512 oneDNN")
    monkeypatch.setattr(products, "_one_dnn", lambda: request.param)
    return request.param


def _check_gradients(function, exact, tensors):
    """Value and gradients in float32 against float64, under weights and under a plain sum."""
    for weigh in (True, False):
        ours = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        theirs = [tensor.detach().double().requires_grad_() for tensor in tensors]
        found, expected = function(*ours), exact(*theirs)
        assert found.dtype == torch.float32
        assert found.shape == expected.shape
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
        weight = torch.randn(found.shape) if weigh else torch.ones(())
        # A sum hands back a gradient that is one number, expanded.
        (found * weight if weigh else found).sum().backward()
        (expected * weight).sum().backward()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", ROUND)
def test_products_of_rows_have_the_gradients_of_float64(rows, one_dnn):
    torch.manual_seed(rows)
    a_ND, table_VD = torch.randn(rows, 20), torch.randn(33, 20)
    _check_gradients(products.row_products, lambda a, b: a @ b.T, [a_ND, table_VD])
    # Either one alone, and views: rows of every second place, columns of a wider table.
    _check_gradients(
        lambda a: products.row_products(a, table_VD), lambda a: a @ table_VD.double().T, [a_ND]
    )
    _check_gradients(
        lambda b: products.row_products(a_ND, b), lambda b: a_ND.double() @ b.T, [table_VD]
    )
    wide_ND = torch.randn(2 * rows, 23)
    _check_gradients(
        lambda a, b: products.row_products(a[::2, 3:], b[1:]),
        lambda a, b: a[::2, 3:] @ b[1:].T,
        [wide_ND, table_VD],
    )


@pytest.mark.parametrize("rows", ROUND)
def test_linear_layers_have_the_gradients_of_float64(rows, one_dnn):
    torch.manual_seed(rows)
    layer, exact = products.Linear(20, 33), torch.nn.Linear(20, 33).double()
    exact.load_state_dict(layer.state_dict())
    _check_gradients(layer, exact, [torch.randn(rows, 20)])
    for ours, theirs in zip(layer.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=2e-4)
    with torch.no_grad():
        x_ND = torch.randn(rows, 20)
        torch.testing.assert_close(layer(x_ND).double(), exact(x_ND.double()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 64, 65])
def test_linear_layers_under_autocast_are_torchs(rows, one_dnn):
    torch.manual_seed(rows)
    layer = products.Linear(20, 33)
    x_ND = torch.randn(rows, 20)
    outcomes = []
    for function in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        leaf_ND = x_ND.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out_NV = function(leaf_ND)
        assert out_NV.dtype == torch.bfloat16
        out_NV.float().square().sum().backward()
        outcomes.append([out_NV, leaf_ND.grad, layer.weight.grad, layer.bias.grad])
    for ours, theirs in zip(*outcomes, strict=True):
        # The same arithmetic on more rows: at most sums in another order before rounding to bf16.
        torch.testing.assert_close(
            ours.float(), theirs.float(), rtol=0.01, atol=0.01 * theirs.abs().max().item()
        )


def test_float64_layers_stay_in_float64(one_dnn):
    layer = products.Linear(5, 3).double()
    x_ND = torch.randn(70, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x_ND[:3],))
    torch.testing.assert_close(layer(x_ND), x_ND @ layer.weight.T + layer.bias)


@pytest.mark.parametrize("t", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("num_negatives", "num_items"), [(1, 3416), (256, 3416), (99, 100)])
def test_gbce_is_bce_of_the_published_transformation(t, num_negatives, num_items):
    """log(1 / (sigmoid(p) ^ -beta - 1)) as the positive's logit, in float64, mean over k + 1."""
    generator = torch.Generator().manual_seed(3)
    positive_N = torch.rand(50, dtype=torch.float64, generator=generator) * 12 - 6
    negative_NK = torch.randn(50, num_negatives, dtype=torch.float64, generator=generator) * 3
    alpha = num_negatives / (num_items - 1)
    beta = alpha * ((1 - 1 / alpha) * t + 1 / alpha)
    transformed_N = (1 / (torch.sigmoid(positive_N) ** -beta - 1)).log()
    logits_N1K = torch.cat([transformed_N[:, None], negative_NK], dim=1)
    labels_N1K = torch.zeros_like(logits_N1K)
    labels_N1K[:, 0] = 1
    expected = F.binary_cross_entropy_with_logits(logits_N1K, labels_N1K, reduction="none").mean(1)
    found_beta = losses.gbce_beta(t, num_negatives, num_items)
    assert found_beta == pytest.approx(beta, rel=1e-12)
    gbce = partial(losses.gbce, gbce_t=t, num_uniform_negatives=num_negatives, num_items=num_items)
    found = gbce(positive_N, negative_NK, None)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    # In float32 too, where the transformation is lost in its clamps.
    single = gbce(positive_N.float() * 20, negative_NK.float(), None)
    exact = gbce(positive_N * 20, negative_NK, None)
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-6)


def test_nan_in_a_negative_shows_in_the_loss():
    """With and without negatives that do not count."""
    batch = pack(np.array([1, 2, 3, 4], np.int32), np.array([0]), np.array([3]), with_targets=True)
    negatives = Negatives(torch.tensor([5, 6, 7]), None, torch.zeros(1, 0, dtype=torch.int64), None)
    table_VD = torch.randn(8, 4)
    table_VD[6] = torch.nan
    for topk in (None, 2):
        for mask_collisions in (False, True):
            positive_N, negative_NK, keep_NK = logits.sampled_logits(
                torch.randn(3, 4), table_VD, batch, negatives, topk=topk,
                mask_collisions=mask_collisions,
            )  # fmt: skip
            assert losses.ssm(positive_N, negative_NK, keep_NK).isnan().all()


# --- the loss of a training step ------------------------------------------------------------------

STEP = {
    "bce": {},
    "bpr": {},
    "ssm": {},
    "ssm with logQ": {"logq_correction": True, "negative_sampler": "popularity"},
    "bpr-max": {},
    "bpr-max with penalty": {"bpr_penalty": 0.7},
    # beta is 0.4, as in the closed form above
    "gbce": {"num_uniform_negatives": 2, "num_batch_negatives": 0, "gbce_t": 0.75},
}
WITHOUT_ELU = ("gbce", "ssm with logQ")


@pytest.mark.parametrize("style", ["eventwise", "sessionwise", "batchwise"])
@pytest.mark.parametrize(
    ("name", "final_activation"),
    [(name, False) for name in STEP] + [(name, True) for name in STEP if name not in WITHOUT_ELU],
)
def test_the_loss_of_a_step_is_the_mean_of_the_formula(name, style, final_activation):
    """In float64: scores by loops, ELU by hand, for hidden states that the model gives."""
    num_items = 11
    generator = np.random.default_rng(4)
    sessions = pack_sessions(
        [*random_sessions(generator, 12, num_items), [*range(1, num_items + 1)]]
    )
    config = ExperimentConfig(
        **tiny_settings(
            loss=name.split()[0],
            sampling_style=style,
            final_activation=final_activation,
            **{
                "num_uniform_negatives": 7,
                "num_batch_negatives": 3,
                "topk_sampling": False,
                "reject_in_batch_items": False,
                "dropout_rate": 0.0,
                **STEP[name],
            },
        )
    )
    torch.manual_seed(6)
    model = build_model(config, num_items).double()
    with torch.no_grad():
        model.item_table.mul_(4.0)  # scores on both sides of zero, and far from it
    batch = training_batch(sessions, np.arange(5), config.sequence_length)
    distribution = training._distribution(config, sessions, num_items, torch.device("cpu"))
    drawn = []

    def note(*arguments, **options):
        drawn.append(sample_negatives(*arguments, **options))
        return drawn[0]

    with mock.patch.object(training, "sample_negatives", note):
        loss = training.training_loss(model, batch, config, distribution)
    (negatives,) = drawn
    hidden_ND, table_VD = model(batch).detach(), model.item_table.detach()
    total = 0.0
    for event, target in enumerate(batch.targets_N.tolist()):
        row = int(batch.rows_N[event])
        own = {"batchwise": (), "sessionwise": (row,), "eventwise": (event,)}[style]
        items = [
            *negatives.uniform[own].tolist(),
            *batch.inputs_N[negatives.in_batch_BM[row]].tolist(),
        ]
        scores = []
        for item in items:
            score = float(table_VD[item] @ hidden_ND[event])
            if distribution.log_expected_V is not None:
                score -= float(distribution.log_expected_V[item])
            if item != target:
                scores.append(score)
        positive = float(table_VD[target] @ hidden_ND[event])
        if final_activation:
            positive, *scores = (x if x > 0 else 0.5 * math.expm1(x) for x in (positive, *scores))
        total += closed_form(name.removesuffix(" with logQ"), positive, scores)
    assert loss.item() == pytest.approx(total / len(batch.targets_N), rel=1e-9)
