"""Products by either library are those of float64, within float32's rounding."""

from __future__ import annotations

import pytest
import torch

from tron_cli.ops import products


@pytest.mark.parametrize("one_dnn", [True, False])
@pytest.mark.parametrize(("rows", "width", "items"), [(1, 1, 1), (3, 200, 77), (130, 33, 1000)])
def test_row_products_equal_float64(
    monkeypatch: pytest.MonkeyPatch, one_dnn: bool, rows: int, width: int, items: int
) -> None:
    if one_dnn and not products._one_dnn():
        pytest.skip("this processor or build has no AVX-512 oneDNN")
    monkeypatch.setattr(products, "_one_dnn", lambda: one_dnn)
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
