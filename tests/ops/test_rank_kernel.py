"""The Triton kernels against exact arithmetic: on CUDA, or else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.ranks import check, with_ties

from tron_cli.evaluation import ranking
from tron_cli.evaluation.ranking import Catalogue
from tron_cli.ops import rank_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which PyTorch for CUDA brings"
)
runs_kernels = pytest.mark.skipif(
    not (INTERPRETED or rank_kernel.usable(DEVICE)),
    reason="runs on CUDA; elsewhere another test runs it in Triton's interpreter",
)
on_cuda = pytest.mark.skipif(not rank_kernel.usable(DEVICE), reason="needs CUDA and Triton")


@pytest.fixture(autouse=True)
def _kernels_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(rank_kernel, "usable", lambda device: True)
        # Many programs and tiles in small data, and few large operations for the interpreter.
        monkeypatch.setattr(rank_kernel, "_BLOCK_E", 64)
        monkeypatch.setattr(rank_kernel, "_BLOCK_I", 32)
        monkeypatch.setattr(rank_kernel, "_BLOCK_P", 2048)


def random_normal(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(DEVICE)


@needs_triton
@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="is that run")
def test_the_kernels_in_the_interpreter() -> None:
    """The tests below, in a process of their own: the interpreter is chosen at import."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "passed" in done.stdout


COMPILE = """
import re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tron_cli.ops import rank_kernel

def compiled(kernel, types, constants, **options):
    signature = dict(zip(kernel.arg_names, types)) | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types) if t[0] == "*"}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)

blocks = dict(
    BLOCK_E=rank_kernel._BLOCK_E, BLOCK_I=rank_kernel._BLOCK_I, BLOCK_K=rank_kernel._BLOCK_K
)
compare = compiled(
    rank_kernel._compare_kernel,
    ["*fp16"] * 2 + ["*fp32"] * 2 + ["*i32"] * 3 + ["i32"] * 3,
    {"WIDTH": 224, "CAPACITY": 1 << 14, **blocks},
    num_warps=8, num_stages=4, maxnreg=128,
)
compiled(
    rank_kernel._pair_score_kernel,
    ["*fp32"] * 2 + ["*i64"] * 2 + ["*fp64", "i32"],
    {"WIDTH": 200, "BLOCK_P": rank_kernel._BLOCK_P, "BLOCK_D": 64},
)
assert re.search(r"wgmma\\.mma_async|mma\\.sync", compare.asm["ptx"]), "no tensor cores"
"""


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_cards_that_are_not_here(capability: int, tmp_path: Path) -> None:
    """In a process of its own: where Triton's compiler fails, it aborts."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]


@needs_triton
@runs_kernels
@pytest.mark.parametrize("capacity", [2, 1 << 14])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_equal_a_brute_force_sort(
    seed: int, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ties, repeats, filters, zero states; lists of doubtful items that overflow or do not."""
    monkeypatch.setattr(rank_kernel, "_CAPACITY", capacity)
    monkeypatch.setattr(rank_kernel, "_multiprocessors", lambda device: 3)
    monkeypatch.setattr(ranking, "_EVENTS_AT_ONCE", 70)
    rng = np.random.default_rng(seed)
    num_items, dim, events = int(rng.integers(1, 150)), int(rng.integers(1, 70)), 75
    table = with_ties(rng, num_items, dim).to(DEVICE)
    hidden = random_normal(rng, events, dim)
    hidden[0] = 0
    hidden[3] = table[1]
    targets = rng.integers(1, num_items + 1, events).tolist()
    histories = [set(rng.integers(1, num_items + 1, 5).tolist()) for _ in range(events)]
    check(hidden, table, targets)
    check(hidden, table, targets, histories)


@needs_triton
@runs_kernels
@pytest.mark.parametrize("spacing", [2.0**-9, 2.0**-11, 2.0**-13, 2.0**-23])
def test_near_ties_around_the_rounding_of_float16(spacing: float) -> None:
    rng = np.random.default_rng(0)
    row = random_normal(rng, 1, 40)
    table = row * (1 + spacing * torch.from_numpy(rng.integers(-4, 5, (81, 40))).to(row))
    hidden = torch.cat([random_normal(rng, 4, 40), row, -row])
    hidden[0, 0] = -(hidden[0, 1:] * row[0, 1:]).sum() / row[0, 0]  # cancels
    check(hidden, table, rng.integers(1, 81, 6).tolist())


@needs_triton
@runs_kernels
@pytest.mark.parametrize("dim", [1, 3])
def test_the_whole_bound_is_used(dim: int) -> None:
    """All errors in one direction: of embeddings, of hidden states, and of both."""
    steps = torch.arange(65, device=DEVICE)[:, None].expand(-1, dim)
    in_float16, between = 1 + 2.0**-10 * (steps // 4), 1 + 2.0**-13 * steps
    hidden = torch.tensor([1, 1 + 2.0**-11 + 2.0**-20, 1 + 2.0**-11 - 2.0**-20], device=DEVICE)
    hidden = torch.cat([hidden, -hidden])[:, None].expand(-1, dim)
    for target in (2, 17, 40):
        check(hidden, in_float16, [target] * 6, limit=64)
        check(hidden, between, [target] * 6, limit=64)


@needs_triton
@runs_kernels
@pytest.mark.parametrize("largest", [-35, 0, 17])
def test_entries_of_very_different_sizes(largest: int) -> None:
    """Beyond float16 on both sides, rows of zeros and of subnormal numbers among them."""
    rng = np.random.default_rng(largest + 50)
    table = rng.standard_normal((60, 20)) * 10.0 ** rng.integers(-44, largest, (60, 1))
    table[:30] *= 10.0 ** -rng.integers(0, 9, (30, 20))
    table[40:44] = 0
    hidden = rng.standard_normal((9, 20)) * 10.0 ** rng.integers(-44, 17, (9, 1))
    as_float32 = [torch.from_numpy(x.astype(np.float32)).to(DEVICE) for x in (hidden, table)]
    check(*as_float32, rng.integers(1, 60, 9).tolist())


@needs_triton
@runs_kernels
def test_few_items_are_in_doubt() -> None:
    """The bound is worth its while: of random items well below 1 % lie within it."""
    rng = np.random.default_rng(0)
    table, hidden = random_normal(rng, 501, 200), random_normal(rng, 20, 200)
    target = torch.arange(1, 21, device=DEVICE)
    catalogue = Catalogue(table)
    assert catalogue._kernel is not None
    score = (hidden.double() * table[target].double()).sum(dim=1)
    compared = catalogue._kernel.compare(hidden, score)
    assert bool((compared.in_doubt_E >= 1).all())  # the target itself
    assert float(compared.in_doubt_E.float().mean()) < 5


@needs_triton
@runs_kernels
@pytest.mark.parametrize("capacity", [1, 7, 1 << 14])
def test_counting_ends_when_the_list_is_full(
    capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All items tie with the target: each of the programs notices at its first item too many."""
    monkeypatch.setattr(rank_kernel, "_CAPACITY", capacity)
    monkeypatch.setattr(rank_kernel, "_multiprocessors", lambda device: 3)
    items, events = 900, 5
    table, hidden = torch.ones(items + 1, 8, device=DEVICE), torch.ones(events, 8, device=DEVICE)
    hidden[1], hidden[2] = 0, torch.tensor([3, -3] * 4)
    score = (hidden.double() * table[1].double()).sum(dim=1)
    found = rank_kernel.CoarseTable(table).compare(hidden, score)
    listed = min(capacity, items)
    assert found.in_doubt_EN.shape == (events, listed)
    assert found.ahead_E.tolist() == [0] * events
    programs = 4 * 3
    for event in range(events):
        count = int(found.in_doubt_E[event])
        assert count == items if capacity > items else capacity < count <= capacity + programs
        ids = found.in_doubt_EN[event].tolist()
        assert len(set(ids)) == listed
        assert set(ids) <= set(range(1, items + 1))
    target_E = torch.arange(1, events + 1, device=DEVICE)
    assert Catalogue(table).ranks(hidden, target_E).tolist() == [items] * events


@on_cuda
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_the_chunked_path_is_the_oracle_at_size(offset: float) -> None:
    """An offset makes all sums cancel: large terms of both signs, which tensor cores cut off."""
    rng = np.random.default_rng(0)
    table, hidden = random_normal(rng, 300_001, 200), random_normal(rng, 5000, 200)
    table[:, ::2] += offset
    hidden[:, ::4] += offset
    hidden[:, 2::4] -= offset
    target = torch.from_numpy(rng.integers(1, 300_001, 5000)).to(DEVICE)
    catalogue = Catalogue(table)
    found = catalogue.ranks(hidden, target)
    catalogue._kernel = None
    assert torch.equal(found, catalogue.ranks(hidden, target))
