"""Rows of length one, compared with a loop in Python's floats."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tron_cli.ops import unit_rows as module
from tron_cli.ops.unit_rows import plain_unit_rows, unit_rows

Form = Callable[[torch.Tensor], torch.Tensor]
FORMS = pytest.mark.parametrize("form", [unit_rows, plain_unit_rows])


@FORMS
@pytest.mark.parametrize("rows_at_once", [3, 4096])
def test_rows_are_divided_by_their_length(
    form: Form, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", rows_at_once)
    table = torch.randn(10, 7) * torch.logspace(-15, 15, 10)[:, None]
    for row, unit in zip(table.tolist(), form(table).tolist(), strict=True):
        length = max(math.sqrt(math.fsum(value**2 for value in row)), 1e-12)
        assert unit == pytest.approx([value / length for value in row], rel=1e-6)


@FORMS
def test_gradients_are_those_of_finite_differences(form: Form) -> None:
    table = torch.randn(6, 5, dtype=torch.float64) * torch.logspace(-1, 1, 6)[:, None]
    assert torch.autograd.gradcheck(form, table.double().requires_grad_())


@FORMS
def test_rows_of_almost_nothing_stay_so_and_have_finite_gradients(form: Form) -> None:
    table = torch.zeros(2, 5)
    table[1] = 3e-13  # shorter than 1e-12, by which it is divided: its length still counts
    table.requires_grad_()
    unit = form(table)
    assert not unit[0].any()
    assert unit[1].tolist() == pytest.approx([0.3] * 5)
    weight = torch.randn(2, 5)
    (unit * weight).sum().backward()
    torch.testing.assert_close(table.grad, weight * 1e12)  # as torch.nn.functional.normalize has it


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    """Otherwise items with equal embeddings would not tie."""
    table = torch.randn(5000, 37)
    table[4999] = table[0]
    unit = unit_rows(table)
    assert torch.equal(unit, plain_unit_rows(table))
    assert torch.equal(unit[4999], unit[0])
    for row in (0, 17, 4998):
        assert torch.equal(plain_unit_rows(table[row : row + 1])[0], unit[row])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_formats_become_float32(dtype: torch.dtype) -> None:
    """1e-12 and the squares of most numbers are out of float16's range."""
    unit = plain_unit_rows(torch.tensor([[0.0, 0.0], [6e4, 6e4]], dtype=dtype))
    assert unit.dtype == torch.float32
    torch.testing.assert_close(unit, torch.tensor([[0.0, 0.0], [0.5**0.5, 0.5**0.5]]))
