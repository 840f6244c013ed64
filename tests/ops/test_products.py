"""Products by either library are those of float64, within float32's rounding."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tron_cli.ops import products

ROUND = (1, 2, 63, 64, 65, 127, 128, 129)


@pytest.fixture(params=[True, False], ids=["oneDNN", "plain"])
def one_dnn(request, monkeypatch):
    if request.param and not products._one_dnn():
        pytest.skip("this processor or build has no AVX-512 oneDNN")
    monkeypatch.setattr(products, "_one_dnn", lambda: request.param)
    return request.param


@pytest.mark.parametrize(("rows", "width", "items"), [(1, 1, 1), (3, 200, 77), (130, 33, 1000)])
def test_row_products_equal_float64(one_dnn: bool, rows: int, width: int, items: int) -> None:
    torch.manual_seed(rows)
    a_ND, table_VD = torch.randn(rows, width), torch.randn(items, width)
    expected = a_ND.double() @ table_VD.double().T
    found = products.row_products(a_ND, table_VD)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6 * width)
    # Views: columns of a wider table, and slices of rows.
    wide = torch.randn(items + 2, width + 3)
    found = products.row_products(a_ND[1:], wide[1:, :width])
    expected = a_ND[1:].double() @ wide[1:, :width].double().T
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6 * width)


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


@torch.inference_mode()
def test_inference_multiplies_few_shapes_whose_rows_are_alone(one_dnn, monkeypatch):
    """oneDNN keeps a kernel for each shape: of batches that all differ these would fill memory."""
    shapes = set()
    multiply = products._one_dnn_linear

    def noting(x_ND, weight_VD, bias_V):
        shapes.add(x_ND.shape)
        return multiply(x_ND, weight_VD, bias_V)

    monkeypatch.setattr(products, "_one_dnn_linear", noting)
    layer = products.Linear(24, 40)
    x_ND = torch.randn(3_200, 24)
    expected_NV = layer(x_ND)
    plain_NV = F.linear(x_ND.double(), layer.weight.double(), layer.bias.double())
    torch.testing.assert_close(expected_NV.double(), plain_NV, rtol=0, atol=1e-5)
    for rows in (*range(600), *range(600, 3_200, 7)):
        found_NV = layer(x_ND[:rows])
        assert found_NV.shape == (rows, 40)
        torch.testing.assert_close(found_NV, expected_NV[:rows], rtol=0, atol=1e-6)
    assert len(shapes) <= 90
