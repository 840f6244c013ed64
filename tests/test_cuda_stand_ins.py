"""Tests of test_cuda.py on stand-ins for a GPU, which find a slip in them where there is none.

The device is the CPU, with the arithmetic of CUDA; a replay does the operations of a recorded step
again; and logits are off by a rounding each time, as sums are that have no fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_cuda
import torch
from helpers.recorders import CPU, TapeRecorder

from tron_cli.data.batches import Batch
from tron_cli.training import step as training_steps
from tron_cli.training.optim import build_optimizer

(CHANGES,) = (
    mark
    for mark in test_cuda.test_replayed_steps_are_the_steps.pytestmark
    if mark.args[0] == "changes"
)


def build_for_cuda(*of: Any, **more: Any) -> torch.optim.Optimizer:
    optimizer = build_optimizer(*of, **more)
    optimizer.leaves_out_rows = False
    return optimizer


def rounded_otherwise(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Logits that are off by half a unit in the last place or so, each time otherwise."""
    random = torch.Generator().manual_seed(0)

    def computed(*of: Any, **more: Any) -> Any:
        positive_N, negative_NK, keep_NK = compute(*of, **more)
        noise_N, noise_NK = (
            1 + 1.2e-7 * torch.randn(logits.shape, generator=random)
            for logits in (positive_N, negative_NK)
        )
        return positive_N * noise_N, negative_NK * noise_NK, keep_NK

    return computed


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch, gpu_branches: None) -> None:
    in_one_piece = Batch.in_one_piece
    monkeypatch.setattr(
        Batch, "in_one_piece", lambda self, *, pinned: in_one_piece(self, pinned=False)
    )
    monkeypatch.setattr(test_cuda, "CUDA", CPU)
    monkeypatch.setattr(test_cuda, "CUDARecorder", lambda device: TapeRecorder())
    monkeypatch.setattr(test_cuda, "build_optimizer", build_for_cuda)
    sampled_logits = rounded_otherwise(training_steps.sampled_logits)
    monkeypatch.setattr(training_steps, "sampled_logits", sampled_logits)


@pytest.mark.parametrize("changes", CHANGES.args[1], ids=CHANGES.kwargs["ids"])
def test_replays_are_near_the_steps(
    caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    test_cuda.test_replayed_steps_are_the_steps(caplog, torch.float32, changes)


class ForgetsSeeds(TapeRecorder):
    """Every replay draws the numbers of one seed."""

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        replay = super().record(work)

        def replay_from_seed() -> None:
            torch.manual_seed(0)
            replay()

        return replay_from_seed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replays_with_other_numbers_are_found(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """The tolerance lets roundings pass, and nothing else."""
    monkeypatch.setattr(test_cuda, "CUDARecorder", lambda device: ForgetsSeeds())
    with pytest.raises(AssertionError, match="not close"):
        test_cuda.test_replayed_steps_are_the_steps(caplog, dtype, {})


def test_replays_draw_the_numbers_of_their_seeds() -> None:
    test_cuda.test_replays_draw_other_numbers_for_another_seed_and_the_same_for_the_same()


@pytest.mark.parametrize("name", ["adam", "row_adam", "adagrad"])
def test_rows_that_are_written_back_end_as_those_that_are_left_out(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    builds = iter([build_optimizer, build_for_cuda])
    monkeypatch.setattr(test_cuda, "build_optimizer", lambda *of, **more: next(builds)(*of, **more))
    test_cuda.test_optimizers_step_as_on_the_cpu(name)
