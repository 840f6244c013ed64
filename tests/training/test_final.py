"""`tron train --final`: training and validation together, for the steps that validation chose."""

from __future__ import annotations

import json
import multiprocessing
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers.runs as runs
import numpy as np
import pytest
import torch
from helpers.datasets import pack_sessions, random_sessions, write_dataset
from helpers.runs import check_same_run, die_in_step, in_process, resume, write_config

from tron_cli.api.training import TrainingResult, train
from tron_cli.checkpoint import load_checkpoint
from tron_cli.data.dataset import Dataset, DatasetWriter, Sessions
from tron_cli.data.final import TrainAndValidation
from tron_cli.errors import InputError

Command = Callable[..., tuple[int, str, str]]
ITEMS = 30


@pytest.fixture
def data_dir(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Dataset tiny, and `both`, whose training split has tiny's validation sessions behind it."""
    train, val, test = (random_sessions(rng, count, ITEMS) for count in (45, 20, 10))
    for name, parts in (("tiny", (train, val)), ("both", ([*train, *val], []))):
        write_dataset(tmp_path / "data", name=name, train=parts[0], val=parts[1], test=test,
                      num_items=ITEMS)  # fmt: skip
    return tmp_path / "data"


def run(data_dir: Path, name: str, **options: Any) -> TrainingResult:
    output = data_dir.parent / "runs"
    return train(**{"data_dir": data_dir, "output_dir": output, "name": name, "device": "cpu",
                    **options})  # fmt: skip


SEEDS: dict[str, list[int]] = {}  # by settings: those that no test has found to fail


def validated(data_dir: Path, **changes: Any) -> TrainingResult:
    """Train a run whose best checkpoint is neither of its first nor of its last epoch."""
    config = write_config(data_dir.parent, max_epochs=6, **changes)
    seeds = SEEDS.setdefault(str(changes), list(range(30)))
    while seeds:
        result = run(data_dir, f"validated-{seeds[0]}", config=config, seed=seeds[0])
        if 6 < result.step < result.steps:
            return result
        del seeds[0]
    raise AssertionError("no seed does")


def rates(run_dir: Path) -> dict[int, float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["lr"] for line in lines if "lr" in line}


def test_it_is_a_run_on_both_splits_of_as_many_steps(data_dir: Path) -> None:
    """The weights are those of a dataset prepared with all sessions, trained for these steps."""
    best = validated(data_dir, lr_schedule="constant")
    final = run(data_dir, "final", final=best.run_dir)
    epochs = load_checkpoint(best.checkpoint).epoch + 1
    config = load_checkpoint(best.checkpoint).config
    expected = run(data_dir, "expected", config=config, dataset_name="both", max_epochs=epochs,
                   max_batches_per_epoch=best.step // epochs)  # fmt: skip
    assert final.step == expected.step == best.step
    found, other = (load_checkpoint(result.checkpoint) for result in (final, expected))
    assert all(torch.equal(found.weights[name], other.weights[name]) for name in other.weights)
    assert found.popularity.tolist() == other.popularity.tolist()
    assert final.checkpoint.name.endswith("-final.pt")
    assert f"step={best.step}-" in final.checkpoint.name
    assert "validation" not in (final.run_dir / "metrics.jsonl").read_text()


def test_another_seed_changes_the_weights_and_not_the_steps(
    command: Command, data_dir: Path
) -> None:
    best = validated(data_dir)
    seed = load_checkpoint(best.checkpoint).config.seed + 1
    code, out, err = command(
        "train", "--final", best.run_dir, f"seed={seed}", "--data-dir", data_dir, "--output-dir",
        data_dir.parent / "runs", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    found = load_checkpoint(Path(out.strip()))
    first = load_checkpoint(run(data_dir, "first", final=best.run_dir).checkpoint)
    assert found.config == replace(first.config, seed=seed)
    assert found.step == best.step
    assert not torch.equal(*(each.weights["item_embedding.weight"] for each in (found, first)))


def test_each_step_has_the_learning_rate_that_it_had(data_dir: Path) -> None:
    """The schedule goes on to where it ended, though training does not."""
    best = validated(data_dir, lr_schedule="cosine", warmup_steps=5)
    final = run(data_dir, "final", final=best.checkpoint)
    before, now = rates(best.run_dir), rates(final.run_dir)
    assert max(now) == best.step
    assert now == {step: rate for step, rate in before.items() if step <= best.step}


def test_its_checkpoint_says_what_it_was_trained_on(
    command: Command, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = validated(data_dir)
    code, out, err = command(
        "train", "--final", best.run_dir, "--data-dir", data_dir, "--output-dir",
        data_dir.parent / "runs", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    file = Path(out.strip())
    checkpoint = load_checkpoint(file)
    assert checkpoint.dataset["trained_on"] == "train+val"
    assert checkpoint.metrics == {}
    record = checkpoint.origin["final"]
    assert record["file"] == str(best.checkpoint)
    assert (record["steps"], record["metrics"]) == (best.step, best.metrics)
    assert json.loads((file.parent / "origin.json").read_text()) == checkpoint.origin
    caplog.clear()
    code, out, err = command("evaluate", file.parent, "--data-dir", data_dir, "--json")
    assert code == 0, err
    assert json.loads(out)["origin"] == checkpoint.origin
    assert "not trained on" not in caplog.text + err
    code, out, err = command("evaluate", file, "--data-dir", data_dir, "--split", "val")
    assert (code, out) == (2, "")
    assert "trained on the val split" in err
    write_dataset(data_dir, train=[[1, 2]], val=[[1, 3]], test=[[2, 3]], num_items=ITEMS)
    code, out, err = command("evaluate", file, "--data-dir", data_dir)
    assert code == 0
    assert "not trained on" in caplog.text + err


def test_killed_and_resumed_it_is_the_same(data_dir: Path) -> None:
    best = validated(data_dir)
    run(data_dir, "whole", final=best.run_dir)
    killed = data_dir.parent / "runs" / "killed"
    context = multiprocessing.get_context("fork")
    assert in_process(context, die_in_final, best.step - 1, data_dir, killed, best.run_dir) == -9
    assert (killed / "last.pt").exists()
    with pytest.raises(InputError, match="max_epochs"):
        train(resume=killed, data_dir=data_dir, max_epochs=9)
    assert in_process(context, resume, data_dir, killed) == 0
    check_same_run(killed, data_dir.parent / "runs" / "whole", same_log=False)


def die_in_final(step: int, data_dir: Path, run_dir: Path, validated_run: Path) -> None:
    def start(config: Path, data_dir: Path, output_dir: Path, name: str) -> Path:
        return run(data_dir, name, final=validated_run).checkpoint

    runs.start = start
    die_in_step(step, Path(), data_dir, run_dir)


def test_a_baseline_is_fitted_on_both(data_dir: Path, tmp_path: Path) -> None:
    config = tmp_path / "popular.py"
    config.write_text(
        "from tron_cli.config import ExperimentConfig\n"
        "config = ExperimentConfig(dataset_name='tiny', model='markov')\n"
    )
    plain = run(data_dir, "plain", config=config)
    final = load_checkpoint(run(data_dir, "final", final=plain.run_dir).checkpoint)
    expected = load_checkpoint(
        run(data_dir, "expected", config=config, dataset_name="both").checkpoint
    )
    assert final.path.name.endswith("-final.pt")
    assert final.origin["final"]["file"] == str(plain.checkpoint)
    assert all(torch.equal(final.weights[name], v) for name, v in expected.weights.items())


def test_a_run_that_started_from_another_does_so_again(data_dir: Path, tmp_path: Path) -> None:
    first = run(data_dir, "first", config=write_config(tmp_path, max_epochs=1))
    warm = validated(data_dir, lr_schedule="constant")
    config = load_checkpoint(warm.checkpoint).config
    warm = run(data_dir, "warm", config=config, init_from=first.checkpoint)
    final = load_checkpoint(run(data_dir, "final", final=warm.run_dir).checkpoint)
    assert final.origin["init_from"]["file"] == str(first.checkpoint)
    assert final.origin["final"]["file"] == str(warm.checkpoint)
    moved = tmp_path / "moved.pt"
    first.checkpoint.rename(moved)
    with pytest.raises(InputError, match=r"first.* is not there; name it with --init-from"):
        run(data_dir, "x", final=warm.run_dir)
    with pytest.raises(InputError, match="another file"):
        run(data_dir, "x", final=warm.run_dir, init_from=warm.checkpoint)
    again = load_checkpoint(run(data_dir, "again", final=warm.run_dir, init_from=moved).checkpoint)
    assert all(torch.equal(again.weights[name], v) for name, v in final.weights.items())


def test_a_start_from_weights_that_know_the_validation_sessions_is_warned_of(
    data_dir: Path, caplog: pytest.LogCaptureFixture, rng: np.random.Generator
) -> None:
    config = write_config(data_dir.parent, max_epochs=1)
    plain = run(data_dir, "plain", config=config)
    final = run(data_dir, "final", final=plain.run_dir)
    run(data_dir, "warm", config=config, init_from=plain.run_dir)
    parts = {name: random_sessions(rng, 20, ITEMS) for name in ("train", "val", "test")}
    write_dataset(data_dir, name="newer", num_items=ITEMS, **parts)
    run(data_dir, "newer", config=config, dataset_name="newer", init_from=final.run_dir)
    assert "trained on the validation sessions" not in caplog.text
    warm = run(data_dir, "leaky", config=config, init_from=final.run_dir)
    assert "trained on the validation sessions" in caplog.text
    assert str(final.checkpoint) in caplog.text
    caplog.clear()
    run(data_dir, "again", final=warm.run_dir)  # does not validate
    assert "trained on the validation sessions" not in caplog.text


@pytest.mark.parametrize("model", [{}, {"model": "gru4rec", "session_parallel": True}])
def test_steps_that_end_before_validation_sessions_in_order_are_warned_of(
    model: dict[str, Any], data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    style = {"shuffling_style": "no_shuffling", **model}
    short = run(data_dir, "short", config=write_config(data_dir.parent, max_epochs=1, **style))
    run(data_dir, "final", final=short.run_dir)
    assert "no_shuffling" in caplog.text
    caplog.clear()
    style["shuffling_style"] = "shuffle_without_replacement"
    shuffled = run(data_dir, "other", config=write_config(data_dir.parent, max_epochs=1, **style))
    run(data_dir, "other-final", final=shuffled.run_dir)
    assert "end before" not in caplog.text


def test_what_validation_did_not_choose_is_refused(data_dir: Path, tmp_path: Path) -> None:
    best = validated(data_dir)
    final = run(data_dir, "final", final=best.run_dir)
    other = run(data_dir, "other", config=write_config(tmp_path, dataset_name="both"))
    few = run(data_dir, "few", config=write_config(tmp_path, overfit_batches=1))
    for options, words in (
        ({"final": best.run_dir / "last.pt"}, "not those that validation chose"),
        ({"final": final.run_dir}, "is of a final model already"),
        ({"final": other.run_dir}, "was not chosen by validation"),
        ({"final": few.run_dir}, "overfit_batches"),
        ({"final": best.run_dir, "init_from": other.checkpoint}, "trained from scratch"),
        ({"final": best.run_dir, "lr": 1e-3}, "leave out lr"),
        ({"final": best.run_dir, "config": "config_synthetic"}, "give either"),
        ({"final": best.run_dir, "resume": other.run_dir}, "give either"),
        ({"final": tmp_path / "nowhere"}, "no checkpoint at"),
    ):
        with pytest.raises(InputError, match=words) as error:
            run(data_dir, "refused", **options)
        assert len(str(error.value)) < 500
    write_dataset(data_dir, train=[[1, 2]], val=[[1, 3]], test=[[2, 3]], num_items=ITEMS)
    with pytest.raises(InputError, match="another version"):
        run(data_dir, "refused", final=best.run_dir)
    assert not (data_dir.parent / "runs" / "refused").exists()


# ---- histories whose last items are held out --------------------------------------------------


def named(rows: Sequence[Sequence[int]], users: Sequence[int | str]) -> Sessions:
    sessions = pack_sessions(rows)
    kind = np.int64 if all(isinstance(user, int) for user in users) else object
    return Sessions(sessions.items, sessions.offsets, user_ids=np.array(users, dtype=kind))


def write_histories(folder: Path, train: Sessions, val: Sessions) -> Dataset:
    with DatasetWriter(folder / "users", force=True) as writer:
        writer.write_items(np.arange(1, 11))
        writer.write_split("train", [train])
        writer.write_split("val", [val])
        writer.write_split("test", [named([[1, 2, 3, 4, 5]], [7])])
        return writer.finish(name="users", protocol="last-item")


@pytest.mark.parametrize("kind", [int, str])
def test_a_validated_history_takes_the_place_of_its_beginning(kind: type, tmp_path: Path) -> None:
    """User 9 validates and trains on all but two more, 8 does not validate, 5 only validates."""
    dataset = write_histories(
        tmp_path,
        named([[1, 2, 3], [4, 5], [1, 2, 3]], [kind(7), kind(9), kind(8)]),
        named([[6, 7], [4, 5, 1, 2]], [kind(5), kind(9)]),
    )
    found = TrainAndValidation(dataset)
    rows = [found.split("train")[row].tolist() for row in range(len(found.split("train")))]
    assert rows == [[1, 2, 3], [1, 2, 3], [6, 7], [4, 5, 1, 2]]
    assert len(found.split("val")) == 0
    assert found.split("test").items.tolist() == [1, 2, 3, 4, 5]


def test_events_keep_their_times(tmp_path: Path) -> None:
    """Recency asks for them; those of user 9 belong to the longer history."""
    train, val = named([[1, 2, 3], [4, 5]], [7, 9]), named([[4, 5, 1, 2]], [9])
    train, val = (replace(part, times=10 * part.items.astype(np.int64)) for part in (train, val))
    found = TrainAndValidation(write_histories(tmp_path, train, val)).split("train")
    assert found.times is not None
    assert found.times.tolist() == [10, 20, 30, 40, 50, 10, 20]


def test_histories_without_names_are_refused(tmp_path: Path) -> None:
    dataset = write_histories(tmp_path, pack_sessions([[1, 2, 3]]), pack_sessions([[1, 2, 3, 4]]))
    with pytest.raises(InputError, match="does not name its users"):
        TrainAndValidation(dataset)


def test_the_last_items_of_validation_are_trained_on(tmp_path: Path) -> None:
    histories = [[1 + (user + place) % 10 for place in range(6)] for user in range(12)]
    write_histories(
        tmp_path / "data",
        named([row[:4] for row in histories], list(range(12))),
        named([row[:5] for row in histories], list(range(12))),
    )
    config = write_config(tmp_path, dataset_name="users", num_batch_negatives=0)
    best = run(tmp_path / "data", "validated", config=config)
    final = run(tmp_path / "data", "final", final=best.run_dir)
    counts = load_checkpoint(final.checkpoint).popularity
    expected = np.bincount([item for row in histories for item in row[:5]], minlength=11)
    assert counts.tolist() == expected.tolist()


def test_the_commands_of_the_page_run_as_they_stand(
    command: Command, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One epoch is enough, and --final takes the run before it."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    warm, final = re.findall(r"^tron train .*--(?:init-from|final) .*$", page, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    parts = {split: random_sessions(rng, 20, ITEMS) for split in ("train", "val", "test")}
    write_dataset(tmp_path / "datasets", name="diginetica", num_items=ITEMS, **parts)
    epoch = ["max_epochs=1", "--device", "cpu", "--name"]
    words = [
        word for word in shlex.split(warm)[1:] if word not in ("--init-from", "runs/last-week")
    ]
    assert command(*words, *epoch, "last-week")[0] == 0
    name = Path(shlex.split(final)[-1]).name
    for line, more in ((warm, [*epoch, name]), (final, ["--device", "cpu"])):
        code, _, err = command(*shlex.split(line)[1:], *more)
        assert code == 0, f"{line}: {err}"
