"""Full-catalogue cross-entropy in blocks is torch's cross-entropy of all logits."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from helpers.whole_catalogue import DIM, ITEMS, full, gradients, problem
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cross_entropy as benchmark
from benchmarks import measure
from tron_cli.losses import cross_entropy
from tron_cli.losses.cross_entropy import blocks_of_items, ce
from tron_cli.training.optim import Adam, RowAdam, catch_up_all


@pytest.fixture
def narrow_blocks(monkeypatch):
    """Blocks of 64 items: 150 items are two whole blocks and a part of one."""
    monkeypatch.setitem(cross_entropy._LOGITS_AT_ONCE, "cpu", 1)


@pytest.mark.parametrize("rows", [ITEMS + 1, ITEMS + 2])
@pytest.mark.parametrize("events", [1, 64, 70])
def test_value_and_gradients_are_those_of_all_logits(events, rows, narrow_blocks) -> None:
    hidden_ND, table_VD, targets_N = problem(events, rows=rows)
    loss_N = ce(hidden_ND, table_VD, targets_N, num_items=ITEMS)
    expected_N = full(hidden_ND, table_VD, targets_N)
    torch.testing.assert_close(loss_N, expected_N, rtol=1e-12, atol=1e-12)
    weight_N = torch.linspace(-1, 2, events)  # every position its own gradient from above
    found = gradients(loss_N, hidden_ND, table_VD, weight_N=weight_N)
    expected = gradients(expected_N, hidden_ND, table_VD, weight_N=weight_N)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert not found[1][0].any()
    assert not found[1][ITEMS + 1 :].any()


@pytest.mark.parametrize("label_smoothing", [0.1, 0.75])
def test_label_smoothing_is_a_mean_over_a_smoothed_distribution(
    label_smoothing, narrow_blocks
) -> None:
    """Each of the 150 items has an equal part of the share that the target gives up."""
    hidden_ND, table_VD, targets_N = problem(40, rows=ITEMS + 2)
    loss_N = ce(hidden_ND, table_VD, targets_N, num_items=ITEMS, label_smoothing=label_smoothing)
    with torch.no_grad():
        for hidden_D, target, loss in zip(hidden_ND, targets_N.tolist(), loss_N, strict=True):
            logits = [float(hidden_D @ table_VD[item]) for item in range(1, ITEMS + 1)]
            log_sum = math.log(sum(map(math.exp, logits)))
            shares = [label_smoothing / ITEMS] * ITEMS
            shares[target - 1] += 1 - label_smoothing
            expected = sum(
                share * (log_sum - logit) for share, logit in zip(shares, logits, strict=True)
            )
            assert loss.item() == pytest.approx(expected, rel=1e-12)
    expected_N = full(hidden_ND, table_VD, targets_N, label_smoothing=label_smoothing)
    torch.testing.assert_close(loss_N, expected_N, rtol=1e-12, atol=1e-12)
    weight_N = torch.linspace(-1, 2, 40)
    found = gradients(loss_N, hidden_ND, table_VD, weight_N=weight_N)
    expected = gradients(expected_N, hidden_ND, table_VD, weight_N=weight_N)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert not found[1][0].any()
    assert not found[1][ITEMS + 1 :].any()


def test_label_smoothing_under_autocast() -> None:
    hidden_ND, table_VD, targets_N = problem(200, scale=0.5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss_N = ce(hidden_ND, table_VD, targets_N, num_items=ITEMS, label_smoothing=0.2)
    assert loss_N.dtype == torch.float32
    expected_N = full(hidden_ND, table_VD, targets_N, label_smoothing=0.2)
    torch.testing.assert_close(loss_N.double(), expected_N, rtol=0, atol=0.05)
    found = gradients(loss_N, hidden_ND, table_VD)
    expected = gradients(expected_N, hidden_ND, table_VD)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("num_items", [1, 63, 64, 65, 128, 129, 1000])
@pytest.mark.parametrize("at_once", [1, 1 << 12, 1 << 20])
def test_blocks_hold_every_item_once(num_items, at_once, monkeypatch) -> None:
    monkeypatch.setitem(cross_entropy._LOGITS_AT_ONCE, "cpu", at_once)
    blocks = list(blocks_of_items(10, num_items, torch.device("cpu")))
    items = [item for block in blocks for item in range(block.start, block.stop)]
    assert items == list(range(1, num_items + 1))
    assert all(10 * (block.stop - block.start) <= max(at_once, 640) for block in blocks)


def test_targets_on_the_edges_of_blocks(narrow_blocks) -> None:
    hidden_ND, table_VD, _ = problem(8)
    targets_N = torch.tensor([1, 64, 65, 128, 129, 150, 150, 64])
    loss_N = ce(hidden_ND, table_VD, targets_N, num_items=ITEMS)
    torch.testing.assert_close(loss_N, full(hidden_ND, table_VD, targets_N))


def test_gradcheck(narrow_blocks) -> None:
    hidden_ND, table_VD, targets_N = problem(5)
    targets_N[:] = 7  # all the same
    assert torch.autograd.gradcheck(
        lambda hidden, table: ce(hidden, table, targets_N, num_items=ITEMS), (hidden_ND, table_VD)
    )


@pytest.mark.parametrize("size", [1e-30, 1e4])
def test_extreme_logits(size, narrow_blocks) -> None:
    """Logits of one item around +-size: what a naive exponential would overflow on."""
    hidden_ND = torch.tensor([[1.0], [-1.0], [0.5]]).mul(size).requires_grad_()
    table_VD = torch.linspace(-1, 1, ITEMS + 1)[:, None].requires_grad_()
    targets_N = torch.tensor([ITEMS, ITEMS, 3])
    loss_N = ce(hidden_ND, table_VD, targets_N, num_items=ITEMS)
    expected_N = full(hidden_ND, table_VD, targets_N)
    torch.testing.assert_close(loss_N.double(), expected_N, rtol=1e-6, atol=1e-6)
    for found, expected in zip(
        gradients(loss_N, hidden_ND, table_VD),
        gradients(expected_N, hidden_ND, table_VD),
        strict=True,
    ):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * max(1.0, size))


def test_float32_is_close_to_float64() -> None:
    leaves = problem(200, dtype=torch.float32)
    loss_N = ce(*leaves, num_items=ITEMS)
    assert loss_N.dtype == torch.float32
    assert (loss_N >= 0).all()
    expected_N = full(*leaves)
    torch.testing.assert_close(loss_N.double(), expected_N, rtol=1e-5, atol=1e-5)
    found, expected = gradients(loss_N, *leaves[:2]), gradients(expected_N, *leaves[:2])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_under_autocast_the_loss_is_float32_and_close() -> None:
    hidden_ND, table_VD, targets_N = problem(200, scale=0.5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss_N = ce(hidden_ND.bfloat16(), table_VD, targets_N, num_items=ITEMS)
    assert loss_N.dtype == torch.float32
    assert (loss_N >= 0).all()
    expected_N = full(hidden_ND, table_VD, targets_N)
    # A factor of bfloat16 has an error of up to 2^-9.
    torch.testing.assert_close(loss_N.double(), expected_N, rtol=0, atol=0.05)
    found = gradients(loss_N, hidden_ND, table_VD)
    assert [values.dtype for values in found] == [torch.float32, torch.float32]
    expected = gradients(expected_N, hidden_ND, table_VD)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_padding_has_a_finite_loss_and_takes_no_part_when_left_out() -> None:
    hidden_ND, table_VD, targets_N = problem(12)
    kept_N = torch.arange(12) % 3 != 0
    loss_N = ce(hidden_ND, table_VD, targets_N.where(kept_N, 0), num_items=ITEMS)
    assert loss_N.isfinite().all()
    found = torch.autograd.grad(loss_N.masked_fill(~kept_N, 0.0).sum(), (hidden_ND, table_VD))
    expected_N = full(hidden_ND, table_VD, targets_N)
    expected = torch.autograd.grad(expected_N[kept_N].sum(), (hidden_ND, table_VD))
    torch.testing.assert_close(loss_N[kept_N], expected_N[kept_N])
    torch.testing.assert_close(found, expected)


def test_nothing_to_predict() -> None:
    hidden_ND, table_VD, targets_N = problem(3)
    loss_N = ce(hidden_ND[:0], table_VD, targets_N[:0], num_items=ITEMS)
    assert loss_N.shape == (0,)
    assert not gradients(loss_N, table_VD)[0].any()


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_is_of_the_size_of_all_logits() -> None:
    """Forward and backward, for 512 positions and 50,000 items: no 5 % of it."""
    hidden_ND, table_VD = torch.randn(512, 4), torch.randn(50_001, 4)
    targets_N = torch.randint(1, 50_001, (512,))
    hidden_ND.requires_grad_()
    table_VD.requires_grad_()
    with LargestTensor() as naive:
        F.cross_entropy(hidden_ND @ table_VD[1:].T, targets_N - 1).backward()
    assert naive.elements == 512 * 50_000
    with LargestTensor() as ours:
        ce(hidden_ND, table_VD, targets_N, num_items=50_000).mean().backward()
    assert 0 < ours.elements <= 0.05 * 512 * 50_000


@pytest.mark.parametrize("sparse_inputs", [False, True])
def test_row_adam_moves_the_table_as_adam_does(sparse_inputs) -> None:
    """The lookup of the inputs may add a sparse gradient to the loss's dense one."""
    trained = []
    for optimizer_class in (Adam, RowAdam):
        torch.manual_seed(0)
        table = nn.Parameter(torch.randn(ITEMS + 1, DIM))
        optimizer = optimizer_class([table], lr=0.01)
        for _ in range(5):
            inputs_N = torch.randint(1, ITEMS + 1, (9,))
            sparse = sparse_inputs and optimizer_class is RowAdam
            hidden_ND = F.embedding(inputs_N, table, sparse=sparse)
            targets_N = torch.randint(1, ITEMS + 1, (9,))
            ce(hidden_ND, table, targets_N, num_items=ITEMS).mean().backward()
            assert not table.grad.is_sparse
            optimizer.step()
            optimizer.zero_grad()
        catch_up_all(optimizer)
        trained.append(table.detach())
    torch.testing.assert_close(*trained)


def test_the_benchmark_runs(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(measure, "measure_ceilings", lambda: {"fp32_gflop_per_s": 100.0})
    # In a process of its own it would take seconds.
    monkeypatch.setattr(benchmark, "peak_memory", benchmark._measure_peak_memory)
    output = tmp_path / "result.json"
    benchmark.main(["--items", "300", "--repeats", "1", "--output", str(output)])
    figures = json.loads(output.read_text())["figures"]
    assert all(line["tron_s"] > 0 and line["reference_s"] > 0 for line in figures)
    assert figures[0]["what"] in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are Linux's")
def test_peak_memory_is_a_fraction_of_all_logits() -> None:
    """Forward and backward of 1,000 positions and 40,000 items, in a process of its own."""
    all_logits_mb = 1000 * 40_000 * 4 / 1e6
    assert 0 < benchmark.peak_memory("ce", 40_000) < all_logits_mb / 2
