"""One seed, one result: also for a run that was killed, interrupted and resumed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import random_sessions, tiny_settings, write_dataset
from helpers.runs import (
    check_same_run,
    die_in_step,
    in_process,
    interrupt_at,
    logged,
    resume,
    same_values,
    start,
    start_or_resume,
    write_config,
)

from tron_cli.checkpoint import encode_item_ids, load_checkpoint
from tron_cli.config import ExperimentConfig
from tron_cli.data.dataset import Dataset
from tron_cli.errors import InputError, RunError
from tron_cli.evaluation.evaluate import EvaluationOptions, assess
from tron_cli.models.base import build_model
from tron_cli.training import start as start_module
from tron_cli.training.loop import InterruptedRunError, train
from tron_cli.training.optim import build_optimizer
from tron_cli.training.run import Progress, RunFolder
from tron_cli.training.start import training_splits

CPU = torch.device("cpu")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    rng = np.random.default_rng(5)
    write_dataset(
        tmp_path / "data",
        train=random_sessions(rng, 45, 30),
        val=random_sessions(rng, 20, 30),
        test=random_sessions(rng, 5, 30),
        num_items=30,
    )
    return tmp_path / "data"


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
@pytest.mark.parametrize("sampling_style", ["eventwise", "batchwise"])
def test_one_seed_gives_identical_weights(
    optimizer: str, sampling_style: str, data_dir: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, optimizer=optimizer, sampling_style=sampling_style)
    for name in ("a", "b"):
        torch.rand(len(name + optimizer))  # whatever happened before in the process
        start(config, data_dir, tmp_path / "runs", name)
    check_same_run(tmp_path / "runs" / "a", tmp_path / "runs" / "b")
    other = write_config(tmp_path, optimizer=optimizer, seed=1)
    start(other, data_dir, tmp_path / "runs", "c")
    a, c = (load_checkpoint(tmp_path / "runs" / name / "last.pt").weights for name in "ac")
    assert not same_values(a, c)


@pytest.mark.parametrize(
    ("windows", "model"),
    [("random", "sasrec"), ("prefixes", "sasrec"), ("random", "bert4rec"), ("all", "bert4rec")],
)
def test_windows_of_a_stopped_and_resumed_run_are_those_of_a_whole_one(
    windows: str, model: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(
        tmp_path, model=model, sequence_length=3, training_windows=windows, max_epochs=2
    )
    start(config, data_dir, tmp_path / "runs", "whole")
    interrupt_at(monkeypatch, 5, signal.SIGINT)
    with pytest.raises(InterruptedRunError):
        start(config, data_dir, tmp_path / "runs", "stopped")
    resume(data_dir, tmp_path / "runs" / "stopped")
    check_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "stopped", same_log=False)


RECENT = {"shuffling_style": "shuffle_with_replacement"}


@pytest.mark.parametrize(
    ("protocol", "has_times", "setting", "problem"),
    [
        ("every-step", False, "recency_half_life_days", "which .* lacks; use recency_half_life_se"),
        ("last-item", False, "recency_half_life_days", "needs the times of .*; leave it out"),
        ("last-item", False, "recency_half_life_sessions", "histories of users; leave it out"),
        ("last-item", True, "recency_half_life_sessions", "users; use recency_half_life_days"),
        ("every-step", False, "recency_half_life_sessions", ""),
        ("every-step", True, "recency_half_life_sessions", ""),
        ("every-step", True, "recency_half_life_days", ""),
        ("last-item", True, "recency_half_life_days", ""),
    ],
)
def test_recency_needs_sessions_that_have_an_age(
    protocol: str, has_times: bool, setting: str, problem: str, data_dir: Path, tmp_path: Path
) -> None:
    folder = data_dir / "tiny"
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**info, "protocol": protocol}))
    if has_times:
        for split in ("train", "val", "test"):
            events = np.load(folder / split / "items.npy")
            np.save(folder / split / "times.npy", np.arange(len(events)) * 3_600_000)
    options = {**RECENT, setting: 3, "max_epochs": 1}
    config = write_config(tmp_path, **options)
    if not problem:
        start(config, data_dir, tmp_path / "runs", "run")
        return
    with pytest.raises(InputError, match=problem):
        start(config, data_dir, tmp_path / "runs", "run")
    assert not (tmp_path / "runs" / "run").exists()


def test_an_epoch_is_a_pass_over_all_windows_and_the_log_counts_them(
    data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lengths = Dataset.open(data_dir / "tiny").split("train").lengths
    prefixes = int((lengths - 1).sum())
    config = write_config(tmp_path, training_windows="prefixes", max_epochs=1)
    with caplog.at_level(logging.INFO, "tron"):
        start(config, data_dir, tmp_path / "runs", "run")
    steps = -(-prefixes // 8)
    assert load_checkpoint(tmp_path / "runs" / "run" / "last.pt").step == steps
    assert f"45 sessions ({prefixes} prefixes), 30 items" in caplog.text
    assert f"{steps} steps per epoch" in caplog.text


# ---- kill -9 --------------------------------------------------------------------------------


def die_at(event: int, config: Path, data_dir: Path, run_dir: Path) -> None:
    """Train or resume, and be killed just before the file operation number `event` of the run."""
    seen = 0

    def watch(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if name not in ("open", "os.rename", "os.remove"):
            return
        if not str(arguments[0]).startswith(str(run_dir)):
            return
        if seen == event:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    sys.addaudithook(watch)
    start_or_resume(config, data_dir, run_dir)


@pytest.fixture(scope="module")
def processes() -> Iterator[Any]:
    """Processes that share the imports; each can be killed."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs processes that can be killed")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tron_cli.training.loop", Path(__file__).stem, "helpers.runs"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, Path(__file__).parents[:2])))
        yield context


@pytest.mark.slow
def test_killed_before_any_file_operation_and_resumed_ends_the_same(
    processes: Any, tmp_path: Path
) -> None:
    # Next is item + 1, and validation is on training sessions: the second epoch is better than the
    # first, whose checkpoint is deleted.
    rng = np.random.default_rng(5)
    rows = [[(a + k) % 30 + 1 for k in range(n)] for a, n in rng.integers(2, 10, (45, 2))]
    data_dir = tmp_path / "data"
    write_dataset(data_dir, train=rows, val=rows[:20], test=rows[:1], num_items=30)
    config = write_config(tmp_path, max_epochs=2, dropout_rate=0.0)
    best = start(config, data_dir, tmp_path / "runs", "whole")
    assert "step=12-" in best.name
    run_dir = tmp_path / "runs" / "killed"
    failures = {}
    for event in range(200):
        shutil.rmtree(run_dir, ignore_errors=True)
        if in_process(processes, die_at, event, config, data_dir, run_dir) == 0:
            break
        start_or_resume(config, data_dir, run_dir)
        try:
            check_same_run(run_dir, tmp_path / "runs" / "whole")
        except AssertionError as error:
            failures[f"killed before file operation {event}"] = str(error)
    assert 20 < event < 199
    assert not failures


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_killed_several_times_at_random_steps_and_resumed_ends_the_same(
    optimizer: str, processes: Any, data_dir: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(len(optimizer))
    config = write_config(tmp_path, optimizer=optimizer, shuffling_style="shuffle_with_replacement")
    start(config, data_dir, tmp_path / "runs", "whole")
    run_dir = tmp_path / "runs" / "killed"
    kills = 0
    while kills < 12:  # at most 6 of the 18 steps are done between two kills
        step = int(rng.integers(2, 8))
        if in_process(processes, die_in_step, step, config, data_dir, run_dir) == 0:
            break
        kills += 1
    start_or_resume(config, data_dir, run_dir)
    assert kills >= 3
    check_same_run(run_dir, tmp_path / "runs" / "whole")


@pytest.mark.parametrize(("minutes", "saved"), [(1e-9, 10), (1e9, 6), (0.0, 6)])
def test_last_is_written_by_the_clock_and_weights_do_not_depend_on_it(
    minutes: float, saved: int, processes: Any, data_dir: Path, tmp_path: Path
) -> None:
    """A kill in step 12 loses what came after the last line of the log, or after the epoch."""
    config = write_config(tmp_path, optimizer="row_adam", save_every=0, save_minutes=minutes)
    config_without = write_config(tmp_path / "data", optimizer="row_adam", save_every=0)
    start(config_without, data_dir, tmp_path / "runs", "whole")
    run_dir = tmp_path / "runs" / "killed"
    assert in_process(processes, die_in_step, 12, config, data_dir, run_dir, 5) == -signal.SIGKILL
    assert load_checkpoint(run_dir / "last.pt").step == saved
    resume(data_dir, run_dir)
    weights = [
        load_checkpoint(run / "last.pt").weights for run in (run_dir, run_dir.parent / "whole")
    ]
    assert same_values(*weights)


# ---- Ctrl-C ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 5, 6, 7, 17])
def test_interrupted_saves_says_how_to_resume_and_ends_the_same(
    step: int, number: int, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, save_every=0)
    start(config, data_dir, tmp_path / "runs", "whole")
    run_dir = tmp_path / "runs" / "stopped"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interrupt_at(monkeypatch, step, number)
    with pytest.raises(InterruptedRunError) as stop:
        start(config, data_dir, run_dir.parent, run_dir.name)
    assert f"tron train --resume {run_dir}" in str(stop.value)
    assert load_checkpoint(run_dir / "last.pt").step == step
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.undo()
    resume(data_dir, run_dir)
    check_same_run(run_dir, tmp_path / "runs" / "whole", same_log=False)
    validations = [row for row in logged(run_dir) if "validation" in row]
    assert validations == [r for r in logged(tmp_path / "runs" / "whole") if "validation" in r]


def test_interrupted_in_the_last_step_is_finished(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, save_every=0)
    start(config, data_dir, tmp_path / "runs", "whole")
    interrupt_at(monkeypatch, 18, signal.SIGINT)
    start(config, data_dir, tmp_path / "runs", "stopped")
    check_same_run(tmp_path / "runs" / "stopped", tmp_path / "runs" / "whole")


# ---- what a run leaves and reads ------------------------------------------------------------


def test_a_resumed_run_can_go_on_for_more_epochs(data_dir: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, lr_schedule="constant")
    start(config, data_dir, tmp_path / "runs", "long")
    short = write_config(tmp_path, lr_schedule="constant", max_epochs=1)
    start(short, data_dir, tmp_path / "runs", "short")
    resume(data_dir, tmp_path / "runs" / "short", "max_epochs=3")
    long, short = tmp_path / "runs" / "long", tmp_path / "runs" / "short"
    a, b = load_checkpoint(long / "last.pt"), load_checkpoint(short / "last.pt")
    assert (a.step, b.step) == (18, 18)
    assert same_values(a.weights, b.weights)
    assert json.loads((short / "config.json").read_text())["max_epochs"] == 3


@pytest.mark.parametrize("begins_scaled", [False, True])
def test_a_run_goes_on_with_another_precision_and_its_scaler(
    begins_scaled: bool, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """precision=auto is float32 on one machine and fp16, which needs a scaler, on another."""
    import tron_cli.training.start as module

    config = write_config(tmp_path, max_epochs=1, lr_schedule="constant")

    def scaled(precision: str, device: torch.device) -> torch.dtype:
        return torch.float16

    with monkeypatch.context() as patch:
        if begins_scaled:
            patch.setattr(module, "_training_dtype", scaled)
        start(config, data_dir, tmp_path / "runs", "a")
    run_dir = tmp_path / "runs" / "a"
    assert bool(load_checkpoint(run_dir / "last.pt").training["scaler"]) == begins_scaled
    if not begins_scaled:
        monkeypatch.setattr(module, "_training_dtype", scaled)
    resume(data_dir, run_dir, "max_epochs=2")
    last = load_checkpoint(run_dir / "last.pt")
    assert last.step == 12
    assert bool(last.training["scaler"]) != begins_scaled


def test_a_cosine_that_starts_anew_says_both_rates(
    data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(write_config(tmp_path, max_epochs=2), data_dir, tmp_path / "runs", "a")
    run_dir = tmp_path / "runs" / "a"
    caplog.clear()
    resume(data_dir, run_dir)
    resume(data_dir, run_dir, "early_stopping_patience=9")
    assert all(record.levelno < logging.WARNING for record in caplog.records)
    resume(data_dir, run_dir, "max_epochs=4")
    # The rate of tiny_settings is 0.01: after 2 epochs of 2 it is 0, and of 4 it is half.
    (warning,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert "cosine" in warning.message
    assert "max_epochs=4" in warning.message
    assert "0.005, not at 0" in warning.message
    assert warning.message in (run_dir / "train.log").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_resumed_run_lets_go_of_the_file_that_it_read(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file keeps its room on the disk, also when last.pt has long been replaced."""
    import tron_cli.training.step as module

    start(write_config(tmp_path, max_epochs=1), data_dir, tmp_path / "runs", "a")
    mapped = []
    original = module.training_loss

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        mapped.append(str(tmp_path / "runs") in Path("/proc/self/maps").read_text())
        return original(*arguments, **options)

    monkeypatch.setattr(module, "training_loss", watched)
    resume(data_dir, tmp_path / "runs" / "a", "max_epochs=2")
    assert mapped == [False] * 6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (17, 3), (-1, -1)])
def test_weights_that_are_not_finite_are_not_saved(
    bad: float, place: tuple[int, int], data_dir: Path, tmp_path: Path
) -> None:
    config = ExperimentConfig(**tiny_settings())
    dataset = Dataset.open(data_dir / "tiny")
    model = build_model(config, dataset.num_items)
    optimizer = build_optimizer(config.optimizer, model.parameters(), config.lr)
    run = RunFolder(
        tmp_path / "run", config, dataset, encode_item_ids(dataset.item_ids),
        lambda: torch.zeros(dataset.num_items + 1, dtype=torch.int64), model, optimizer,
        torch.amp.GradScaler("cpu", enabled=False), Progress(),
    )  # fmt: skip
    run.save_last(0)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with torch.no_grad():
        model.item_embedding.weight[place] = bad
    for save in (run.save_last, lambda epoch: run.finish_epoch(epoch, {"R@5": 0.1})):
        with pytest.raises(RunError, match="not finite"):
            save(0)
    assert [path.name for path in (tmp_path / "run").glob("*.pt*")] == ["last.pt"]
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_checkpoints_hold_the_popularity_that_is_counted_once(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run takes it from last.pt, and counts again where an earlier version wrote that."""
    dataset = Dataset.open(data_dir / "tiny")
    config = ExperimentConfig(**tiny_settings(max_epochs=1))
    expected = np.bincount(dataset.split("train").items, minlength=31).tolist()
    run_dir = tmp_path / "run"
    best = train(config, dataset, run_dir, device=CPU)
    found = load_checkpoint(best).popularity
    assert found is not None
    assert found.tolist() == expected
    longer = dataclasses.replace(config, max_epochs=2)
    with monkeypatch.context() as patch:
        patch.delattr(start_module, "count_events")
        train(longer, dataset, run_dir, device=CPU, resume=True)
    content = torch.load(run_dir / "last.pt", weights_only=True)
    assert content.pop("popularity").tolist() == expected
    torch.save(content, run_dir / "last.pt")
    train(dataclasses.replace(config, max_epochs=3), dataset, run_dir, device=CPU, resume=True)
    again = load_checkpoint(run_dir / "last.pt").popularity
    assert again is not None
    assert again.tolist() == expected


def test_a_finished_run_resumed_changes_nothing(data_dir: Path, tmp_path: Path) -> None:
    best = start(write_config(tmp_path), data_dir, tmp_path / "runs", "a")
    shutil.copytree(tmp_path / "runs" / "a", tmp_path / "runs" / "b")
    assert resume(data_dir, tmp_path / "runs" / "b").name == best.name
    check_same_run(tmp_path / "runs" / "b", tmp_path / "runs" / "a")


def test_a_copy_of_a_checkpoint_stays_and_a_lost_one_is_not_named_as_the_best(
    data_dir: Path, tmp_path: Path
) -> None:
    best = start(write_config(tmp_path), data_dir, tmp_path, "a")
    copy = best.rename(best.with_name("mine.pt"))
    with pytest.raises(RunError, match=r"is gone; .*a/last\.pt has the latest weights"):
        resume(data_dir, tmp_path / "a")
    assert copy.is_file()


def test_resuming_is_refused_where_it_would_not_be_the_same_run(
    data_dir: Path, tmp_path: Path
) -> None:
    start(write_config(tmp_path), data_dir, tmp_path / "runs", "a")
    run_dir = tmp_path / "runs" / "a"
    with pytest.raises(InputError, match=r"keeps its settings.* not lr"):
        resume(data_dir, run_dir, "lr=1", "max_epochs=9")
    with pytest.raises(InputError, match="nothing to resume"):
        resume(data_dir, tmp_path / "runs" / "no")
    write_dataset(data_dir, train=[[1, 2]], num_items=30)
    with pytest.raises(InputError, match="another version"):
        resume(data_dir, run_dir)


def without(part: str, content: dict[str, Any]) -> None:
    del content["training"][part]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda content: content["training"].clear(),
            "holds only weights.* no state to resume from",
        ),
        (lambda content: without("optimizer", content), "state for resuming is incomplete"),
        (lambda content: without("scaler", content), "state for resuming is incomplete"),
        (lambda content: without("progress", content), "state for resuming is incomplete"),
        (lambda content: content["training"]["progress"].update(later=1), "another version.*later"),
        (lambda content: content["training"].update(optimizer=[]), "state of the optimizer"),
    ],
)
def test_a_file_without_all_that_resuming_needs_is_one_sentence(
    spoil: Callable[[dict[str, Any]], None], says: str, data_dir: Path, tmp_path: Path
) -> None:
    """The first is a best checkpoint under the name of the last."""
    start(write_config(tmp_path, max_epochs=1), data_dir, tmp_path, "a")
    content = torch.load(tmp_path / "a" / "last.pt", weights_only=True)
    spoil(content)
    torch.save(content, tmp_path / "a" / "last.pt")
    with pytest.raises(InputError, match=rf"a/last\.pt.*{says}"):
        resume(data_dir, tmp_path / "a", "max_epochs=2")


def test_defect_test_split_is_never_read_by_training(data_dir: Path, tmp_path: Path) -> None:
    """TRON chooses its checkpoint on the test set."""
    config = write_config(tmp_path)
    start(config, data_dir, tmp_path / "runs", "a")
    shutil.rmtree(data_dir / "tiny" / "test")
    start(config, data_dir, tmp_path / "runs", "b")
    check_same_run(tmp_path / "runs" / "b", tmp_path / "runs" / "a")


def test_the_checkpoint_is_the_best_by_validation_and_not_the_last(
    data_dir: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, max_epochs=8, lr=0.1, lr_schedule="constant")
    best = start(config, data_dir, tmp_path / "runs", "a")
    figures = {
        row["step"]: row["validation"]["R@5"]
        for row in logged(tmp_path / "runs" / "a")
        if "validation" in row
    }
    found = load_checkpoint(best)
    assert len(figures) == 8
    assert len(set(figures.values())) > 2
    assert found.metrics["R@5"] == max(figures.values())
    assert found.step == min(
        step for step, value in figures.items() if value == max(figures.values())
    )
    assert found.step < 48
    assert f"-step={found.step}-" in best.name
    assert best.name.endswith(f"-R@5={found.metrics['R@5']:.4f}.pt")


def test_the_best_weights_are_those_that_were_validated(data_dir: Path, tmp_path: Path) -> None:
    from tron_cli.evaluation.evaluate import EvaluationOptions, assess

    best = load_checkpoint(start(write_config(tmp_path), data_dir, tmp_path / "runs", "a"))
    report = assess(best, Dataset.open(data_dir / "tiny"), EvaluationOptions(split="val"), CPU)
    for name, value in best.metrics.items():
        assert report["metrics"][name]["value"] == value


def test_without_validation_the_last_weights_are_kept_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    write_dataset(tmp_path, train=random_sessions(rng, 20, 30), num_items=30)
    with caplog.at_level(logging.INFO, "tron"):
        best = start(write_config(tmp_path), tmp_path, tmp_path / "runs", "a")
    found, last = load_checkpoint(best), load_checkpoint(best.parent / "last.pt")
    assert found.step == last.step == 9
    assert same_values(found.weights, last.weights)
    assert len(list(best.parent.glob("*.pt"))) == 2
    assert "nothing was selected" in caplog.text


def test_early_stopping_stops(data_dir: Path, tmp_path: Path) -> None:
    """A vanishing learning rate never gains: the first epoch is best, and two more follow."""
    config = write_config(tmp_path, lr=1e-30, max_epochs=20, early_stopping_patience=2)
    best = start(config, data_dir, tmp_path / "runs", "a")
    assert load_checkpoint(best).step == 6
    assert load_checkpoint(best.parent / "last.pt").step == 18
    resume(data_dir, best.parent)  # has stopped, and stays so
    assert load_checkpoint(best.parent / "last.pt").step == 18


@pytest.mark.parametrize("save_every", [0, 1])
def test_a_loss_that_is_not_finite_stops_the_run(
    save_every: int, data_dir: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, lr=1e30, lr_schedule="constant", save_every=save_every)
    with pytest.raises(RunError, match="lower lr"):
        start(config, data_dir, tmp_path / "runs", "a")
    for file in (tmp_path / "runs" / "a").glob("*.pt"):
        weights = load_checkpoint(file).weights
        assert all(bool(torch.isfinite(value).all()) for value in weights.values())


def test_short_epochs_visit_all_sessions(data_dir: Path, tmp_path: Path) -> None:
    """max_batches_per_epoch cuts where validation falls, not which sessions are seen."""
    whole = write_config(tmp_path, lr_schedule="constant", max_epochs=1)
    start(whole, data_dir, tmp_path / "runs", "whole")
    cut = write_config(tmp_path, lr_schedule="constant", max_epochs=3, max_batches_per_epoch=2)
    start(cut, data_dir, tmp_path / "runs", "cut")
    a, b = (load_checkpoint(tmp_path / "runs" / name / "last.pt") for name in ("whole", "cut"))
    assert a.step == b.step == 6
    assert same_values(a.weights, b.weights)


def test_limit_val_batches_and_overfit_batches(data_dir: Path, tmp_path: Path) -> None:
    number = itertools.count()

    def validated(**changes: Any) -> float:
        settings = {"max_epochs": 1, "metrics": ("R@30",), "val_metric": "R@5", **changes}
        best = start(write_config(tmp_path, **settings), data_dir, tmp_path, f"run{next(number)}")
        return load_checkpoint(best).metrics["R@5"]

    whole = validated()
    assert validated(limit_val_batches=100.0) == whole  # more than there are
    assert validated(limit_val_batches=2.0) != whole  # 16 of 20 sessions
    assert validated(limit_val_batches=0.8) == validated(limit_val_batches=2.0)
    fitted = validated(overfit_batches=1, max_epochs=60, lr=0.03, dropout_rate=0.0)
    assert fitted > 0.7 > 2 * whole


def test_limited_validation_is_spread_over_the_whole_split(tmp_path: Path) -> None:
    """The sessions of a split are in order of time, and the earliest are not like the others."""
    rows = [[start, start + 1] + [50] * (start % 4) for start in range(1, 41)]
    data = write_dataset(tmp_path, train=[[1, 2]], val=rows, num_items=50)

    def validated(limit: float) -> list[list[int]]:
        config = ExperimentConfig(**tiny_settings(limit_val_batches=limit, train_batch_size=5))
        return [row.tolist() for row in training_splits(config, data)[1]]

    for limit, count in (
        (0.25, 10),
        (0.99, 40),
        (1.0, 40),
        (2.0, 10),
        (7.0, 35),
        (0.01, 1),
        (1.5, 8),
    ):
        found = validated(limit)
        assert len(found) == count
        places = np.array([rows.index(row) for row in found])  # whole sessions of the split
        steps = np.diff(places)
        assert steps.size == 0 or (steps.min() >= 40 // count and steps.max() <= 40 // count + 1)
        assert steps.size == 0 or places[-1] >= 40 - 40 // count - 1
    assert validated(0.25) == rows[2::4]  # neither end is favoured


def test_an_empty_training_split_is_an_input_error(tmp_path: Path) -> None:
    data = write_dataset(tmp_path, train=[], test=[[1, 2]])
    config = ExperimentConfig(**tiny_settings())
    with pytest.raises(InputError, match="training split"):
        train(config, data, tmp_path, device=CPU)


def test_validation_is_what_evaluate_finds_on_the_validation_split(tmp_path: Path) -> None:
    """Protocol, filter and all: on leave-one-out data whose seen items are filtered."""
    rng = np.random.default_rng(6)
    histories = random_sessions(rng, 40, 30, shortest=3)
    data = write_dataset(
        tmp_path / "data", train=[row[:-1] for row in histories], val=histories, test=histories,
        num_items=30, protocol="last-item",
    )  # fmt: skip
    config = ExperimentConfig(**tiny_settings(filter_rated=True, max_epochs=1))
    best = load_checkpoint(train(config, data, tmp_path / "run", device=CPU))
    report = assess(best, data, EvaluationOptions(split="val"), CPU)
    assert report["events"] == 40
    assert best.metrics == {name: figure["value"] for name, figure in report["metrics"].items()}
    unfiltered = assess(best, data, EvaluationOptions(split="val", filter_rated=False), CPU)
    assert unfiltered["metrics"] != report["metrics"]


def test_bf16_trains_in_bf16(data_dir: Path, tmp_path: Path) -> None:
    data = Dataset.open(data_dir / "tiny")
    losses = {}
    for precision in ("float32", "bf16"):
        run = tmp_path / precision
        train(ExperimentConfig(**tiny_settings(precision=precision)), data, run, device=CPU)
        losses[precision] = [row["loss"] for row in logged(run) if "loss" in row]
    assert losses["bf16"] != losses["float32"]
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=0.02)


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": 4, "los\n',
        b"\xff\xfe\x00\n",
        b"[]\n",
        b"{}\n",
        b'{"step": "4"}\n',
        b"[" * 10**5 + b"\n",
    ],
)
def test_resuming_goes_on_past_a_damaged_line_of_the_log(
    damage: bytes, data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config(tmp_path)
    start(config, data_dir, tmp_path / "runs", "a")
    run_dir = tmp_path / "runs" / "a"
    file = run_dir / "metrics.jsonl"
    before = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([before[0], damage, *before[1:], b'{"torn']))
    (run_dir / "metrics.jsonl.partial").write_text("left by a kill")
    resume(data_dir, run_dir)
    assert file.read_bytes() == b"".join(before)
    assert f"line 2 of {len(before) + 2} is damaged" in caplog.text
