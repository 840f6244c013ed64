"""Exact ranks, compared with a brute-force sort in exact arithmetic."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from helpers.int8 import use_int8
from helpers.ranks import check, with_ties

from tron_cli.errors import RunError
from tron_cli.evaluation import ranking
from tron_cli.evaluation.ranking import Catalogue
from tron_cli.ops import rank_kernel


@pytest.fixture(params=["float32", "int8"])
def first_stage(request, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "int8":
        use_int8(monkeypatch)


@pytest.mark.usefixtures("first_stage")
@pytest.mark.parametrize("seed", range(20))
def test_ranks_and_lists_equal_a_brute_force_sort(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 x 40 randomized events: ties, repeats, filters, zero states, any cut into chunks."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(ranking, "_CHUNK_ELEMENTS", int(rng.choice([1, 40, 77, 200, 1 << 20])))
    monkeypatch.setattr(ranking, "_PAIRS_AT_ONCE", int(rng.choice([1, 3, 1 << 16])))
    num_items, dim, events = int(rng.integers(1, 30)), int(rng.integers(1, 6)), 40
    table = with_ties(rng, num_items, dim)
    hidden = torch.from_numpy(rng.standard_normal((events, dim)).astype(np.float32))
    hidden[0] = 0
    hidden[1] = hidden[2]
    if num_items > 1:
        hidden[3] = table[2]
    targets = rng.integers(1, num_items + 1, events).tolist()
    histories = [
        set(rng.integers(1, num_items + 1, rng.integers(0, num_items + 3)).tolist())
        for _ in range(events)
    ]
    check(hidden, table, targets, limit=int(rng.integers(1, num_items + 4)))
    check(hidden, table, targets, histories, limit=int(rng.integers(1, num_items + 4)))


@pytest.mark.usefixtures("first_stage")
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e17])
@pytest.mark.parametrize("dim", [3, 64])
def test_near_ties_within_float32_rounding(scale: float, dim: int) -> None:
    """Scores equal in float32 but not in truth, by cancellation of large terms, at any norm."""
    rng = np.random.default_rng(dim)
    base = rng.standard_normal(dim) * scale
    table = np.repeat(base[None], 25, axis=0).astype(np.float32)
    for item in range(1, 20):
        place = rng.integers(dim)
        table[item, place] = np.nextafter(table[item, place], np.float32(rng.choice([-1, 1])))
    # One entry of a huge norm makes the rounding bound wide for all.
    table[24] *= 100
    hidden = rng.standard_normal((12, dim)).astype(np.float32)
    hidden[6:, 0] = -(hidden[6:, 1:] * table[1, 1:]).sum(axis=1) / table[1, 0]
    targets = rng.integers(1, 25, 12).tolist()
    check(torch.from_numpy(hidden), torch.from_numpy(table), targets, limit=24)


def test_large_scores_are_ranked_and_those_beyond_float32_are_an_error() -> None:
    """Beyond the range inf - inf would be NaN, which compares as if the item scored lower."""
    table = torch.tensor([[0.0, 0.0], [1e18, 1e18], [1e18, -1e18], [-1e18, -1e18], [2e18, 1e18]])
    hidden = torch.tensor([[1e18, -1e18], [1e18, 1e18], [-1e18, 1e18]])
    for target in range(1, 5):
        check(hidden, table, [target] * 3, limit=4)
        with pytest.raises(RunError, match="range of float32"):
            Catalogue(table * 1e12).ranks(hidden * 1e12, torch.tensor([target] * 3))


def test_products_that_underflow_float32() -> None:
    table = torch.tensor([[0.0], [1e-30], [2e-30], [0.0], [-1e-30]])
    hidden = torch.tensor([[1e-30], [-1e-30], [1e10]])
    for target in range(1, 5):
        check(hidden, table, [target] * 3, limit=4)


def test_a_catalogue_larger_than_a_chunk_of_the_true_size() -> None:
    rng = np.random.default_rng(0)
    table = rng.integers(-3, 4, (70_001, 4)).astype(np.float32)  # integers: exact, full of ties
    hidden = rng.integers(-3, 4, (32, 4)).astype(np.float32)
    targets = rng.integers(1, 70_001, 32)
    scores = hidden.astype(np.int64) @ table.astype(np.int64).T
    found = Catalogue(torch.from_numpy(table)).ranks(
        torch.from_numpy(hidden), torch.from_numpy(targets)
    )
    own = scores[np.arange(32), targets][:, None]
    assert found.tolist() == (scores[:, 1:] >= own).sum(axis=1).tolist()  # the target counts as 1


def test_near_ties_that_float64_cannot_tell_apart() -> None:
    """Sums that cancel: float64 loses the small terms, or adds them in an order that matters."""
    big, one, small = 2.0**40, 1.0, 2.0**-20
    rows = [
        [big, one, -big, small],
        [big, one, -big, -small],
        [big, one, -big, 0.0],
        [-big, one, big, small],
        [one, big, -big, small],
        [small, -big, one, big],
        [0.0, 0.0, 0.0, one],
        [big, 0.0, -big, 0.0],
    ]
    table = torch.tensor([[0.0] * 4, *rows])
    hidden = torch.tensor([[big, big, big, big], [1.0, 1.0, 1.0, 1.0], [1.0, small, 1.0, big]])
    for target in range(1, len(table)):
        check(hidden, table, [target] * 3, limit=8)
        check(hidden, table, [target] * 3, [{1, 5, 7}] * 3, limit=8)


@pytest.mark.parametrize("dim", [5, 64])
def test_equal_sums_of_reordered_terms_tie(dim: int) -> None:
    """A permuted embedding and a constant hidden state: equal in truth, in no floating point."""
    rng = np.random.default_rng(dim)
    row = rng.standard_normal(dim) * 10.0 ** rng.integers(-6, 6, dim)
    table = np.stack([rng.permutation(row) for _ in range(30)]).astype(np.float32)
    hidden = np.full((3, dim), 0.1, np.float32)
    check(torch.from_numpy(hidden), torch.from_numpy(table), [4, 11, 29], limit=29)


@pytest.mark.parametrize("seed", range(4))
def test_norms_from_subnormal_to_huge_in_one_table(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-44, 17, (40, 1))
    table = (rng.standard_normal((40, 6)) * scale).astype(np.float32)
    table[20:30] = table[10:20]
    hidden = rng.standard_normal((12, 6)) * 10.0 ** rng.integers(-44, 17, (12, 1))
    check(
        torch.from_numpy(hidden.astype(np.float32)),
        torch.from_numpy(table),
        rng.integers(1, 40, 12).tolist(),
        limit=39,
    )


def test_a_shared_offset_larger_than_the_differences() -> None:
    """All scores agree in their first digits, as when embeddings hardly left their mean."""
    rng = np.random.default_rng(0)
    table = (100 + rng.standard_normal((200, 200)) * 1e-5).astype(np.float32)
    hidden = (1 + rng.standard_normal((3, 200)) * 1e-5).astype(np.float32)
    check(torch.from_numpy(hidden), torch.from_numpy(table), [3, 77, 199], limit=20)


def test_hidden_states_of_zeros_tie_with_everything() -> None:
    table = torch.randn(3000, 8)
    assert Catalogue(table).ranks(torch.zeros(2, 8), torch.tensor([5, 9])).tolist() == [2999] * 2


def test_no_events() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert Catalogue(torch.ones(4, 2)).ranks(torch.zeros(0, 2), none).tolist() == []


def test_more_events_than_are_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_EVENTS_AT_ONCE", 7)
    rng = np.random.default_rng(1)
    table = with_ties(rng, 50, 3)
    hidden = torch.from_numpy(rng.standard_normal((45, 3)).astype(np.float32))
    check(hidden, table, rng.integers(1, 51, 45).tolist())


def test_padding_row_is_no_item() -> None:
    table = torch.tensor([[9.0], [1.0], [2.0]])
    check(torch.ones(2, 1), table, [1, 2], limit=5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_an_error_and_not_a_perfect_rank(bad: float) -> None:
    table = torch.ones(4, 2)
    target = torch.tensor([1, 2])
    with pytest.raises(RunError, match="NaN or infinite"):
        Catalogue(table).ranks(torch.tensor([[1.0, 1.0], [1.0, bad]]), target)
    table[3, 0] = bad
    with pytest.raises(RunError, match="NaN or infinite"):
        Catalogue(table)


def test_ranks_do_not_depend_on_which_events_are_ranked_together() -> None:
    rng = np.random.default_rng(3)
    table = with_ties(rng, 500, 24)
    hidden = torch.from_numpy(rng.standard_normal((64, 24)).astype(np.float32))
    targets = torch.from_numpy(rng.integers(1, 501, 64))
    catalogue = Catalogue(table)
    together = catalogue.ranks(hidden, targets)
    alone = torch.cat([catalogue.ranks(hidden[e : e + 1], targets[e : e + 1]) for e in range(64)])
    assert together.tolist() == alone.tolist()


# --- kernels that do not run ----------------------------------------------------------------------


class BrokenKernel:
    """Stand-in for `rank_kernel.CoarseTable` whose first kernel call fails in Triton."""

    error: Exception
    scores_first = False

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table

    def pair_scores(self, hidden: torch.Tensor, event: torch.Tensor, item: torch.Tensor) -> Any:
        if self.scores_first:
            return (hidden[event].double() * self._table[item].double()).sum(dim=1)
        raise self.error

    def compare(self, hidden: torch.Tensor, score: torch.Tensor) -> Any:
        raise self.error


@pytest.fixture
def broken_kernel(monkeypatch: pytest.MonkeyPatch) -> type[BrokenKernel]:
    monkeypatch.setattr(rank_kernel, "_has_failed", False)
    monkeypatch.setattr(rank_kernel, "usable", lambda device: not rank_kernel._has_failed)
    monkeypatch.setattr(rank_kernel, "CoarseTable", BrokenKernel)
    monkeypatch.setattr(BrokenKernel, "scores_first", False)
    return BrokenKernel


@pytest.mark.parametrize("scores_first", [False, True])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
            "RuntimeError: Failed to find C compiler. Please specify via CC environment variable.",
        ),
        (
            subprocess.CalledProcessError(1, ["gcc", "main.c"]),
            "CalledProcessError: Command '['gcc', 'main.c']' returned non-zero exit status 1.",
        ),
        (
            PermissionError(13, "Permission denied", "/home/me/.triton"),
            "PermissionError: [Errno 13] Permission denied: '/home/me/.triton'",
        ),
        (AssertionError("libcuda.so cannot found!\nhelp"), "AssertionError: libcuda.so cannot fo"),
    ],
    ids=["no compiler", "compiler fails", "no cache", "no driver"],
)
def test_ranks_go_on_without_a_kernel_that_does_not_compile(
    broken_kernel: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    reason: str,
    scores_first: bool,
) -> None:
    """The kernel is disabled for the whole process, and one warning says why."""
    monkeypatch.setattr(broken_kernel, "error", error, raising=False)
    monkeypatch.setattr(broken_kernel, "scores_first", scores_first)
    rng = np.random.default_rng(0)
    table = with_ties(rng, 30, 6)
    hidden = torch.from_numpy(rng.standard_normal((9, 6)).astype(np.float32))
    targets = rng.integers(1, 31, 9).tolist()
    with caplog.at_level(logging.WARNING, "tron"):
        assert Catalogue(table)._kernel is not None
        check(hidden, table, targets)
        check(hidden, table, targets, [{1, 2}] * 9)
    assert Catalogue(table)._kernel is None
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(
        f"ranks are computed without the Triton kernel, more slowly: {reason}"
    )
    assert "\n" not in message


def test_a_kernel_that_runs_out_of_memory_is_no_kernel_that_does_not_compile(
    broken_kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broken_kernel, "error", torch.OutOfMemoryError("no"), raising=False)
    with pytest.raises(torch.OutOfMemoryError):
        Catalogue(torch.ones(4, 2)).ranks(torch.ones(1, 2), torch.tensor([1]))
    assert not rank_kernel._has_failed


def test_the_kernels_run_on_the_card_that_holds_the_table(
    broken_kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches them on the current one, from which the table's memory cannot be read."""
    current: list[torch.Tensor] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    class Kernel(BrokenKernel):
        def compare(self, hidden: torch.Tensor, score: torch.Tensor) -> Any:
            assert current[-1].data_ptr() == self._table.data_ptr()
            raise torch.OutOfMemoryError("as far as it should come")

        def pair_scores(self, hidden: torch.Tensor, event: torch.Tensor, item: torch.Tensor) -> Any:
            assert current[-1].data_ptr() == self._table.data_ptr()
            return super().pair_scores(hidden, event, item)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(rank_kernel, "CoarseTable", Kernel)
    monkeypatch.setattr(BrokenKernel, "scores_first", True)
    with pytest.raises(torch.OutOfMemoryError, match="as far"):
        Catalogue(torch.ones(4, 2)).ranks(torch.ones(1, 2), torch.tensor([1]))


def test_which_cards_the_kernels_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = {0: (7, 5), 1: (8, 0), 2: (9, 0)}  # T4, A100, H100
    monkeypatch.setattr(rank_kernel, "triton", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capabilities[d.index])
    cards = [torch.device("cuda", index) for index in capabilities]
    assert [rank_kernel.usable(card) for card in cards] == [False, True, True]
    assert not rank_kernel.usable(torch.device("cpu"))
    monkeypatch.setattr(rank_kernel, "_has_failed", True)
    assert not any(rank_kernel.usable(card) for card in cards)
