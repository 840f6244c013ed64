"""Dropout drops at its rate, independently, keeps the mean, and has the gradient of its mask."""

from __future__ import annotations

import math

import pytest
import torch

from tron_cli.ops.dropout import Dropout, drop, dropping_as_part


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_drops_at_its_rate_and_keeps_the_mean(rate: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(501, 403, dtype=dtype)
    dropped = drop(x, rate)
    assert dropped.dtype == dtype
    zeros = (dropped == 0).double()
    error = math.sqrt(rate * (1 - rate) / x.numel())
    assert zeros.mean().item() == pytest.approx(rate, abs=5 * error)
    kept = dropped[dropped != 0].float()
    assert kept.min().item() == kept.max().item() == pytest.approx(1 / (1 - rate), rel=5e-3)


def test_neighbours_are_independent() -> None:
    """The four draws of a word, rows and columns: correlations within noise."""
    torch.manual_seed(1)
    zeros = (drop(torch.ones(2000, 400), 0.3) == 0).double()
    centred = (zeros - zeros.mean()).flatten()
    for distance in (1, 2, 3, 4, 5, 400, 401):
        correlation = (centred[:-distance] * centred[distance:]).mean() / centred.square().mean()
        assert abs(correlation.item()) < 5 / math.sqrt(len(centred)), distance


def test_the_gradient_is_that_of_the_mask() -> None:
    torch.manual_seed(2)
    x = torch.randn(30, 7, requires_grad=True)
    dropped = drop(x, 0.4)
    dropped.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.detach(), dropped.detach())


def test_a_seed_decides_and_evaluation_drops_nothing() -> None:
    x = torch.randn(5, 3)
    layer = Dropout(0.5)
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert drop(torch.ones(0, 3), 0.5).shape == (0, 3)
    assert drop(torch.ones(4000), 1 - 1e-9).isfinite().all()


def test_a_part_drops_what_it_drops_in_the_whole() -> None:
    x, layer = torch.randn(11, 2, 3), Dropout(0.4)
    torch.manual_seed(4)
    whole, after = layer(x), torch.rand(3)
    for rows in (torch.tensor([1, 4, 10]), torch.arange(0)):
        torch.manual_seed(4)
        assert torch.equal(drop(x[rows], 0.4, (11, rows)), whole[rows])
        assert torch.equal(torch.rand(3), after)
        torch.manual_seed(4)
        with dropping_as_part((11, rows)):
            assert torch.equal(layer(x[rows]), whole[rows])
    torch.manual_seed(4)
    assert torch.equal(layer(x), whole)
