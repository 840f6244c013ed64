"""The command line: exit codes, one sentence for an error, results alone on stdout."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import random_sessions, tiny_settings, write_dataset

import tron_cli
from tron_cli.checkpoint import load_checkpoint
from tron_cli.config import FIELDS, packaged_configs
from tron_cli.data.dataset import Dataset
from tron_cli.evaluation.evaluate import EvaluationOptions

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shop(tmp_path: Path) -> list[str]:
    """A small dataset and a config for it: the options that name them."""
    rng = np.random.default_rng(5)
    write_dataset(
        tmp_path / "data",
        train=random_sessions(rng, 40, 30),
        val=random_sessions(rng, 20, 30),
        test=random_sessions(rng, 30, 30, longest=12),
        num_items=30,
        lost_predictions=3,
    )
    words = ", ".join(f"{key}={value!r}" for key, value in tiny_settings().items())
    (tmp_path / "config.py").write_text(
        f"from tron_cli.config import ExperimentConfig\nconfig = ExperimentConfig({words})\n"
    )
    return [
        "--config", str(tmp_path / "config.py"), "--data-dir", str(tmp_path / "data"),
        "--output-dir", str(tmp_path / "runs"), "--device", "cpu",
    ]  # fmt: skip


def is_one_sentence(err: str) -> bool:
    """The last line names the problem; Typer puts its usage lines before it."""
    lines = err.strip().splitlines()
    usage = [line for line in lines if re.match(r"Usage: |Try |$", line)]
    return "Traceback" not in err and len(lines) - len(usage) == 1


# ---- help and version -----------------------------------------------------------------------


def test_help_imports_nothing_heavy_and_answers_at_once() -> None:
    script = (
        "import sys, tron_cli.cli as cli\n"
        "sys.argv = ['tron', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'polars', 'ir_measures'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    seconds = []
    for _ in range(3):  # the best of three: other processes may be busy
        clock = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        seconds.append(time.perf_counter() - clock)
        assert done.returncode == 0, done.stderr
        for name in ("prepare", "train", "evaluate", "demo", "config"):
            assert re.search(rf"^\s+{name} ", done.stdout, re.MULTILINE)
        if seconds[-1] < 0.5:
            break
    assert min(seconds) < 1.0


@pytest.mark.parametrize("words", [[], ["train"], ["evaluate"], ["prepare"], ["config", "show"]])
def test_every_command_has_help(words: list[str], command: Command) -> None:
    code, out, _ = command(*words, "--help")
    assert code == 0
    assert "Usage: " in out


def test_version(command: Command) -> None:
    assert command("--version") == (0, f"tron {tron_cli.__version__}\n", "")


def test_python_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tron_cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"tron {tron_cli.__version__}\n"


# ---- shell completion -----------------------------------------------------------------------


@pytest.fixture
def completions(command: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Words that bash offers for the last word of a command line."""

    def complete(line: str) -> list[str]:
        monkeypatch.setenv("_TRON_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
        code, out, err = command()
        assert (code, err) == (0, "")
        return out.split()

    return complete


def test_tab_completes_commands_options_configs_and_settings(
    completions: Callable[[str], list[str]],
) -> None:
    assert completions("tron ev") == ["evaluate"]
    assert completions("tron prepare di") == ["diginetica"]
    assert completions("tron compare a.pt --filt") == ["--filter-rated"]
    assert completions("tron evaluate a.pt --protocol ") == ["every-step", "last-item"]
    assert completions("tron train --config config_ml1m_s") == ["config_ml1m_sasrec"]
    assert completions("tron config show config_ml1m_s") == ["config_ml1m_sasrec"]
    assert completions("tron train --config config_otto embedding_") == ["embedding_dim=200"]
    names = [word.partition("=")[0] for word in completions("tron train lr=1 ")]
    assert names == list(FIELDS)
    assert completions("tron demo positions=") == [
        "positions=end", "positions=start", "positions=none"
    ]  # fmt: skip
    assert completions("tron demo positions=s") == ["positions=start"]
    assert completions("tron demo lr=1 positions = s") == ["start"], "as bash splits the word"
    assert completions("tron demo lr = s") == []
    assert completions("tron demo = s") == []
    assert completions("tron demo metrics") == ["metrics="], "a default with spaces is no word"


def test_tab_runs_no_plugin(completions: Callable[[str], list[str]], tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    assert completions(f"tron train --plugin {plugin}:Mine --devi") == ["--device"]
    assert not (tmp_path / "ran").exists()


# ---- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fly"], "fly"),
        (["train", "--wings", "2"], "--wings"),
        (["train"], "--config"),
        (["train", "--config", "config_otto", "--resume", "runs/a"], "--resume"),
        (["train", "--config", "config_oto"], "did you mean config_otto"),
        (["train", "--config", "config_otto", "learning_rat=1"], "learning_rat"),
        (["train", "--config", "config_otto", "embedding_dimm=1"], "did you mean embedding_dim"),
        (["train", "--config", "config_otto", "lr=fast"], "lr must be a number, got 'fast'"),
        (["train", "--config", "config_otto", "lr=-1"], "lr must be above 0"),
        (["train", "--config", "config_otto", "lr"], "key=value"),
        (["train", "--config", "config_otto", "lr=1", "lr=2"], "twice"),
        (["train", "--config", "config_otto", "metrics=nDCG"], "cutoff"),
        (["train", "--config", "config_otto", "--data-dir", "nowhere"], "tron prepare"),
        (["train", "--resume", "nowhere"], "nothing to resume"),
        (["train", "--resume", "runs/a", "--name", "b"], "leave out --name"),
        (["train", "--resume", "runs/a", "--output-dir", "b"], "leave out --name"),
        (["evaluate", "nowhere.pt"], "nowhere.pt"),
        (["evaluate"], "checkpoint"),
        (["evaluate", "a.pt", "--split", "train"], "--split"),
        (["evaluate", "a.pt", "--protocol", "sideways"], "--protocol"),
        (["evaluate", "a.pt", "--limit-sessions", "0"], "--limit-sessions"),
        (["config", "show", "nothing"], "nothing"),
        (["config", "show", "config_otto", "sed=1"], "did you mean seed"),
        (["prepare", "netflix"], "netflix"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(
    words: list[str], says: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*words)
    assert code == 2
    assert out == ""
    assert says in err
    assert is_one_sentence(err)
    assert list(tmp_path.iterdir()) == []


def test_measures_are_checked_before_training_and_ranking(
    shop: list[str], command: Command, tmp_path: Path
) -> None:
    code, _, err = command("train", *shop, "metrics=Recal@5", "max_epochs=1")
    assert code == 2
    assert "Recal" in err
    assert is_one_sentence(err)


def test_an_unknown_device_is_one_sentence(shop: list[str], command: Command) -> None:
    for device in ("gpu", "cuda:77", ""):
        code, _, err = command("train", *shop[:-1], device)
        assert code == 2
        assert "--device" in err
        assert is_one_sentence(err)


def test_training_does_without_torchs_compiler(shop: list[str]) -> None:
    """Its import takes a second or more of a start, and torch.optim brings it along."""
    script = (
        "import sys; from tron_cli.cli import _run\n"
        "for optimizer in ('adam', 'row_adam', 'adagrad'):\n"
        "    words = ['--name', optimizer, f'optimizer={optimizer}', 'max_epochs=1']\n"
        "    assert _run([*sys.argv[1:], *words], debug=True) == 0\n"
        "print(sorted({'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "train", *shop], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_failed_run_exits_with_1(shop: list[str], command: Command) -> None:
    code, out, err = command("train", *shop, "lr=1e30")
    assert (code, out) == (1, "")
    assert "lower lr" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("place", ["first", "last"])
def test_debug_shows_the_traceback(place: str, command: Command) -> None:
    words = ["config", "show", "nothing"]
    code, _, err = command(*(["--debug", *words] if place == "first" else [*words, "--debug"]))
    assert code == 2
    assert "Traceback" in err
    assert "no config 'nothing'" in err.splitlines()[-1]


class Panic(BaseException):
    """What polars raises where its Rust code panics is no Exception either."""


OUT_OF_DEVICE_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
OUT_OF_HOST_MEMORY = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 4000000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
FAILURES = [
    (RuntimeError("inner failure"), "RuntimeError: inner failure"),
    (KeyError("a key"), "KeyError: 'a key'"),
    (Panic("index out of range\nbacktrace:\n 0: rust"), "Panic: index out of range backtrace:"),
    (ValueError("x" * 10_000), "ValueError: xxx"),
    (OUT_OF_DEVICE_MEMORY, "the GPU is out of memory"),
    (OUT_OF_HOST_MEMORY, "the machine is out of memory"),
    (MemoryError(), "the machine is out of memory"),
    (RuntimeError("out of memory is a phrase in my data"), "RuntimeError: out of memory is a"),
    (PermissionError(13, "Permission denied", "/some/file"), "Permission denied: /some/file"),
]


def raising(error: BaseException) -> Callable[..., Any]:
    def broken(*_args: object, **_named: object) -> None:
        raise error

    return broken


def named_log(err: str) -> Path:
    found = re.search(r"the traceback is in (\S+)$", err.strip())
    assert found, err
    return Path(found[1])


@pytest.mark.parametrize(("error", "says"), FAILURES, ids=lambda value: type(value).__name__)
def test_an_unexpected_failure_names_the_file_of_its_traceback(
    error: BaseException,
    says: str,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Commands without a run's folder write to a new file of the user's own."""
    monkeypatch.setattr("tron_cli.config.packaged_configs", raising(error))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, out, err = command("config", "list")
    assert (code, out) == (1, "")
    assert says in err
    assert is_one_sentence(err)
    assert len(err.removeprefix("tron: ").strip()) <= 500
    log = named_log(err)
    assert log.parent == tmp_path
    assert log.stat().st_mode & 0o077 == 0
    text = log.read_text()
    assert "Traceback" in text
    assert type(error).__name__ in text
    assert "config list" in text


@pytest.mark.parametrize(("error", "says"), FAILURES[:6], ids=lambda value: type(value).__name__)
def test_the_traceback_of_a_failed_training_is_in_the_log_of_the_run(
    error: BaseException,
    says: str,
    shop: list[str],
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tron_cli.training.step.training_loss", raising(error))
    code, out, err = command("train", *shop, "--name", "a")
    assert (code, out) == (1, "")
    last = err.strip().splitlines()[-1]
    assert says in last
    assert "Traceback" not in err
    assert named_log(last) == tmp_path / "runs" / "a" / "train.log"
    text = named_log(last).read_text()
    assert "sessions, 30 items" in text, "what was logged before stays"
    assert "in training_step" in text
    assert type(error).__name__ in text


def test_a_traceback_that_cannot_be_written_can_be_shown(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("tron_cli.config.packaged_configs", raising(RuntimeError("inner failure")))
    with monkeypatch.context() as disk:
        disk.setattr("tempfile.NamedTemporaryFile", raising(full))
        code, _, err = command("config", "list")
    assert code == 1
    assert "inner failure" in err
    assert "--debug" in err
    assert is_one_sentence(err)


def test_torch_says_what_we_expect_where_memory_ends() -> None:
    from tron_cli.errors import sentence_of

    with pytest.raises(RuntimeError) as failure:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert sentence_of(failure.value).startswith("the machine is out of memory")


# ---- config ---------------------------------------------------------------------------------


def test_config_show_tells_where_every_value_came_from(command: Command) -> None:
    code, out, _ = command("config", "show", "config_otto", "lr=0.01", "positions=start")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines()[2:]}
    assert set(rows) == set(FIELDS)
    assert rows["lr"].split()[1:] == ["0.01", "command", "line"]
    assert rows["dataset_name"].split()[1:] == ["otto", "config_otto.py"]
    assert rows["embedding_dim"].split()[1:] == ["200", "default"]


def test_config_show_explains_every_setting(command: Command) -> None:
    code, out, _ = command("config", "show", "config_otto", "lr=0.01", "--explain")
    assert code == 0
    rows = [line.split() for line in out.splitlines()[2:] if not line.startswith(" ")]
    assert [row[0] for row in rows] == list(FIELDS)
    assert ["lr", "0.01", "0.0005"] in rows
    assert "\n  peak learning rate [above 0]\n" in out
    assert "\n  sessions per step [at least 1 (sessions)]\n" in out
    assert max(len(line) for line in out.splitlines() if line.startswith(" ")) <= 100

    code, out, _ = command("config", "show", "config_otto", "lr=0.01", "--explain", "--json")
    assert code == 0
    assert json.loads(out)["lr"] == {
        "value": 0.01, "default": "0.0005", "allowed": "above 0", "meaning": "peak learning rate",
    }  # fmt: skip


def test_config_list_names_what_config_show_takes(command: Command) -> None:
    _, out, _ = command("config", "list")
    assert out.split() == packaged_configs()
    for name in out.split():
        assert command("config", "show", name)[0] == 0


# ---- train and evaluate ---------------------------------------------------------------------


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
    while len(list(meeting.iterdir())) < 3:
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
        for seed in range(3)
    ]  # fmt: skip
    printed = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], printed
    best = [Path(out.strip()) for out, _ in printed]
    assert len({path.parent for path in best}) == 3
    assert [load_checkpoint(path).config.seed for path in best] == [0, 1, 2]


def test_nobody_else_may_write_to_the_folder_of_a_run(
    shop: list[str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither --resume nor --name, until it ends; a process that was killed holds nothing."""
    best = Path(command("train", *shop, "--name", "a")[1].strip())
    run = best.parent
    hold = (
        "import sys; from pathlib import Path; from tron_cli.files import locked\n"
        f"with locked(Path({str(run)!r}) / '.lock', 'taken'): print('held', flush=True); input()"
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
        assert "another tron train writes to" in err
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
    code, _, err = command("train", *shop, "--name", "thesis")
    assert code == 2
    assert "it holds chapter.partial" in err
    (Path(out.strip()).parent / "notes.partial").mkdir()
    assert command("train", "--resume", Path(out.strip()).parent, *shop[2:4])[0] == 0
    assert sorted(path.name for path in mine.iterdir()) == ["chapter.partial"]


def test_evaluate_json_is_one_object_with_the_promised_keys(
    shop: list[str], command: Command, tmp_path: Path
) -> None:
    best = command("train", *shop)[1].strip()
    data = shop[2:4]
    code, out, _ = command("evaluate", best, *data, "--json", "--metrics", "R@20 RR@20 nDCG@10")
    assert code == 0
    assert out.count("\n") == 1
    report = json.loads(out)
    promised = "metrics protocol split events sessions items checkpoint dataset"
    assert set(promised.split()) <= set(report)
    assert list(report["metrics"]) == ["R@20", "RR@20", "nDCG@10"]
    for figure in report["metrics"].values():
        assert {"value", "stderr"} <= set(figure)
        assert 0 <= figure["value"] <= 1
    assert (report["protocol"], report["split"]) == ("every-step", "test")
    assert (report["sessions"], report["items"], report["dataset"]) == (30, 30, "tiny")
    assert report["checkpoint"] == best


def test_evaluate_prints_a_table_with_what_it_rests_on(shop: list[str], command: Command) -> None:
    best = command("train", *shop)[1].strip()
    code, out, _ = command(
        "evaluate", Path(best).parent, *shop[2:4], "--one-pass", "--limit-sessions", 9
    )
    assert code == 0
    facts = ["R@5", "std. error", "every-step", "test split", "one pass", "ranked above"]
    for fact in (*facts, "9 sessions", "beyond the limit"):
        assert fact in out
    _, out, _ = command("evaluate", best, *shop[2:4])
    for fact in ("3 events whose item training lacks", "--full-sessions also gives", best):
        assert fact in out
    assert "lost as misses" not in out
    _, out, _ = command("evaluate", best, *shop[2:4], "--full-sessions")
    assert "lost as misses" in out


@pytest.mark.parametrize("option", ["--run", "--qrels"])
def test_evaluate_refuses_a_file_it_cannot_write(
    option: str, shop: list[str], command: Command, tmp_path: Path
) -> None:
    best = command("train", *shop, "max_epochs=1")[1].strip()
    for place in (tmp_path, tmp_path / "no" / "file"):
        code, out, err = command("evaluate", best, *shop[2:4], option, place)
        assert (code, out) == (2, "")
        assert "cannot write" in err
        assert is_one_sentence(err)


def test_a_checkpoint_needs_its_dataset_only(
    shop: list[str], command: Command, tmp_path: Path
) -> None:
    best = Path(command("train", *shop)[1].strip())
    before = json.loads(command("evaluate", best, *shop[2:4], "--json")[1])
    (tmp_path / "config.py").unlink()
    moved = best.rename(tmp_path / "moved.pt")
    after = json.loads(command("evaluate", moved, *shop[2:4], "--json")[1])
    assert after["metrics"] == before["metrics"]
    code, _, err = command("evaluate", moved, "--data-dir", tmp_path / "elsewhere")
    assert code == 2
    assert "elsewhere" in err


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
        (["--name", ""], "--name must be a folder name"),
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


# ---- every option arrives -------------------------------------------------------------------


def test_demo_writes_its_results_and_fails_where_the_model_learned_nothing(
    command: Command, tmp_path: Path
) -> None:
    code, out, err = command(
        "demo", "--data-dir", tmp_path / "data", "--output-dir", tmp_path / "runs",
        "max_epochs=1", "max_batches_per_epoch=1", "embedding_dim=4", "limit_val_batches=1e-3",
    )  # fmt: skip
    assert code == 1
    assert "of the best possible R@20 instead of 90 %" in err
    found = json.loads((tmp_path / "runs" / "demo.json").read_text())
    assert list(found) == ["model", "best", "markov", "popularity"]
    info = json.loads((tmp_path / "data" / "demo" / "dataset.json").read_text())
    for name, figures in info["references"]["test"].items():
        assert found[name]["R@20"]["value"] == figures["R@20"]
    assert f"{found['model']['R@20']['value']:.4f}" in out


def test_demo_leaves_a_dataset_of_that_name_alone_which_it_did_not_make(
    command: Command, tmp_path: Path
) -> None:
    write_dataset(tmp_path, name="demo", train=[[2, 1, 2]], source="synthetic", options={"seed": 1})
    code, _, err = command("demo", "--data-dir", tmp_path, "--output-dir", tmp_path / "runs")
    assert code == 2
    assert "a dataset of your own" in err
    assert is_one_sentence(err)
    assert Dataset.open(tmp_path / "demo").split("train")[0].tolist() == [2, 1, 2]


def test_every_option_of_evaluate_arrives(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[Any, ...]] = []

    def run_evaluation(*words: Any) -> dict[str, Any]:
        seen.append(words)
        return {}

    monkeypatch.setattr("tron_cli.cli.evaluate.run_evaluation", run_evaluation)
    monkeypatch.setattr("tron_cli.cli.evaluate.evaluation_text", lambda _: "")
    assert command("evaluate", "a.pt")[0] == 0
    assert seen.pop() == (Path("a.pt"), None, EvaluationOptions(), Path("datasets"), "auto")
    assert command(
        "evaluate", "a.pt", "--dataset", "shop", "--split", "val", "--protocol", "last-item",
        "--metrics", "R@3", "--filter-rated", "--full-sessions", "--one-pass",
        "--limit-sessions", 7, "--run", "r", "--qrels", "q", "--data-dir", "d", "--device", "cpu",
        "--sample-sessions", 3, "--seed", 4, "--per-event", "e.csv", "--by", "repeat",
        "--by", "length", "--cutoff", 5,
    )[0] == 0  # fmt: skip
    options = EvaluationOptions(
        split="val", protocol="last-item", metrics="R@3", filter_rated=True, full_sessions=True,
        one_pass=True, limit_sessions=7, run=Path("r"), qrels=Path("q"),
        sample_sessions=3, seed=4, per_event=Path("e.csv"), by=("repeat", "length"), cutoff=5,
    )  # fmt: skip
    assert seen.pop() == (Path("a.pt"), "shop", options, Path("d"), "cpu")
    command("evaluate", "a.pt", "--no-filter-rated")
    assert seen.pop()[2] == EvaluationOptions(filter_rated=False)


def test_every_option_of_compare_arrives(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def compare_models(*words: Any, **named: Any) -> dict[str, Any]:
        seen.append((*words, named))
        return {}

    monkeypatch.setattr("tron_cli.checkpoint.load_checkpoint", lambda path: path)
    monkeypatch.setattr("tron_cli.data.dataset.Dataset.open", lambda path: path)
    monkeypatch.setattr("tron_cli.evaluation.compare.compare", compare_models)
    code, out, _ = command(
        "compare", "a.pt", "b.pt", "--dataset", "shop", "--split", "val",
        "--protocol", "every-step", "--metrics", "R@3", "--no-filter-rated", "--full-sessions",
        "--limit-sessions", 7, "--sample-sessions", 3, "--seed", 4, "--drop-unknown",
        "--reference", 2, "--cutoff", 5, "--data-dir", "d", "--device", "cpu", "--json",
    )  # fmt: skip
    assert (code, out) == (0, "{}\n")
    options = EvaluationOptions(
        split="val", protocol="every-step", metrics="R@3", filter_rated=False, full_sessions=True,
        limit_sessions=7, sample_sessions=3, seed=4, drop_unknown=True,
    )  # fmt: skip
    named = {"reference": 1, "cutoff": 5}
    paths = [Path("a.pt"), Path("b.pt")]
    assert seen == [(paths, Path("d/shop"), options, torch.device("cpu"), named)]


def test_every_option_of_train_arrives(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[Any, ...]] = []

    def run_training(*words: Any) -> Path:
        seen.append(words)
        return Path("best.pt")

    monkeypatch.setattr("tron_cli.cli.train.run_training", run_training)
    code, out, _ = command("train", "--config", "c", "lr=1", "--data-dir", "d", "--output-dir", "o",
                           "--name", "n", "--device", "cpu", "seed=2")  # fmt: skip
    assert (code, out) == (0, "best.pt\n")
    assert seen.pop() == ("c", ["lr=1", "seed=2"], Path("d"), Path("o"), "n", None, "cpu", None)
    command("train", "--resume", "r")
    assert seen.pop() == (None, [], Path("datasets"), None, None, Path("r"), "auto", None)
