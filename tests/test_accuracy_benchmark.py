"""benchmarks.accuracy: experiments, their seeds, finals and mixtures, and the table of them."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.datasets import cyclic_sessions, random_sessions, tiny_settings, write_dataset

from benchmarks.accuracy import runs
from benchmarks.accuracy import table as tables
from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.experiments import EXPERIMENTS, Experiment, Variant
from benchmarks.accuracy.table import table
from tron_cli.checkpoint import load_checkpoint
from tron_cli.config import load_config
from tron_cli.errors import InputError
from tron_cli.files import best_checkpoint

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> Callable[..., dict[str, Any]]:
    """Return `run(WORDS)` of small experiments on a small dataset: the last result written."""
    rng = np.random.default_rng(3)
    write_dataset(
        tmp_path / "data",
        train=cyclic_sessions(40, 1, cycle=30),
        val=random_sessions(rng, 20, 30),
        test=cyclic_sessions(20, 2, cycle=30),
        num_items=30,
    )
    words = ", ".join(f"{key}={value!r}" for key, value in tiny_settings(max_epochs=4).items())
    words = words.replace("'R@5', 'RR@5'", "'R@5', 'R@20', 'RR@20'")
    config = tmp_path / "config.py"
    config.write_text(
        f"from tron_cli.config import ExperimentConfig\nconfig = ExperimentConfig({words})\n"
    )
    experiments = {
        "net": Experiment("tiny", "Network", str(config), ("dropout_rate=0.3",)),
        "knn": Experiment("tiny", "kNN", str(config), ("model=session_knn",)),
        "mixed": Experiment("tiny", "Network + kNN", parts=("net", "knn")),
        "seeds": Experiment("tiny", "Two seeds", parts=("net", "net-seed=43")),
    }
    for name, experiment in experiments.items():
        monkeypatch.setitem(EXPERIMENTS, name, experiment)
    for module in (runs, tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")

    def tron(words: list[str]) -> dict[str, Any]:
        code, out, err = command(*words, "--json", "--device", "cpu")
        if code:
            raise subprocess.CalledProcessError(code, words, stderr=err)
        return json.loads(out.splitlines()[-1])

    monkeypatch.setattr(runs, "tron", tron)

    def run(*words: object) -> dict[str, Any]:
        place = ["--data-dir", tmp_path / "data", "--output-dir", tmp_path / "runs"]
        main(["run", *map(str, [*words, *place])])
        results = sorted((tmp_path / "results").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return json.loads(results[-1].read_text())

    return run


def test_validation_alone_chooses_and_the_test_split_is_read_once(bench, tmp_path, capfd) -> None:
    first = bench("net")
    assert "test" not in first
    assert first["validation"] == load_checkpoint(tmp_path / "runs" / "net").metrics
    assert "| Network | – | – |" in table()
    tested = bench("net", "--test")  # the same run, not trained again
    assert {**tested, "test": None} == {**first, "test": None}
    assert tested["test"]["split"] == "test"
    with pytest.raises(SystemExit):
        bench("net", "--test")
    assert "read once" in capfd.readouterr().err


def test_seeds_have_a_mean_and_a_spread(bench, tmp_path) -> None:
    bench("net", "--seed", 42, 43, "--test")
    found = [
        json.loads((tmp_path / "results" / name).read_text())
        for name in ("net.json", "net-seed=43.json")
    ]
    assert [each["seed"] for each in found] == [42, 43]
    assert found[1]["commands"][0].endswith("dropout_rate=0.3 seed=43 --name net-seed=43")
    values = [each["test"]["metrics"]["RR@20"]["value"] for each in found]
    assert values[0] != values[1]
    spread = abs(values[0] - values[1]) / 2**0.5  # the sample standard deviation of two
    assert f"| {statistics.mean(values):.4f} ± {spread:.4f} |" in table()
    assert "| 42, 43 |" in table()


def test_a_final_model_is_tested_and_its_validation_is_that_of_the_chosen_one(
    bench, tmp_path
) -> None:
    final = bench("net", "--final", "--test")
    runs = tmp_path / "runs"
    assert final["validation"] == load_checkpoint(runs / "net").metrics
    assert final["best_checkpoint"].endswith("-final.pt")
    assert final["commands"] == [
        f"tron train --config {tmp_path}/config.py dropout_rate=0.3 --name net",
        "tron train --final runs/net --name net-final",
        "tron evaluate runs/net-final --full-sessions",
    ]
    assert set(final["runs"]) == {"net", "net-final"}
    assert "| Network, final | 0." in table()


def test_a_mixed_model_is_made_of_its_parts(bench, tmp_path) -> None:
    mixed = bench("mixed", "--seed", 43, "--test")
    checkpoint = load_checkpoint(tmp_path / "runs" / "mixed-seed=43")
    assert mixed["validation"] == checkpoint.metrics
    assert mixed["commands"][2:] == [  # a baseline has no seed
        "tron mix runs/net-seed=43 runs/knn --name mixed-seed=43",
        "tron evaluate runs/mixed-seed=43 --full-sessions",
    ]
    assert f"| Network + kNN | {mixed['test']['metrics']['R@20']['value']:.4f} (" in table()


def test_the_final_mixed_model_has_the_weight_that_validation_chose(bench, tmp_path) -> None:
    final = bench("mixed", "--final", "--test")
    chosen, tested = (
        load_checkpoint(tmp_path / "runs" / name) for name in ("mixed", "mixed-final")
    )
    assert chosen.knn is not None
    assert tested.knn is not None
    assert tested.knn["weight"] == chosen.knn["weight"]
    assert final["validation"] == chosen.metrics
    assert [command.split()[1:3] for command in final["commands"]] == [
        ["train", "--config"], ["train", "--config"], ["mix", "runs/net"],
        ["train", "--final"], ["train", "--final"], ["mix", "runs/net-final"],
        ["evaluate", "runs/mixed-final"],
    ]  # fmt: skip
    assert f"--weight {chosen.knn['weight']} --name mixed-final" in final["commands"][5]


def test_parts_may_be_seeds_of_one_experiment(bench, tmp_path, capfd) -> None:
    found = bench("seeds", "--final")
    assert set(found["runs"]) == {
        "net", "net-seed=43", "seeds", "net-final", "net-final-seed=43", "seeds-final"
    }  # fmt: skip
    runs = tmp_path / "runs"
    shutil.copy(best_checkpoint(runs / "net-final-seed=43"), best_checkpoint(runs / "net-final"))
    with pytest.raises(SystemExit):
        bench("seeds", "--final")
    assert "another checkpoint than that in" in capfd.readouterr().err


def test_a_run_from_elsewhere_is_recorded_if_it_is_the_experiment_s(
    bench, tmp_path, command, capfd
) -> None:
    place = ["--data-dir", tmp_path / "data", "--output-dir", tmp_path / "other"]
    start = ["train", "--config", tmp_path / "config.py", *place]
    assert command(*start, "--name", "a", "dropout_rate=0.3")[0] == 0
    assert command(*start, "--name", "b", "dropout_rate=0.2")[0] == 0
    shutil.copytree(tmp_path / "other" / "a", tmp_path / "other" / "cut")
    metrics = tmp_path / "other" / "cut" / "metrics.jsonl"  # as it was before its last epoch
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-2]))
    for name, words, reason in (
        ("b", ["--commit", "abc"], "dropout_rate=0.2 instead of 0.3"),
        ("cut", ["--commit", "abc"], "no finished run"),
        ("a", [], "the --commit of the run"),
    ):
        with pytest.raises(SystemExit):
            bench("net", "--run-dir", tmp_path / "other" / name, *words)
        assert reason in capfd.readouterr().err
        assert not (tmp_path / "runs" / "net").exists()
    adopted = ["--run-dir", tmp_path / "other" / "a", "--commit", "abc", "--hardware", "a GPU"]
    found = bench("net", *adopted)
    assert (found["commit"], found["hardware"]) == ("abc", "a GPU")
    assert found["validation"] == load_checkpoint(tmp_path / "other" / "a").metrics
    assert found == bench("net")  # nothing was trained


def test_a_run_of_earlier_settings_is_refused(bench, tmp_path, monkeypatch, capfd) -> None:
    bench("net")
    changed = replace(EXPERIMENTS["net"], overrides=("dropout_rate=0.1",))
    monkeypatch.setitem(EXPERIMENTS, "net", changed)
    with pytest.raises(SystemExit):
        bench("net")
    assert "dropout_rate=0.3 instead of 0.1" in capfd.readouterr().err


def test_a_final_model_at_a_constant_rate_may_have_had_another_limit_of_epochs(
    bench, tmp_path, monkeypatch, capfd
) -> None:
    first = bench("net", "--final")
    # Only the run that was validated went on to the new limit; the best step stayed the same.
    config = tmp_path / "runs" / "net-final" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_epochs": 3}))
    assert bench("net", "--final") == first
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lr": 0.5}))
    with pytest.raises(SystemExit):
        bench("net", "--final")
    error = capfd.readouterr().err
    assert "lr=0.5 instead of" in error
    assert "max_epochs" not in error


def test_hours_leave_out_the_time_between_two_processes(tmp_path) -> None:
    (tmp_path / "train.log").write_text(
        "2026-01-01 10:00:00,000 INFO tron on shop: 9 sessions\n"
        "2026-01-01 10:00:40,000 INFO epoch 1, step 5: R@20 0.1\n"
        "2026-01-02 10:00:00,000 INFO tron on shop: 9 sessions\n"
        "a line that a library wrote\n"
        "2026-01-02 10:00:02,000 INFO epoch 2, step 10: R@20 0.2\n"
    )
    checkpoint = tmp_path / "tron-shop-R@20=0.2.pt"  # its file may be a copy, which is newer
    checkpoint.touch()
    assert runs.training_seconds(tmp_path, "shop") == 42
    end = datetime.fromisoformat("2026-01-02 10:00:05").timestamp()
    final = checkpoint.rename(tmp_path / "tron-shop-final.pt")
    os.utime(final, (end, end))
    assert runs.training_seconds(tmp_path, "shop") == 45


def test_rows_follow_the_second_measure_and_untested_ones_come_last(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for name, value in (("a", 0.1), ("b", 0.3), ("c", 0.2), ("d", None)):
        figure = {"value": 0.5, "stderr": 0.01}
        result = {
            "experiment": name, "dataset": "shop", "title": f"model {name}", "seed": 42,
            "commit": "f" * 40, "steps": 5, "training_seconds": 1800, "protocol": "every-step",
            "commands": [f"tron train {name}", "tron evaluate RUN"],
            "validation": {"R@20": 0.6, "RR@20": 0.9},
            "test": {
                "protocol": "every-step", "events": 9, "sessions": 3, "items": 7,
                "filter_rated": False, "left_out": {"lost_predictions": 0},
                "metrics": {"R@20": figure, "RR@20": {"value": value, "stderr": 0.02}},
            },
        }  # fmt: skip
        if value is None:
            del result["test"]
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    lines = table().splitlines()
    assert lines[0].startswith("**shop**: every-step, 9 test events of 3 sessions")
    assert [line[8] for line in lines if line.startswith("| model ") and "R@20" not in line] == [
        *"bcad"
    ]
    assert (
        "| model b | 0.5000 (0.0100) | 0.3000 (0.0200) | 0.6000 | 5 | 0.50 | 42 | `fffffffff` |"
        in lines
    )
    assert "- `tron train d`" in lines


def test_parts_are_experiments_and_configs_load() -> None:
    for name, experiment in EXPERIMENTS.items():
        variant = Variant(name)
        if experiment.parts:
            assert all(source.name in EXPERIMENTS for source in variant.sources)
        else:
            _, config, *overrides = variant.settings
            try:
                assert load_config(config, overrides)[0].dataset_name == experiment.dataset
            except InputError as error:
                pytest.fail(f"{name}: {error}")
