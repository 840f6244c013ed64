"""Runs of `torchrun -m tron_cli train`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.datasets import random_sessions, write_dataset
from helpers.processes import in_processes
from helpers.runs import logged, resume, start, write_config

from tron_cli.api.settings import load_config
from tron_cli.checkpoint import load_checkpoint
from tron_cli.data.dataset import Dataset
from tron_cli.distributed.processes import Processes
from tron_cli.errors import InputError
from tron_cli.files import best_checkpoint
from tron_cli.training.final import final_start
from tron_cli.training.loop import train
from tron_cli.training.profile import StepProfiler

# A process of torchrun that sends signals: in [ATTEMPT, RANK, STEP, SIGNAL, to torchrun] of a list.
SIGNALS = """
import json, os, sys, time
import tron_cli.training.step as module
from tron_cli.cli import main

plan = json.loads(sys.argv[1])
here = [int(os.environ[name]) for name in ("TORCHELASTIC_RESTART_COUNT", "RANK")]
original, calls = module.training_loss, 0

def watched(*arguments, **options):
    global calls
    calls += 1
    for attempt, rank, step, number, to_torchrun in plan:
        if [attempt, rank, step] == [*here, calls]:
            os.kill(os.getppid() if to_torchrun else os.getpid(), number)
            time.sleep(3 if to_torchrun else 0)  # until torchrun has told all
    return original(*arguments, **options)

module.training_loss = watched
sys.argv = ["tron", *sys.argv[2:]]
main()
"""


def torchrun(
    folder: Path, plan: list[list[int]], *words: str, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """Train with two processes, which send the signals of a plan; without a rendezvous' name."""
    (folder / "signals.py").write_text(SIGNALS)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "--master-port", port, "--max-restarts", str(restarts),
            "signals.py", json.dumps(plan), "train", *words,
            "--data-dir", "data", "--device", "cpu",
        ],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip


def write_generated(folder: Path) -> Path:
    rng = np.random.default_rng(10)
    split = [random_sessions(rng, count, 300) for count in (45, 20)]
    write_dataset(folder / "data", train=split[0], val=split[1], num_items=300)
    return write_config(folder, optimizer="row_adam")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of generated data with a run of one process in it."""
    folder = tmp_path_factory.mktemp("alone")
    start(write_generated(folder), folder / "data", folder / "runs", "alone")
    return folder


def check_as_alone(folder: Path, name: str) -> None:
    """Check that a run has the validation figures and, to rounding, the weights of one process."""
    expected, found = logged(folder / "runs" / "alone"), logged(folder / "runs" / name)
    figures = [
        [line["validation"] for line in lines if "validation" in line]
        for lines in (expected, found)
    ]
    assert figures[0] == figures[1]
    models = [
        load_checkpoint(folder / "runs" / each / "last.pt").build_model(torch.device("cpu"))
        for each in ("alone", name)
    ]
    for each, values in models[0].named_parameters():
        if not each.endswith("query_key_value.bias"):  # a bias of keys follows its roundings
            torch.testing.assert_close(
                models[1].get_parameter(each), values, rtol=0, atol=1e-5, msg=each
            )


@pytest.mark.slow
def test_a_killed_or_stopped_run_continues_with_any_number_of_processes(alone: Path) -> None:
    """One of two processes is killed in step 9, torchrun gets Ctrl-C in step 10, one goes on."""
    run = alone / "runs" / "killed"
    killed = [0, 1, 9, signal.SIGKILL, 0]
    done = torchrun(alone, [killed], "--config", "config.py", "--name", "killed")
    assert done.returncode == 1, done.stderr
    assert "another process has ended" in done.stderr
    assert done.stderr.count("3,") <= 2  # one process logs
    assert not (run / ".lock").exists()
    assert load_checkpoint(run / "last.pt").step == 8
    done = torchrun(alone, [[0, 1, 2, signal.SIGINT, 1]], "--resume", "runs/killed")
    assert done.returncode == 1, done.stderr
    assert "stopped at step 10 of 18 and saved; resume with" in done.stderr
    assert load_checkpoint(run / "last.pt").step == 10
    resume(alone / "data", run)
    check_as_alone(alone, "killed")


@pytest.mark.slow
def test_torchrun_restarts_a_run_from_its_last_save(alone: Path) -> None:
    """One process is killed in step 9, after the save of step 8; then SIGTERM stops the other."""
    plan = [[0, 1, 9, signal.SIGKILL, 0], [1, 0, 3, signal.SIGTERM, 0]]
    done = torchrun(alone, plan, "--config", "config.py", "--name", "restarted", restarts=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("continuing runs/restarted from its last save") == 2
    assert "stopped at step 11 of 18 and saved" in done.stderr
    assert done.stdout.count("\n") == 1, done.stdout
    check_as_alone(alone, "restarted")


def train_in_turn(processes: Processes, folder: Path) -> list[dict[str, torch.Tensor]]:
    """Train with averaged weights and accumulated batches from earlier weights, then finally."""
    runs = folder / f"runs-{processes.count}"
    config = load_config(
        str(folder / "config.py"),
        ema_decay=0.9,
        accumulate_batches=2,
        max_epochs=1,
        optimizer="adam",
    )
    dataset, device = Dataset.open(folder / "data" / "tiny"), torch.device("cpu")
    earlier = best_checkpoint(folder / "runs" / "alone")
    best = train(
        config, dataset, runs / "warm", device=device, init_from=earlier, processes=processes
    )
    again = final_start(best, folder / "data")
    final = train(
        again.config, again.dataset, runs / "final",
        device=device, init_from=again.init_from, final=again.record, processes=processes,
    )  # fmt: skip
    return [dict(load_checkpoint(path).build_model(device).state_dict()) for path in (best, final)]


@pytest.mark.slow
def test_averages_warm_starts_and_final_models_are_those_of_one_process(
    alone: Path, tmp_path: Path
) -> None:
    expected = train_in_turn(Processes(), alone)
    first, second = in_processes(2, train_in_turn, tmp_path, alone)
    for wanted, found, other in zip(expected, first, second, strict=True):
        for name, values in wanted.items():
            assert torch.equal(found[name], other[name]), name
            if not name.endswith("query_key_value.bias"):
                torch.testing.assert_close(found[name], values, rtol=0, atol=1e-5, msg=name)


def test_what_several_processes_cannot_share_is_refused(tmp_path: Path) -> None:
    config = load_config(str(write_generated(tmp_path)))
    dataset, device = Dataset.open(tmp_path / "data" / "tiny"), torch.device("cpu")
    with pytest.raises(InputError, match="--profile measures the steps of one process"):
        train(
            config, dataset, tmp_path / "run",
            device=device, profiler=StepProfiler(2), processes=Processes(0, 2),
        )  # fmt: skip
    assert not (tmp_path / "run").exists()
