"""Runs of `torchrun -m tron_cli train`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.datasets import random_sessions, write_dataset
from helpers.runs import logged, resume, start, write_config

from tron_cli.api.settings import load_config
from tron_cli.checkpoint import load_checkpoint
from tron_cli.data.dataset import Dataset
from tron_cli.distributed.processes import Processes
from tron_cli.errors import InputError
from tron_cli.training.loop import train

# A process of torchrun that may be killed in a step: RANK STEP WORDS...
DIES = """
import os, signal, sys
import tron_cli.training.step as module
from tron_cli.cli import main

rank, step = sys.argv[1:3]
original, calls = module.training_loss, 0

def watched(*arguments, **options):
    global calls
    calls += 1
    if os.environ["RANK"] == rank and calls == int(step):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)

module.training_loss = watched
sys.argv = ["tron", *sys.argv[3:]]
main()
"""


def write_generated(folder: Path) -> Path:
    rng = np.random.default_rng(10)
    split = [random_sessions(rng, count, 300) for count in (45, 20)]
    write_dataset(folder / "data", train=split[0], val=split[1], num_items=300)
    return write_config(folder, optimizer="row_adam")


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_one_process_continues(tmp_path: Path) -> None:
    """Two processes train until the ninth step; the last save is of the eighth."""
    config = write_generated(tmp_path)
    runs = tmp_path / "runs"
    start(config, tmp_path / "data", runs, "alone")
    (tmp_path / "dies.py").write_text(DIES)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
            "dies.py", "1", "9", "train", "--config", str(config), "--data-dir", "data",
            "--name", "killed", "--device", "cpu",
        ],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "another process of this training has ended" in done.stderr
    assert done.stderr.count("3,") <= 2  # one process logs
    assert not (runs / "killed" / ".lock").exists()
    assert load_checkpoint(runs / "killed" / "last.pt").step == 8
    resume(tmp_path / "data", runs / "killed")
    expected, found = logged(runs / "alone"), logged(runs / "killed")
    figures = [
        [line["validation"] for line in lines if "validation" in line]
        for lines in (expected, found)
    ]
    assert figures[0] == figures[1]
    models = [
        load_checkpoint(runs / name / "last.pt").build_model(torch.device("cpu"))
        for name in ("alone", "killed")
    ]
    for name, values in models[0].named_parameters():
        if not name.endswith("query_key_value.bias"):  # a bias of keys follows its roundings
            torch.testing.assert_close(
                models[1].get_parameter(name), values, rtol=0, atol=1e-5, msg=name
            )


def test_what_several_processes_cannot_share_is_refused(tmp_path: Path) -> None:
    write_generated(tmp_path)
    config = load_config(
        str(tmp_path / "config.py"), loss="sce", num_uniform_negatives=0, num_batch_negatives=0,
        topk_sampling=False, optimizer="adam",
    )  # fmt: skip
    dataset, device = Dataset.open(tmp_path / "data" / "tiny"), torch.device("cpu")
    with pytest.raises(InputError, match="loss=sce chooses its buckets"):
        train(config, dataset, tmp_path / "run", device=device, processes=Processes(0, 2))
    assert not (tmp_path / "run").exists()
