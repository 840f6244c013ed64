"""Exit codes and the one sentence that a failed command prints."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_lines import Command, is_one_sentence


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
        (["evaluate"], "CKPT"),
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
        assert "device" in err
        assert is_one_sentence(err)


def test_evaluating_does_without_torchs_compiler(
    shop: list[str], command: Command, tmp_path: Path
) -> None:
    """Its import takes a second or more, and torch.optim brings it along; also with a last.pt,
    whose rows have moves to make."""
    words = ["--name", "a", "optimizer=row_adam", "max_epochs=1"]
    assert command("train", *shop, *words)[0] == 0
    script = (
        "import sys; from tron_cli.cli import _run\n"
        "assert _run(sys.argv[1:], debug=True) == 0\n"
        "print(sorted({'torch._dynamo', 'torch._inductor'} & set(sys.modules)))"
    )
    last = tmp_path / "runs" / "a" / "last.pt"
    places = shop[shop.index("--data-dir") :][:2]
    done = subprocess.run(
        [sys.executable, "-c", script, "evaluate", str(last), *places, "--device", "cpu"],
        capture_output=True,
        text=True,
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
    """Like the error of polars when its Rust code panics, this is no Exception."""


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
