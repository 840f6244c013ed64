"""BSARec's filter over packed rows against torch.fft on whole windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tron_cli.data.batches import Batch, pack
from tron_cli.ops.frequency_filter import FrequencyFilter

LENGTHS = [1, 2, 2, 3, 5, 5, 6, 7, 12, 13]


def make_batch(padded_width: int | None = None) -> Batch:
    counts = np.array(LENGTHS)
    return pack(
        np.ones(counts.sum(), dtype=np.int32),
        np.cumsum(counts) - counts,
        counts,
        with_targets=False,
        padded_width=padded_width,
    )


def by_row(x_ND: torch.Tensor, layer: FrequencyFilter, *, at_end: bool) -> torch.Tensor:
    """Transform windows [L, D] with zeros in front of a row or behind it, and cut the spectrum."""
    found = []
    for x_nD in x_ND[: sum(LENGTHS)].split(LENGTHS):
        gap = layer.length - len(x_nD)
        x_LD = F.pad(x_nD, (0, 0, gap, 0) if at_end else (0, 0, 0, gap))
        spectrum = torch.fft.fft(x_LD, dim=0)
        # The frequencies of the transform: 0, 1, ..., -2, -1.
        frequency_L = torch.fft.fftfreq(layer.length, 1 / layer.length)
        is_low_L1 = (frequency_L.abs() < (layer.frequencies + 1) / 2 - 0.1)[:, None]
        assert int(is_low_L1.sum()) == layer.frequencies
        low_LD = torch.fft.ifft(spectrum * is_low_L1, dim=0).real
        filtered_LD = low_LD + layer.sqrt_beta_D**2 * (x_LD - low_LD)
        found.append(filtered_LD[gap:] if at_end else filtered_LD[: len(x_nD)])
    return torch.cat(found)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("padded_width", [None, 13, 16])
@pytest.mark.parametrize(
    ("length", "frequencies"), [(13, 1), (13, 5), (13, 13), (16, 3), (16, 15), (50, 9)]
)
def test_rows_are_filtered_as_windows_with_zeros(length, frequencies, padded_width, at_end):
    torch.manual_seed(0)
    layer = FrequencyFilter(4, length=length, frequencies=frequencies).double()
    batch = make_batch(padded_width)
    x_ND = torch.randn(len(batch.inputs_N), 4, dtype=torch.float64, requires_grad=True)
    found = layer(x_ND, batch.groups)[: sum(LENGTHS)]
    expected = by_row(x_ND, layer, at_end=at_end)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    gradients = (
        torch.autograd.grad((states * weights).sum(), (x_ND, layer.sqrt_beta_D))
        for states in (found, expected)
    )
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    layer = FrequencyFilter(2, length=14, frequencies=5).double()
    groups = make_batch().groups
    x_ND = torch.randn(sum(LENGTHS), 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, _: layer(x, groups), (x_ND, layer.sqrt_beta_D))
