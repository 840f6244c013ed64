"""`tron_cli.train` from Python: results, overrides, threads, interruption, bad input."""

from __future__ import annotations

import asyncio
import inspect
import json
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.datasets import cyclic_sessions, tiny_settings, write_dataset
from helpers.runs import check_same_run, interrupt_at

from tron_cli.api.settings import load_config
from tron_cli.api.training import TrainingResult, train
from tron_cli.checkpoint import load_checkpoint
from tron_cli.config import FIELDS, ExperimentConfig
from tron_cli.errors import InputError, RunError
from tron_cli.training import step as step_module

CONFIG = ExperimentConfig(**tiny_settings(max_epochs=3))
STEPS_PER_EPOCH = 6  # 45 sessions in batches of 8


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    splits = {"train": cyclic_sessions(45, 1), "val": cyclic_sessions(9, 2)}
    write_dataset(tmp_path / "data", **splits, test=cyclic_sessions(9, 3))
    return tmp_path / "data"


@pytest.fixture
def run(data_dir: Path, tmp_path: Path) -> Callable[..., TrainingResult]:
    """Train in a folder of this test, by default with CONFIG."""

    def trained(config: Any = CONFIG, **options: Any) -> TrainingResult:
        place = {"output_dir": tmp_path / "runs", "name": "run", "device": "cpu"}
        return train(config, data_dir=data_dir, **{**place, **options})

    return trained


def test_the_result_is_that_of_the_run(run: Callable[..., TrainingResult], tmp_path: Path) -> None:
    found = run()
    assert found.run_dir == tmp_path / "runs" / "run"
    rows = [json.loads(row) for row in (found.run_dir / "metrics.jsonl").read_text().splitlines()]
    validations = [row for row in rows if "validation" in row]
    best = max(validations, key=lambda row: row["validation"]["R@5"])
    assert (found.step, found.metrics) == (best["step"], best["validation"])
    assert (found.steps, found.epochs) == (3 * STEPS_PER_EPOCH, 3)
    assert found.checkpoint.parent == found.run_dir
    assert load_checkpoint(found.checkpoint).metrics == found.metrics
    assert found.profile is None
    with pytest.raises(AttributeError):
        found.step = 7  # type: ignore[misc]


def test_settings_override_a_config_a_file_and_a_packaged_config(
    run: Callable[..., TrainingResult], tmp_path: Path
) -> None:
    settings = tiny_settings()
    file = tmp_path / "mine.py"
    words = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    file.write_text(
        f"from tron_cli.config import ExperimentConfig\nconfig = ExperimentConfig({words})"
    )
    given = {"CONFIG": (CONFIG, {}), "file": (file, {}), "text": (str(file), {})}
    given["packaged"] = ("config_synthetic", settings)
    for name, (config, changes) in given.items():
        found = run(config, name=name, **{**changes, "max_epochs": 1, "lr": 1})
        used = load_checkpoint(found.checkpoint).config
        assert (used.max_epochs, used.lr, used.embedding_dim, found.epochs) == (1, 1.0, 8, 1)


def test_a_baseline_has_no_steps(run: Callable[..., TrainingResult]) -> None:
    found = run(model="markov")
    assert (found.step, found.steps, found.epochs) == (0, 0, 0)
    assert found.metrics.keys() == {"R@5", "RR@5"}


def test_a_profile_comes_with_the_result(run: Callable[..., TrainingResult]) -> None:
    found = run(profile=2)
    assert found.profile is not None
    assert found.profile.steps == 2
    assert found.checkpoint.name == "last.pt"


def test_no_setting_has_the_name_of_an_option() -> None:
    options = {*inspect.signature(train).parameters, *inspect.signature(load_config).parameters}
    assert not options & FIELDS.keys()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (None, {}, "either --config NAME .* or --final"),
        (CONFIG, {"resume": "run"}, "either --config NAME .* or --final"),
        (5, {}, "config must be a path or ExperimentConfig or None, got 5"),
        ("config_syntetic", {}, "no config 'config_syntetic': .* did you mean config_synthetic"),
        (CONFIG, {"max_epoch": 1}, "unknown setting 'max_epoch'; did you mean max_epochs"),
        (CONFIG, {"max_epochs": "3"}, "max_epochs must be a whole number, got '3'"),
        (CONFIG, {"max_epochs": True}, "max_epochs must be a whole number, got True"),
        ("config_synthetic", {"lr": "fast"}, "lr must be a number, got 'fast'"),
        (CONFIG, {"dataset_name": "none"}, "none"),
        (CONFIG, {"output_dir": 5}, "output_dir must be a path or None, got 5"),
        (CONFIG, {"name": 5.5}, "name must be text or None, got 5.5"),
        (CONFIG, {"name": "a/b"}, "--name must be a folder name"),
        (CONFIG, {"profile": 0}, "profile must be a number of steps, at least 1, got 0"),
        (
            CONFIG,
            {"plugins": "mine.py:Mine"},
            "plugins must be a list, each text, got 'mine.py:Mine'",
        ),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_no_folder(
    run: Callable[..., TrainingResult],
    tmp_path: Path,
    config: Any,
    options: dict[str, Any],
    message: str,
) -> None:
    if "resume" in options:
        options |= {"name": None, "output_dir": None}
    with pytest.raises(InputError, match=message):
        run(config, **options)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("device", [7, "gpu", None])
def test_a_device_that_is_none(run: Callable[..., TrainingResult], device: Any) -> None:
    with pytest.raises(InputError, match=r"device must be (text|auto, cpu, cuda or cuda:N)"):
        run(device=device)


def test_a_thread_trains_the_same_weights_and_touches_no_signal(
    run: Callable[..., TrainingResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(name="main")
    handlers: list[Any] = []
    original = step_module.training_loss

    def watched(*arguments: Any, **options: Any) -> Any:
        handlers.append(signal.getsignal(signal.SIGINT))
        return original(*arguments, **options)

    monkeypatch.setattr(step_module, "training_loss", watched)
    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(run, name="thread").result()
    assert set(handlers) == {before}
    check_same_run(found.run_dir, expected.run_dir)


def test_training_works_beside_a_running_event_loop(run: Callable[..., TrainingResult]) -> None:
    """A notebook runs one."""

    async def cell() -> TrainingResult:
        return run(max_epochs=1)

    assert asyncio.run(cell()).epochs == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_can_be_resumed(
    run: Callable[..., TrainingResult],
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    expected = run(name="whole")
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8, number)
        with pytest.raises(RunError, match="stopped at step 8 of 18 and saved"):
            run(name="stopped")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    folder = expected.run_dir.with_name("stopped")
    assert load_checkpoint(folder / "last.pt").step == 8
    found = train(resume=folder, data_dir=data_dir, device="cpu")
    check_same_run(found.run_dir, expected.run_dir, same_log=False)
    assert (found.steps, found.epochs, found.metrics) == (18, 3, expected.metrics)


def test_a_keyboard_interrupt_in_a_step_leaves_the_last_save(
    run: Callable[..., TrainingResult], data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C raises it, or a debugger."""
    expected = run(name="whole")
    before = signal.getsignal(signal.SIGINT)
    original, calls = step_module.training_loss, 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "training_loss", failing)
        with pytest.raises(KeyboardInterrupt):
            run(name="stopped")
    assert signal.getsignal(signal.SIGINT) is before
    found = train(
        resume=expected.run_dir.with_name("stopped"), data_dir=data_dir, device="cpu", max_epochs=3
    )
    check_same_run(found.run_dir, expected.run_dir, same_log=False)


def test_a_resumed_run_keeps_its_settings(
    run: Callable[..., TrainingResult], data_dir: Path
) -> None:
    folder = run(max_epochs=1).run_dir
    with pytest.raises(InputError, match="a resumed run keeps its settings"):
        train(resume=folder, data_dir=data_dir, lr=0.1)
    with pytest.raises(InputError, match="stays in its folder"):
        train(resume=folder, data_dir=data_dir, name="other")
    assert train(resume=folder, data_dir=data_dir, device="cpu", max_epochs=2).epochs == 2


def test_a_second_training_in_the_process_is_refused_and_harms_nothing(
    run: Callable[..., TrainingResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(name="alone")
    inside, go_on = threading.Event(), threading.Event()
    original = step_module.training_loss

    def waiting(*arguments: Any, **options: Any) -> Any:
        inside.set()
        assert go_on.wait(30)
        return original(*arguments, **options)

    monkeypatch.setattr(step_module, "training_loss", waiting)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run, name="first")
        assert inside.wait(30)
        with pytest.raises(InputError, match="another training is under way in this process"):
            run(name="second")
        go_on.set()
        found = first.result()
    check_same_run(found.run_dir, expected.run_dir)
    assert not expected.run_dir.with_name("second").exists()
    run(name="third")


def test_nothing_is_printed_on_stdout(
    run: Callable[..., TrainingResult], capfd: pytest.CaptureFixture[str]
) -> None:
    run(max_epochs=1)
    assert capfd.readouterr().out == ""
