"""Dot products of chosen rows, gathered or picked, against the plain form and gradcheck."""

from unittest import mock

import pytest
import torch

from tron_cli.ops import dot_products as dot_products_file
from tron_cli.ops import parts
from tron_cli.ops.dot_products import dot_products, plain_dot_products


def _tables(num_events: int, num_ids: int, *, items: int = 7, dim: int = 3):
    generator = torch.Generator().manual_seed(num_events * 31 + num_ids)
    hidden_ND = torch.randn(num_events, dim, dtype=torch.float64, generator=generator)
    table_VD = torch.randn(items, dim, dtype=torch.float64, generator=generator)
    ids_NK = torch.randint(items, (num_events, num_ids), generator=generator)
    return hidden_ND.requires_grad_(), table_VD.requires_grad_(), ids_NK


def _check_dot_products(hidden_ND, table_VD, ids_NK):
    """Compare values and both gradients with those of the plain form."""
    found = dot_products(hidden_ND, table_VD, ids_NK)
    expected = plain_dot_products(hidden_ND, table_VD, ids_NK)
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
    monkeypatch.setitem(parts._ELEMENTS_AT_ONCE, "cpu", limit)
    _check_dot_products(*_tables(9, 4, items=items))


def test_dot_products_across_the_real_limit():
    hidden_ND, table_VD, ids_NK = _tables(2000, 70, items=3000, dim=32)
    assert ids_NK.numel() * 32 > parts._ELEMENTS_AT_ONCE["cpu"]
    _check_dot_products(hidden_ND, table_VD, ids_NK)
    hidden_ND, table_VD, ids_NK = _tables(2100, 100, items=2100)
    assert len(hidden_ND) * len(table_VD) > parts._ELEMENTS_AT_ONCE["cpu"]
    _check_dot_products(hidden_ND, table_VD, ids_NK)


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
    """Compare values and gradients, with ids that repeat, in parts and whole, known or not."""
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
        monkeypatch.setitem(parts._ELEMENTS_AT_ONCE, "cpu", limit)
        for share in (0, 1000):
            monkeypatch.setattr(dot_products_file, "_PRODUCTS_PER_GATHER", share)
            used = "_picked_gradients" if share else "_gathered_gradients"
            way = mock.Mock(wraps=getattr(dot_products_file, used))
            monkeypatch.setattr(dot_products_file, used, way)
            for known in (None, expected.to(dtype)):
                hidden_ND = hidden.to(dtype, copy=True).requires_grad_()
                table_VD = table.to(dtype, copy=True).requires_grad_()
                found = dot_products(hidden_ND, table_VD, ids, known)
                (found * weight.to(dtype)).sum().backward()
                for ours, exact in (
                    (found, expected),
                    (hidden_ND.grad, expected_hidden),
                    (table_VD.grad, expected_table),
                ):
                    assert ours.dtype == dtype
                    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=tolerance)
            assert way.call_count == 2
