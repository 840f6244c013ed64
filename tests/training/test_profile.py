"""`tron train --profile`: where a step goes, and that looking changes nothing."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import random_sessions, tiny_settings, write_dataset

from tron_cli.api import training
from tron_cli.checkpoint import load_checkpoint
from tron_cli.errors import InputError
from tron_cli.training.profile import WARM_UP, StepProfiler, phase

Command = Callable[..., tuple[int, str, str]]

PHASES = {
    "batch", "negatives", "lookup", "forward", "logits", "loss", "backward", "optimizer",
}  # fmt: skip


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    rng = np.random.default_rng(5)
    # 45 sessions in batches of 8 are 6 steps per epoch.
    write_dataset(
        tmp_path / "data",
        train=random_sessions(rng, 45, 30),
        val=random_sessions(rng, 20, 30),
        num_items=30,
    )
    return tmp_path / "data"


@pytest.fixture
def words(data_dir: Path, tmp_path: Path) -> list[str]:
    """`tron train` on tiny data, 18 steps."""
    settings = tiny_settings(max_epochs=3, dropout_rate=0.3, save_every=0, clip_norm=1.0)
    text = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    config = tmp_path / "config.py"
    config.write_text(
        f"from tron_cli.config import ExperimentConfig\nconfig = ExperimentConfig({text})\n"
    )
    places = ["--data-dir", str(data_dir), "--output-dir", str(tmp_path / "runs")]
    return ["train", "--config", str(config), *places, "--device", "cpu"]


def durations(trace: Path) -> dict[str, list[float]]:
    """Microseconds of each complete event of a Chrome trace, by name."""
    found = defaultdict(list)
    for event in json.loads(trace.read_text())["traceEvents"]:
        if event.get("ph") == "X":
            found[event["name"]].append(float(event["dur"]))
    return found


def test_the_trace_holds_the_phases_and_the_tables_agree_with_it(
    words: list[str], command: Command, tmp_path: Path
) -> None:
    code, out, err = command(*words, "--name", "a", "--profile", 4, "--json")
    assert code == 0, err
    printed = json.loads(out)
    found = printed["profile"]
    run_dir = tmp_path / "runs" / "a"
    assert printed["checkpoint"] == str(run_dir / "last.pt")
    assert found["trace"] == str(run_dir / "trace.json")
    assert found["steps"] == 4
    assert sorted(path.name for path in run_dir.iterdir()) == sorted(
        ["config.json", "last.pt", "metrics.jsonl", "trace.json", "train.log"]
        + [path.name for path in run_dir.glob("tron-*.pt")]
    )

    traced = durations(run_dir / "trace.json")
    steps = [name for name in traced if name.startswith("ProfilerStep")]
    assert steps == [f"ProfilerStep#{WARM_UP + step}" for step in range(4)]
    assert len(traced["validation"]) == 1  # after step 6, and no part of a step
    total = sum(sum(traced[name]) for name in steps)
    total -= sum(traced["validation"]) + sum(traced["save"])
    assert found["step_ms"] == pytest.approx(total / 4 / 1e3, rel=0.01)
    phases = {part["name"]: part for part in found["phases"]}
    assert set(phases) == PHASES | {"between phases"}
    for name in PHASES:
        assert len(traced[name]) == 4
        assert phases[name]["ms"] == pytest.approx(sum(traced[name]) / 4 / 1e3, rel=0.02, abs=0.01)
        assert phases[name]["calls"] == 1
    for kind in ("phases", "operators"):
        assert sum(part["share"] for part in found[kind]) == pytest.approx(1)
        assert sum(part["ms"] for part in found[kind]) == pytest.approx(found["step_ms"])
    calls = {part["name"]: part["calls"] for part in found["operators"]}
    assert {"other operators", "outside operators"} < set(calls)
    assert sum(name.startswith("aten::") for name in calls) > 5
    for name, count in calls.items():
        if name.endswith("Backward"):  # which validation does not call
            assert count == len(traced[name]) / 4


def test_the_tables_go_to_stdout_and_the_log_to_stderr(words: list[str], command: Command) -> None:
    code, out, err = command(*words, "--profile", 2)
    assert code == 0
    first_words = [line.split()[0] for line in out.splitlines() if line]
    assert set(first_words) > PHASES | {"phase", "operator", "trace"}
    assert "tron on tiny" in err
    assert "tron on tiny" not in out


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("steps", [3, 7, 18 - WARM_UP])
def test_profiled_and_resumed_ends_as_if_never_profiled(
    steps: int, words: list[str], data_dir: Path, tmp_path: Path
) -> None:
    """The profile ends within an epoch, at the end of one, or with the run."""

    def train(**options: Any) -> Path:
        return training.train(data_dir=data_dir, device="cpu", **options).checkpoint

    train(config=words[2], output_dir=tmp_path, name="whole")
    saved = train(config=words[2], output_dir=tmp_path, name="profiled", profile=steps)
    assert saved == tmp_path / "profiled" / "last.pt"
    assert load_checkpoint(saved).step == WARM_UP + steps
    train(resume=tmp_path / "profiled")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "profiled").iterdir()} == names | {"trace.json"}
    for name in names:
        if name.endswith(".pt"):
            runs = [torch.load(tmp_path / run / name) for run in ("whole", "profiled")]
            assert same(*runs), name


def test_more_steps_than_the_run_has_are_refused_before_it_starts(
    words: list[str], command: Command, tmp_path: Path
) -> None:
    steps = 18 - WARM_UP
    code, out, err = command(*words, "--profile", steps + 1)
    assert (code, out) == (2, "")
    assert "takes 19 steps" in err
    assert "18 to go" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    for wrong in (0, -3, "many"):
        code, out, err = command(*words, "--profile", wrong)
        assert (code, out) == (2, "")
        assert "--profile" in err


def test_a_run_that_stops_early_says_so(words: list[str], command: Command, tmp_path: Path) -> None:
    """At a rate that changes nothing, the second epoch gains nothing."""
    settings = ["lr=1e-30", "early_stopping_patience=1"]
    code, out, err = command(*words, "--profile", 18 - WARM_UP, *settings)
    assert (code, out) == (1, "")
    assert "stopped early" in err
    assert not list(tmp_path.glob("runs/*/trace.json*"))


def test_phases_cost_nothing_unless_profiled(tmp_path: Path) -> None:
    unprofiled = phase("forward")

    def fail() -> None:
        with StepProfiler(1).running(torch.device("cpu"), tmp_path):
            assert phase("forward") is not unprofiled
            raise InputError("as a run may")

    with pytest.raises(InputError):
        fail()
    assert phase("backward") is unprofiled
