"""Sampled logits and their top-k against brute force over lists."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tron_cli.data.batches import pack
from tron_cli.ops import parts
from tron_cli.ops import topk as topk_file
from tron_cli.sampling import logits
from tron_cli.sampling.negatives import Negatives


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
    """Negatives that count, their logits and gradients, and what top-k drops, against loops."""
    batch, negatives, hidden, table = case
    hidden_ND, table_VD = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, table))
    with (
        mock.patch.dict(parts._ELEMENTS_AT_ONCE, {"cpu": limit}),
        mock.patch.object(topk_file, "_GROUP", group),
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
            mock.patch.dict(parts._ELEMENTS_AT_ONCE, {"cpu": 600}),
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
