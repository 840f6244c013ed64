"""`tron train`: what it prints, its run folders, and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_lines import Command, is_one_sentence
from helpers.datasets import write_dataset

from tron_cli.api.training import TrainingResult
from tron_cli.checkpoint import load_checkpoint


def test_overrides_stand_anywhere_after_the_subcommand(
    shop: list[str], command: Command, tmp_path: Path
) -> None:
    words = ["max_epochs=1", *shop[:4], "seed=7", *shop[4:], "dropout_rate=0.5", "--name", "a"]
    code, out, _ = command("train", *words, "num_blocks=2")
    assert code == 0
    config = load_checkpoint(Path(out.strip())).config
    found = (config.max_epochs, config.seed, config.dropout_rate, config.num_blocks)
    assert found == (1, 7, 0.5, 2)
    assert json.loads((tmp_path / "runs" / "a" / "config.json").read_text())["seed"] == 7


def test_train_prints_the_best_checkpoint_and_nothing_else(
    shop: list[str], command: Command, tmp_path: Path
) -> None:
    code, out, _ = command("train", *shop, "--name", "a")
    assert code == 0
    assert out.count("\n") == 1
    best = Path(out.strip())
    assert best.parent == tmp_path / "runs" / "a"
    assert {path.name for path in best.parent.iterdir()} == {
        "config.json", "metrics.jsonl", "train.log", "last.pt", best.name,
    }  # fmt: skip
    code, out, _ = command("train", *shop, "--name", "b", "--json")
    found = json.loads(out)
    assert set(found) == {"checkpoint", "validation"}
    assert set(found["validation"]) == {"R@5", "RR@5"}


def test_a_run_folder_is_never_reused(shop: list[str], command: Command) -> None:
    assert command("train", *shop, "--name", "a", "max_epochs=1")[0] == 0
    code, _, err = command("train", *shop, "--name", "a", "max_epochs=1")
    assert code == 2
    assert "another --name" in err


# All runs are named in one second, and begin when all are named.
SAME_SECOND = """
import os, sys, time
from pathlib import Path
import tron_cli.training.start as module
from tron_cli.cli import main
splits, meeting = module.training_splits, Path(os.environ["MEETING"])
def wait(*arguments):
    (meeting / str(os.getpid())).touch()
    while len(list(meeting.iterdir())) < 2:
        time.sleep(0.01)
    return splits(*arguments)
time.strftime = lambda *_: "20260101-120000"
module.training_splits = wait
main()
"""


def test_runs_that_start_in_the_same_second_have_a_folder_each(
    shop: list[str], tmp_path: Path
) -> None:
    (tmp_path / "meeting").mkdir()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SAME_SECOND, "train", *shop, f"seed={seed}", "max_epochs=1"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "MEETING": str(tmp_path / "meeting")},
        )
        for seed in range(2)
    ]  # fmt: skip
    printed = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    best = [Path(out.strip()) for out, _ in printed]
    assert len({path.parent for path in best}) == 2
    assert [load_checkpoint(path).config.seed for path in best] == [0, 1]


def test_nobody_else_may_write_to_the_folder_of_a_run(
    shop: list[str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither --resume nor --name, until it ends; a process that was killed holds nothing."""
    best = Path(command("train", *shop, "--name", "a")[1].strip())
    run = best.parent
    hold = (
        "import sys; from pathlib import Path; from tron_cli.files import locked\n"
        f"run = Path({str(run)!r})\n"
        "with locked(run / '.lock', run, 'wait'): print('held', flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    words = [*shop[2:4], "--device", "cpu"]
    before = (run / "last.pt").read_bytes()
    for again in (["--resume", run, *words, "max_epochs=3"], [*shop, "--name", "a"]):
        code, out, err = command("train", *again)
        assert (code, out) == (2, "")
        held = f"tron: {run} is being written by process {holder.pid} (python"
        assert err.startswith(held)
        assert "from tron_cli.files import locked" in err  # the command of the process
        assert "wait until it ends, or choose another --name" in err
        assert is_one_sentence(err)
    assert (run / "last.pt").read_bytes() == before
    holder.kill()
    holder.wait()
    assert command("train", "--resume", run, *words, "max_epochs=3")[0] == 0
    assert not (run / ".lock").exists()


def test_a_name_is_free_again_where_a_run_never_saved(
    shop: list[str], command: Command, tmp_path: Path
) -> None:
    assert command("train", *shop, "--name", "a", "lr=1e30")[0] == 1
    code, out, _ = command("train", *shop, "--name", "a")
    assert code == 0
    mine = tmp_path / "runs" / "thesis"
    mine.mkdir()
    (mine / "chapter.partial").write_text("years of work")
    code, _, err = command("train", *shop, "--name", "a")
    assert code == 2
    cure = "continue it with `tron train --resume runs/a`, or choose another --name"
    assert f"runs/a holds a run already; {cure}" in err.replace(f"{tmp_path}/", "")
    code, _, err = command("train", *shop, "--name", "thesis")
    assert code == 2
    assert "it holds chapter.partial" in err
    (Path(out.strip()).parent / "notes.partial").mkdir()
    assert command("train", "--resume", Path(out.strip()).parent, *shop[2:4])[0] == 0
    assert sorted(path.name for path in mine.iterdir()) == ["chapter.partial"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_ctrl_c_saves_exits_non_zero_and_prints_how_to_resume(
    shop: list[str], command: Command, tmp_path: Path
) -> None:
    words = ["train", *shop, "max_epochs=15", "save_every=2", "--name"]
    whole = Path(command(*words, "whole")[1].strip())
    process = subprocess.Popen(
        [sys.executable, "-m", "tron_cli", *words, "stopped"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    run_dir = tmp_path / "runs" / "stopped"
    deadline = time.monotonic() + 60
    while not (run_dir / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert "Traceback" not in err
    said = re.search(r"`tron (train --resume \S+)`", err)
    assert said is not None
    step = load_checkpoint(run_dir / "last.pt").step
    assert 0 < step < 75
    code, out, _ = command(*said.group(1).split(), *shop[2:4], "--device", "cpu")
    assert code == 0
    assert Path(out.strip()).name == whole.name
    weights = [load_checkpoint(folder / "last.pt").weights for folder in (run_dir, whole.parent)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--name", "../elsewhere"], "--name must be a folder name"),
        (["--name", ""], "name is empty; give a value, or leave it out"),
        (["--device", "meta"], "--device must be auto, cpu, cuda or cuda:N"),
        (["val_metric=R@99999"], "cutoff"),
        (["metrics=foo@3"], "foo@3"),
        (["precision=fp16"], "precision=fp16 needs CUDA"),
    ],
)
def test_what_is_refused_at_once_leaves_no_run_folder(
    command: Command, tmp_path: Path, words: list[str], says: str
) -> None:
    write_dataset(tmp_path / "data", name="tiny", train=[[1, 2]], val=[[1, 2]], test=[[1, 2]])
    places = ["--data-dir", str(tmp_path / "data"), "--output-dir", str(tmp_path / "runs")]
    code, out, err = command("train", "--config", "config_otto", "dataset_name=tiny",
                             "--device", "cpu", *places, *words)  # fmt: skip
    assert (code, out) == (2, "")
    assert says in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "elsewhere").exists()


def test_a_run_folder_that_cannot_be_made_is_one_sentence(command: Command, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", name="tiny", train=[[1, 2]])
    (tmp_path / "runs").write_text("a file")
    code, _, err = command("train", "--config", "config_otto", "dataset_name=tiny",
                           "--data-dir", str(tmp_path / "data"),
                           "--output-dir", str(tmp_path / "runs"))  # fmt: skip
    assert code == 2
    assert "cannot write to the run folder" in err


def test_a_run_folder_that_cannot_be_written_to_is_not_resumed(
    shop: list[str], command: Command
) -> None:
    best = Path(command("train", *shop, "--name", "a")[1].strip())
    (best.parent / ".lock").mkdir()  # as a folder on a disk that is read-only
    code, _, err = command("train", "--resume", best.parent, *shop[2:4])
    assert (code, is_one_sentence(err)) == (2, True)
    assert f"cannot write to {best.parent}" in err


def test_every_option_of_train_arrives(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[dict[str, Any]] = []

    def train(config: str | None, **options: Any) -> TrainingResult:
        seen.append({"config": config, **options})
        return TrainingResult(Path("best.pt"), Path(), {}, step=1, steps=1, epochs=1)

    monkeypatch.setattr("tron_cli.api.training.train", train)
    code, out, _ = command("train", "--config", "c", "lr=1", "--data-dir", "d", "--output-dir", "o",
                           "--name", "n", "--device", "cpu", "seed=2")  # fmt: skip
    assert (code, out) == (0, "best.pt\n")
    assert seen.pop() == {
        "config": "c", "lr": 1.0, "seed": 2, "data_dir": Path("d"), "output_dir": Path("o"),
        "name": "n", "resume": None, "init_from": None, "final": None, "profile": None,
        "device": "cpu",
    }  # fmt: skip
    command("train", "--resume", "r", "--profile", 3)
    assert seen.pop() == {
        "config": None, "data_dir": Path("datasets"), "output_dir": None, "name": None,
        "resume": Path("r"), "init_from": None, "final": None, "profile": 3, "device": "auto",
    }  # fmt: skip
    command("train", "--config", "c", "--init-from", "old.pt")
    assert seen.pop()["init_from"] == Path("old.pt")
    command("train", "--final", "runs/best")
    assert seen.pop()["final"] == Path("runs/best")


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        (["max_epochs=2"], "continue with `tron train --resume runs/a max_epochs=4`"),
        (["max_epochs=2", "lr_schedule=cosine"], "train again with max_epochs=4"),
        (["max_epochs=2", "lr=1e-12"], None),  # the first epoch stays the best
        (["max_epochs=1"], None),
    ],
)
def test_a_run_that_ends_while_it_improves_says_what_may_help(
    shop: list[str],
    command: Command,
    tmp_path: Path,
    settings: list[str],
    cure: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = iter([0.1, 0.2, 0.3, 0.25])
    if "lr=1e-12" not in settings:
        monkeypatch.setattr(
            "tron_cli.training.start.validate", lambda *_: {"R@5": next(values), "nDCG@5": 0.1}
        )
    code, _, err = command("train", *shop, "--name", "a", *settings, "val_metric=R@5")
    assert code == 0, err
    line = f"the last epoch was the best: more epochs may improve R@5; {cure}"
    assert (line in err.replace(f"{tmp_path}/", "")) == (cure is not None)
    assert ("more epochs" in err) == (cure is not None)
    if cure and "resume" in cure:  # as advised; the last epoch is not the best any more
        words = ["--resume", tmp_path / "runs" / "a", "max_epochs=4", *shop[2:4]]
        code, _, err = command("train", *words, "--device", "cpu")
        assert code == 0, err
        assert "more epochs" not in err
