"""Attention over packed rows against the formula, written out for one row after the other."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tron_cli.data.batches import Batch, pack
from tron_cli.ops.attention import RelativeBias, attention, packed_attention

LENGTHS = [1, 2, 2, 3, 5, 5, 6, 7, 12, 13]


def make_batch(lengths: list[int], padded_width: int | None = None) -> Batch:
    counts = np.array(lengths)
    return pack(
        np.ones(counts.sum(), dtype=np.int32),
        np.cumsum(counts) - counts,
        counts,
        with_targets=False,
        padded_width=padded_width,
    )


def by_row(
    qkv_N3D: torch.Tensor,
    lengths: list[int],
    heads: int,
    causal: bool,
    bias_of: Callable[[int, int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """softmax(q k' / sqrt(d) + bias) v of each row and head, from the first event to the last.

    bias_of: bias of a head for a distance to an earlier event (negative: to a later one).
    """
    found = []
    for row_n3D in qkv_N3D[: sum(lengths)].split(lengths):
        heads_of_row = []
        parts = (part.chunk(heads, 1) for part in row_n3D.chunk(3, 1))
        for head, (q, k, v) in enumerate(zip(*parts, strict=True)):
            scores = q @ k.T / math.sqrt(q.shape[1])
            if bias_of is not None:
                places = range(len(q))
                biases = [bias_of(head, query - key) for query in places for key in places]
                scores = scores + torch.stack(biases).view_as(scores)
            if causal:
                later = torch.ones_like(scores, dtype=torch.bool).triu(1)
                scores = scores.masked_fill(later, -torch.inf)
            heads_of_row.append(scores.softmax(1) @ v)
        found.append(torch.cat(heads_of_row, 1))
    return torch.cat(found)


@pytest.mark.parametrize("padded_width", [None, 13, 16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
def test_packed_rows_attend_to_themselves(heads, causal, padded_width):
    """Compare values and gradients, also where a padded batch is one group of fixed shape."""
    torch.manual_seed(0)
    batch = make_batch(LENGTHS, padded_width)
    qkv_N3D = torch.randn(len(batch.inputs_N), 24, dtype=torch.float64, requires_grad=True)
    found = packed_attention(
        qkv_N3D, batch.groups, num_heads=heads, dropout_rate=0.0, causal=causal
    )[: sum(LENGTHS)]
    expected = by_row(qkv_N3D, LENGTHS, heads, causal)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    ours, theirs = (
        torch.autograd.grad((states * weights).sum(), qkv_N3D)[0] for states in (found, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padded_width", [None, 16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dropout_rate", [0.0, 1e-9])
def test_relative_bias_is_added_by_head_and_distance(dropout_rate, causal, padded_width):
    """Compare values and gradients, also of the biases, and where dropout drops nothing."""
    torch.manual_seed(0)
    heads, window = 2, max(LENGTHS)
    relative = RelativeBias(heads, window, causal=causal).double()
    with torch.no_grad():
        relative.bias_HK.normal_()
    bias_HK = relative.bias_HK.view(heads, -1)
    assert bias_HK.shape[1] == (window if causal else 2 * window - 1)

    def bias_of(head: int, distance: int) -> torch.Tensor:
        return bias_HK[head, distance + (0 if causal else window - 1)]

    batch = make_batch(LENGTHS, padded_width)
    qkv_N3D = torch.randn(len(batch.inputs_N), 24, dtype=torch.float64, requires_grad=True)
    found = packed_attention(
        qkv_N3D, batch.groups, num_heads=heads, dropout_rate=dropout_rate, causal=causal,
        relative_bias=relative,
    )[: sum(LENGTHS)]  # fmt: skip
    expected = by_row(qkv_N3D, LENGTHS, heads, causal, bias_of)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    gradients = (
        torch.autograd.grad((states * weights).sum(), (qkv_N3D, relative.bias_HK))
        for states in (found, expected)
    )
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_later_events_count_only_where_attention_is_bidirectional():
    torch.manual_seed(0)
    batch = make_batch([5])
    qkv_N3D = torch.randn(5, 12)
    changed = qkv_N3D.clone()
    changed[4] += 1
    for causal in (True, False):
        one, other = (
            packed_attention(qkv, batch.groups, num_heads=1, dropout_rate=0.0, causal=causal)
            for qkv in (qkv_N3D, changed)
        )
        assert torch.equal(one[:4], other[:4]) == causal
        assert not torch.equal(one[4], other[4])


@pytest.mark.parametrize("causal", [True, False])
def test_dropout_of_weights_keeps_the_mean(causal):
    """Rows are padded, so that dropout and masks meet."""
    torch.manual_seed(0)
    lengths, draws = [3, 4], 4000
    few, many = make_batch(lengths), make_batch([3] * draws + [4] * draws)
    qkv_N3D = torch.randn(7, 12)
    repeated = torch.cat([qkv_N3D[:3].repeat(draws, 1), qkv_N3D[3:].repeat(draws, 1)])
    found = packed_attention(repeated, many.groups, num_heads=2, dropout_rate=0.3, causal=causal)
    expected = packed_attention(qkv_N3D, few.groups, num_heads=2, dropout_rate=0.0, causal=causal)
    shaped = torch.cat(
        [found[: 3 * draws].view(draws, 3, 4), found[3 * draws :].view(draws, 4, 4)], 1
    )
    error = shaped.std(dim=0) / draws**0.5
    assert ((shaped.mean(dim=0) - expected).abs() < 6 * error + 1e-6).all()
    assert (shaped.std(dim=0) > 0.05).any()


@pytest.mark.parametrize("heads", [1, 2])
def test_dropout_drops_or_scales_each_weight(heads):
    """The first event of a causal row attends to itself alone: its value is dropped or scaled."""
    torch.manual_seed(0)
    many = make_batch([5] * 4000)
    qkv_N3D = torch.randn(len(many.inputs_N), 24)
    found = packed_attention(qkv_N3D, many.groups, num_heads=heads, dropout_rate=0.3)
    first = torch.arange(0, len(many.inputs_N), 5)
    scale = (found[first] / qkv_N3D[first, 16:]).unflatten(1, (heads, -1))
    assert ((scale.abs() < 1e-6) | ((scale - 1 / 0.7).abs() < 1e-3)).all()
    dropped = (scale[:, :, 0] == 0).double()
    torch.testing.assert_close(scale, scale[:, :, :1].expand_as(scale), rtol=0, atol=1e-3)
    assert dropped.mean().item() == pytest.approx(0.3, abs=6 * (0.21 / dropped.numel()) ** 0.5)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_with_dropout_has_the_mean_of_the_plain_form(causal):
    """Over many draws; at a rate that rounds to nothing dropped, values and gradients are equal."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = None if causal else torch.randn(2, 1, 1, 5, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
    exact = attention(q, k, v, 1e-9, causal=causal, bias=bias)
    torch.testing.assert_close(exact, expected)
    weights = torch.randn_like(exact)
    for ours, theirs in zip(
        torch.autograd.grad((exact * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    many = [tensor.detach().expand(4000, *tensor.shape).flatten(0, 1) for tensor in (q, k, v)]
    if bias is not None:
        bias = bias.expand(4000, *bias.shape).flatten(0, 1)
    found = attention(*many, 0.3, causal=causal, bias=bias).view(4000, *q.shape)
    error = found.std(dim=0) / 4000**0.5
    assert ((found.mean(dim=0) - expected).abs() < 6 * error + 1e-6).all()
