"""Runs that are interrupted, killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.datasets import tiny_settings
from tron_cli.api.training import train
from tron_cli.config import parse_overrides

# 45 sessions in batches of 8 are 6 steps per epoch; a save falls inside each epoch and between two.
SETTINGS = {"dropout_rate": 0.3, "save_every": 4, "max_epochs": 3, "lr_schedule": "cosine"}


def write_config(folder: Path, **changes: Any) -> Path:
    settings = tiny_settings(**{**SETTINGS, **changes})
    words = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    file = folder / "config.py"
    file.write_text(
        f"from tron_cli.config import ExperimentConfig\nconfig = ExperimentConfig({words})\n"
    )
    return file


def start(config: Path, data_dir: Path, runs: Path, name: str, **more: Any) -> Path:
    options = {"data_dir": data_dir, "output_dir": runs, "name": name, "device": "cpu", **more}
    return train(config, **options).checkpoint


def resume(data_dir: Path, run_dir: Path, *overrides: str) -> Path:
    changes = parse_overrides(overrides)
    return train(data_dir=data_dir, resume=run_dir, device="cpu", **changes).checkpoint


def same_values(a: Any, b: Any) -> bool:
    """Return True if two trees of plain data and tensors are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_values(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_values, a, b))
    return bool(a == b)


def logged(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("events_per_second", None)
    return rows


def check_same_run(found: Path, expected: Path, *, same_log: bool = True) -> None:
    """Check that two runs have equal files, weights, optimizer state, progress and figures."""
    names = {path.name for path in expected.iterdir()}
    assert {path.name for path in found.iterdir()} == names
    checkpoints = sorted(name for name in names if name.endswith(".pt"))
    assert len(checkpoints) == 2
    assert "last.pt" in checkpoints
    for name in checkpoints:
        contents = [torch.load(run / name, weights_only=True) for run in (found, expected)]
        assert same_values(*contents), name
    if same_log:
        assert logged(found) == logged(expected)


def in_process(context: Any, work: Callable[..., None], *arguments: Any) -> int:
    """Exit code of `work` in a process of its own; -9 when it was killed."""
    # The weights depend on the number of threads, so both sides use the same.
    arguments = (torch.get_num_threads(), work, *arguments)
    process = context.Process(target=with_threads, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return int(process.exitcode)


def with_threads(threads: int, work: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(threads)
    work(*arguments)


def die_in_step(
    step: int, config: Path, data_dir: Path, run_dir: Path, log_every: int = 20
) -> None:
    """Train or resume, and be killed in the middle of a step."""
    import tron_cli.training.loop as loop
    import tron_cli.training.step as module

    loop._LOG_EVERY = log_every
    original, calls = module.training_loss, 0

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    module.training_loss = watched
    start_or_resume(config, data_dir, run_dir)


def start_or_resume(config: Path, data_dir: Path, run_dir: Path) -> None:
    """Resume a run if there is something to resume, else start it."""
    if (run_dir / "last.pt").exists():
        resume(data_dir, run_dir)
    else:
        shutil.rmtree(run_dir, ignore_errors=True)
        start(config, data_dir, run_dir.parent, run_dir.name)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    import tron_cli.training.step as module

    original, calls = module.training_loss, 0

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(module, "training_loss", watched)
