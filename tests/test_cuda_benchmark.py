"""`python -m benchmarks.cuda`, run on the CPU."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fixed_shapes import ITEMS, build, settings, some_sessions
from helpers.recorders import CPU

from benchmarks import cuda
from tron_cli.ops import rank_kernel


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_the_cuda_benchmark_says_that_there_is_no_cuda_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cuda.main(["--output", str(tmp_path / "cuda.json")])
    assert end.value.code == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "cuda.json").exists()


def test_every_part_of_the_cuda_benchmark_runs(tmp_path: Path) -> None:
    """On the CPU and tiny, so that the one run on a GPU is not lost to a slip."""
    config = settings(sequence_length=20, train_batch_size=16)
    report = cuda.Report(tmp_path / "cuda.json", 5, {"machine": "none"})
    cuda.measure_all(
        report, config, CPU, num_items=ITEMS, num_sessions=200, steps=8, evaluated_sessions=70
    )
    written = json.loads((tmp_path / "cuda.json").read_text())
    parts = {name: part for name, part in written.items() if isinstance(part, dict)}
    assert not [name for name, part in parts.items() if "error" in part]
    for graphs in ("graphs", "eager"):
        found = written[f"{graphs}, float32, row_adam"]
        assert found["step_ms"] > 0
        hours = 12_900_000 / 16 * found["step_ms"] / 1e3 / 3600
        assert found["epochs_an_hour"] == pytest.approx(1 / hours)
    assert written["evaluation"]["ranks_differ"] == 0
    ratio = written["summary"]["bf16: times as fast as the reference in float32"]
    assert ratio == pytest.approx(
        written["reference"]["step_float32_ms"] / written["graphs, bf16, row_adam"]["step_ms"]
    )
    assert written["summary"]["float32: largest difference of 4 losses"] == 0.0


def test_a_variant_is_measured_without_the_memory_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and moments of OTTO's size, which would stay until the garbage is collected."""
    made: list[Any] = []

    class Watched(cuda.Steps):
        def __init__(self, *of: Any, **more: Any) -> None:
            assert [steps() for steps in made] == [None] * len(made)
            made.append(weakref.ref(self))
            super().__init__(*of, **more)

    monkeypatch.setattr(cuda, "Steps", Watched)
    config = settings(sequence_length=20, train_batch_size=16)
    report = cuda.Report(tmp_path / "cuda.json", 5, {})
    cuda.measure_all(
        report, config, CPU, num_items=ITEMS, num_sessions=60, steps=2, evaluated_sessions=20
    )
    assert len(made) == len(cuda.VARIANTS)
    parts = json.loads((tmp_path / "cuda.json").read_text())
    assert not [name for name, part in parts.items() if "error" in part]


def test_ranks_that_the_kernel_did_not_compute_are_not_reported_as_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If Triton fails, the chunks compute them."""

    class Fails:
        def __init__(self, table: torch.Tensor) -> None: ...

        def pair_scores(self, *of: Any) -> Any:
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(rank_kernel, "_has_failed", False)
    monkeypatch.setattr(rank_kernel, "CoarseTable", Fails)
    monkeypatch.setattr(rank_kernel, "usable", lambda device: not rank_kernel._has_failed)
    model = build(settings())[0].float()
    found = cuda.measure_evaluation(model, some_sessions(), CPU, batch_size=8)
    assert found["kernel_usable"] is False
    assert found["ranks_differ"] == 0


def test_a_part_that_fails_is_reported_and_none_begins_when_time_is_over(tmp_path: Path) -> None:
    def fails() -> dict[str, Any]:
        raise ValueError("no")

    report = cuda.Report(tmp_path / "cuda.json", 5, {})
    assert report.part("one", fails)["error"] == "ValueError: no"
    assert report.part("two", lambda: {"figure": 3})["figure"] == 3
    over = cuda.Report(tmp_path / "over.json", 0, {})
    assert over.part("one", lambda: {"figure": 3})["error"] == "no time was left"
    written = json.loads((tmp_path / "cuda.json").read_text())
    assert written["one"]["error"] == "ValueError: no"
    assert written["two"]["figure"] == 3
