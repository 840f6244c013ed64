"""Paired differences and their intervals; the command, its report and its refusals."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import random_checkpoint
from helpers.datasets import pack_sessions, random_sessions, tiny_settings, write_dataset

from tron_cli.checkpoint import (
    load_checkpoint,
)
from tron_cli.data.dataset import Dataset
from tron_cli.errors import InputError
from tron_cli.evaluation.beyond_accuracy import beyond_accuracy, count_items
from tron_cli.evaluation.compare import Difference, compare, paired_difference, short_labels
from tron_cli.evaluation.evaluate import EvaluationOptions, assess
from tron_cli.evaluation.metrics import parse_measures, values_of_ranks
from tron_cli.evaluation.predict import Predictions, predict

CPU = torch.device("cpu")
Command = Callable[..., tuple[int, str, str]]

# Student's t, two-sided 95 %, as tables print it: degrees of freedom -> quantile.
T_TABLE = {1: 12.7062, 4: 2.7764, 9: 2.2622, 29: 2.0452, 99: 1.9842}


def checkpoint_file(dataset: Dataset, file: Path, *, seed: int = 1, **changes: Any) -> Path:
    """Write the checkpoint of a model with random weights."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return random_checkpoint(dataset, file, torch_seed=seed, **changes).path


@pytest.fixture
def test_sessions(rng: np.random.Generator) -> list[list[int]]:
    return random_sessions(rng, 40, 30, longest=12)


@pytest.fixture
def dataset(tmp_path: Path, rng: np.random.Generator, test_sessions: list[list[int]]) -> Dataset:
    train = random_sessions(rng, 60, 28)
    return write_dataset(tmp_path, train=train, test=test_sessions, val=[[1, 2]], num_items=30)


def loop_difference(
    values: list[float], reference: list[float], sessions: list[int]
) -> tuple[float, float]:
    """Return the mean difference and its clustered standard error, session by session."""
    differences = [value - other for value, other in zip(values, reference, strict=True)]
    mean = math.fsum(differences) / len(differences)
    of_session: dict[int, list[float]] = {}
    for session, difference in zip(sessions, differences, strict=True):
        of_session.setdefault(session, []).append(difference)
    squares = sum((sum(row) - len(row) * mean) ** 2 for row in of_session.values())
    groups = len(of_session)
    return mean, math.sqrt(groups / (groups - 1) * squares) / len(differences)


@pytest.mark.parametrize("freedom", T_TABLE)
def test_the_interval_is_the_clustered_one_with_student_s_quantile(freedom: int) -> None:
    rng = np.random.default_rng(freedom)
    sessions = np.repeat(np.arange(freedom + 1) * 3, rng.integers(1, 7, freedom + 1))
    sessions = rng.permutation(sessions)
    values, reference = rng.random((2, len(sessions)))
    found = paired_difference(values, reference, sessions)
    mean, stderr = loop_difference(values.tolist(), reference.tolist(), sessions.tolist())
    assert found.value == pytest.approx(mean)
    assert found.stderr == pytest.approx(stderr)
    assert found.low == pytest.approx(mean - T_TABLE[freedom] * stderr, abs=1e-4 * stderr)
    assert found.high == pytest.approx(mean + T_TABLE[freedom] * stderr, abs=1e-4 * stderr)
    assert found.within_noise == (abs(mean) <= T_TABLE[freedom] * stderr)


def test_equal_values_differ_by_exactly_nothing() -> None:
    values = np.random.default_rng(0).random(50)
    found = paired_difference(values, values.copy(), np.arange(50) // 4)
    assert found == Difference(0.0, 0.0, 0.0, 0.0, True)


def test_a_difference_of_either_sign_can_stand_out() -> None:
    """The better model is better by about the same in every session, easy or hard."""
    rng = np.random.default_rng(0)
    sessions = np.repeat(np.arange(100), 5)
    reference = rng.random(100)[sessions]
    better = reference + 0.01 + rng.normal(0, 0.01, 500)
    assert paired_difference(better, reference, sessions).within_noise is False
    assert paired_difference(reference, better, sessions).within_noise is False
    assert paired_difference(reference + rng.normal(0, 0.01, 500), reference, sessions).within_noise


def test_one_session_has_no_interval() -> None:
    found = paired_difference(np.array([1.0, 0.0]), np.array([0.0, 0.0]), np.array([4, 4]))
    assert found == Difference(0.5, None, None, None, None)


REPLICATIONS = 2000


def coverage(
    sessions_each: int, length: int, *, clustered: bool = True, like_lengths: bool = False
) -> float:
    """Return the share of intervals that contain the known difference of two models' RR@20.

    Sessions are of geometric lengths of this mean, or all of it.
    A session is easy or hard for both models at once, and for each again by itself. Given that, the
    events of the session are independent, and a rank is 1, 2 or a miss. So the mean difference is
    known, whatever the lengths.
    """
    rng = np.random.default_rng(5)
    value_of = values_of_ranks(parse_measures("RR@20"), range(21), 20)["RR@20"]
    ranks_of = np.array([1, 2, 0])
    # [easy for this model, easy for both, rank]: chances of ranks 1, 2 and of a miss.
    chance = np.array(
        [[[0.1, 0.1, 0.8], [0.3, 0.3, 0.4]], [[0.3, 0.2, 0.5], [0.8, 0.1, 0.1]]]
    )  # fmt: skip
    easy_for_both, easy_for_one = 0.5, {"model": 0.6, "reference": 0.4}
    expected = {
        model: sum(
            (share if mine else 1 - share)
            * (easy_for_both if both else 1 - easy_for_both)
            * float(chance[mine, both] @ value_of[ranks_of])
            for mine in (0, 1)
            for both in (0, 1)
        )
        for model, share in easy_for_one.items()
    }
    truth = expected["model"] - expected["reference"]
    lengths = rng.geometric(1 / length, (REPLICATIONS, sessions_each))
    if like_lengths:
        lengths[:] = length
    session_N = np.repeat(np.arange(lengths.size), lengths.ravel())
    both_N = (rng.random(lengths.size) < easy_for_both).astype(int)[session_N]
    values_N = {}
    for model, share in easy_for_one.items():
        mine_N = (rng.random(lengths.size) < share).astype(int)[session_N]
        drawn_N = rng.random(len(session_N))[:, None] > chance[mine_N, both_N].cumsum(axis=1)
        values_N[model] = value_of[ranks_of[drawn_N.sum(axis=1)]]
    ends = lengths.sum(axis=1).cumsum()[:-1]
    held = 0
    for model, reference, sessions in zip(
        np.split(values_N["model"], ends),
        np.split(values_N["reference"], ends),
        np.split(session_N, ends),
        strict=True,
    ):
        groups = sessions - sessions[0] if clustered else np.arange(len(sessions))
        found = paired_difference(model, reference, groups)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
    return held / REPLICATIONS


NOISE = 3 * math.sqrt(0.95 * 0.05 / REPLICATIONS)


def test_the_intervals_hold_the_truth_as_often_as_they_say() -> None:
    assert coverage(150, 5) == pytest.approx(0.95, abs=NOISE)


def test_intervals_that_take_events_for_independent_do_not() -> None:
    """The simulated events of a session are correlated; otherwise the test would show nothing."""
    assert coverage(150, 5, clustered=False) < 0.85


def test_they_hold_for_few_sessions_of_like_lengths() -> None:
    """The normal quantile instead of Student's would cover only 91 % with 9 sessions."""
    assert coverage(9, 60, like_lengths=True) > 0.95 - NOISE


def compared(paths: list[Path], dataset: Dataset, **options: Any) -> dict[str, Any]:
    reference, cutoff = options.pop("reference", 0), options.pop("cutoff", None)
    return compare(
        [load_checkpoint(path) for path in paths],
        dataset,
        EvaluationOptions(**options),
        CPU,
        reference=reference,
        cutoff=cutoff,
    )


def predicted(path: Path, sessions: list[list[int]], **options: Any) -> Predictions:
    model = load_checkpoint(path).build_model(CPU)
    return predict(model, pack_sessions(sessions), protocol="every-step", **options)


def reciprocal(predictions: Predictions) -> list[float]:
    return [1 / rank if 1 <= rank <= 10 else 0.0 for rank in predictions.rank_E.tolist()]


def test_differences_are_to_the_reference_wherever_it_stands(
    tmp_path: Path, dataset: Dataset, test_sessions: list[list[int]]
) -> None:
    paths = [checkpoint_file(dataset, tmp_path / f"{name}.pt", seed=seed)
             for seed, name in enumerate("abc")]  # fmt: skip
    report = compared(paths, dataset, metrics="RR@10 R@3", reference=1, filter_rated=True)
    assert list(report["models"]) == ["a", "b", "c"]
    assert report["reference"] == "b"
    assert "differences" not in report["models"]["b"]
    found = {
        name: predicted(path, test_sessions, filter_rated=True)
        for name, path in zip("abc", paths, strict=True)
    }
    sessions = found["b"].session_E.tolist()
    for name in "ac":
        mean, stderr = loop_difference(reciprocal(found[name]), reciprocal(found["b"]), sessions)
        difference = report["models"][name]["differences"]["RR@10"]
        assert difference["value"] == pytest.approx(mean)
        assert difference["stderr"] == pytest.approx(stderr)
        assert difference["low"] < mean < difference["high"]
        hits = (found[name].rank_E <= 3) & (found[name].rank_E > 0)
        of_b = (found["b"].rank_E <= 3) & (found["b"].rank_E > 0)
        assert report["models"][name]["differences"]["R@3"]["value"] == pytest.approx(
            hits.mean() - of_b.mean()
        )
    assert report["events"] == len(sessions)
    assert report["missed_because_filtered"] == int((found["b"].rank_E == 0).sum()) > 0


def test_figures_are_those_of_evaluate(tmp_path: Path, dataset: Dataset) -> None:
    paths = [checkpoint_file(dataset, tmp_path / f"{seed}.pt", seed=seed) for seed in (1, 2)]
    report = compared(paths, dataset, limit_sessions=30)
    for label, path in zip(("1", "2"), paths, strict=True):
        alone = assess(load_checkpoint(path), dataset, EvaluationOptions(limit_sessions=30), CPU)
        assert report["models"][label]["metrics"] == alone["metrics"]
        assert report["models"][label]["checkpoint"] == str(path)
        for key in ("events", "sessions", "items", "left_out", "protocol", "split", "dataset"):
            assert report[key] == alone[key]


def test_a_sample_is_that_of_evaluate(tmp_path: Path, dataset: Dataset) -> None:
    paths = [checkpoint_file(dataset, tmp_path / f"{seed}.pt", seed=seed) for seed in (1, 2)]
    report = compared(paths, dataset, sample_sessions=30, seed=5)
    alone = assess(
        load_checkpoint(paths[1]), dataset, EvaluationOptions(sample_sessions=30, seed=5), CPU
    )
    assert report["models"]["2"]["metrics"] == alone["metrics"]
    assert report["sample"] == alone["sample"] == {"sessions": 30, "of": 40, "seed": 5}


def test_beyond_accuracy_looks_at_the_lists_and_the_training_split(
    tmp_path: Path, dataset: Dataset, test_sessions: list[list[int]]
) -> None:
    paths = [checkpoint_file(dataset, tmp_path / f"{seed}.pt", seed=seed) for seed in (1, 2)]
    report = compared(paths, dataset, cutoff=4)
    counts = count_items(dataset.split("train"), dataset.num_items)
    first, second = (predicted(path, test_sessions, top_items=4) for path in paths)
    assert first.top_EK is not None
    assert second.top_EK is not None
    own = beyond_accuracy(second.top_EK, second.target_E, counts, first.top_EK)
    shown = report["models"]["2"]["beyond_accuracy"]
    assert shown == pytest.approx(vars(own))
    assert 0 < shown["intersection"] < 1
    of_reference = report["models"]["1"]["beyond_accuracy"]
    assert of_reference["intersection"] is None
    assert of_reference["average_popularity"] == pytest.approx(
        np.mean(np.bincount(dataset.split("train").items, minlength=31)[first.top_EK])
    )


def test_the_cutoff_is_the_reference_s_limit_and_0_leaves_the_figures_out(
    tmp_path: Path, dataset: Dataset
) -> None:
    paths = [checkpoint_file(dataset, tmp_path / f"{limit}.pt", recommendation_limit=limit)
             for limit in (3, 7)]  # fmt: skip
    assert [compared(paths, dataset, reference=place)["cutoff"] for place in (0, 1)] == [3, 7]
    without = compared(paths, dataset, cutoff=0)
    assert not any("beyond_accuracy" in model for model in without["models"].values())
    for cutoff in (-1, 1001):
        with pytest.raises(InputError, match=f"--cutoff must be from 0 to 1000, got {cutoff}"):
            compared(paths, dataset, cutoff=cutoff)


def test_lists_are_no_longer_than_the_catalogue(tmp_path: Path, dataset: Dataset) -> None:
    path = checkpoint_file(dataset, tmp_path / "a.pt", recommendation_limit=10**9)
    for cutoff in (None, 1000):
        report = compared([path, path], dataset, cutoff=cutoff)
        assert report["cutoff"] == 30
        for model in report["models"].values():
            assert model["beyond_accuracy"]["catalogue_coverage"] == 1
    large = write_dataset(tmp_path, name="large", test=[[1, 2], [3, 4]], num_items=1200)
    path = checkpoint_file(large, tmp_path / "b.pt", recommendation_limit=10**9)
    with pytest.raises(InputError, match=r"recommendation_limit=1000000000: pass --cutoff"):
        compared([path, path], large)


def test_other_windows_are_refused_unless_whole_sessions_are_predicted(
    tmp_path: Path, dataset: Dataset, test_sessions: list[list[int]]
) -> None:
    paths = [checkpoint_file(dataset, tmp_path / f"{window}.pt", sequence_length=window)
             for window in (6, 8)]  # fmt: skip
    with pytest.raises(InputError, match=r"8\.pt predicts the last 8 .*6\.pt .*--full-sessions"):
        compared(paths, dataset)
    whole = compared(paths, dataset, full_sessions=True)
    assert whole["events"] == sum(len(session) - 1 for session in test_sessions)
    last = compared(paths, dataset, protocol="last-item")
    assert last["events"] == len(test_sessions)
    short = [session[:7] for session in test_sessions]  # 6 events to predict fit both windows
    fits = write_dataset(tmp_path, name="short", train=[[1, 2]], test=short, num_items=30)
    assert compared(paths, fits)["events"] == sum(len(session) - 1 for session in short)


def test_few_sessions_are_warned_of(
    tmp_path: Path, dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [checkpoint_file(dataset, tmp_path / f"{seed}.pt", seed=seed) for seed in (1, 2)]
    compared(paths, dataset)
    assert "only 40 sessions" in caplog.text
    caplog.clear()
    sessions = [[1, 2, 3]] * 50
    enough = write_dataset(tmp_path, name="enough", train=[[1, 2]], test=sessions, num_items=30)
    compared(paths, enough)
    assert "only" not in caplog.text


def test_models_that_filter_differently_must_be_told(tmp_path: Path, dataset: Dataset) -> None:
    paths = [checkpoint_file(dataset, tmp_path / f"{filtered}.pt", filter_rated=filtered)
             for filtered in (False, True)]  # fmt: skip
    with pytest.raises(InputError, match=r"False\.pt has filter_rated=False, .*True\.pt "):
        compared(paths, dataset)
    assert compared(paths, dataset, filter_rated=True)["filter_rated"] is True
    assert compared([paths[1]] * 2, dataset)["filter_rated"] is True


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["a/tron.pt", "b/popular.pt"], ["tron", "popular"]),
        (["x/tron-shop-step=5-e8.pt", "x/tron-shop-step=9-e8.pt"], ["tron-step=5", "tron-step=9"]),
        (["x/tron-otto-2.pt", "x/tron-otto.pt"], ["tron-2", "tron"]),
        (["one/model.pt", "two/model.pt"], ["one", "two"]),
        (["one/seed=1/model.pt", "two/seed=1/model.pt"], ["one", "two"]),
        (["x/a-b-c.pt", "x/a-c-b.pt"], ["a-b-c", "a-c-b"]),
    ],
)  # fmt: skip
def test_labels_are_short_and_unlike(paths: list[str], labels: list[str]) -> None:
    assert short_labels([Path("/runs") / path for path in paths]) == labels


def test_a_file_that_comes_twice_is_numbered() -> None:
    first, second = short_labels([Path("/m.pt"), Path("/m.pt")])
    assert (first[0], second[0]) == ("1", "2")


def test_a_run_is_called_by_its_folder(tmp_path: Path) -> None:
    files = []
    for name in ("tron-shop-seed1", "sasrec-shop-seed1"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").touch()
        files.append(folder / "some-step=4-long-name.pt")
    assert short_labels(files) == ["tron", "sasrec"]


def test_the_command_prints_json(command: Command, tmp_path: Path, dataset: Dataset) -> None:
    """The difference between a model and its copy is exactly zero."""
    first = checkpoint_file(dataset, tmp_path / "first.pt", seed=1)
    shutil.copy(first, tmp_path / "copy.pt")
    other = checkpoint_file(dataset, tmp_path / "other.pt", seed=2)
    code, out, _ = command(
        "compare", first, tmp_path / "copy.pt", other, "--json", "--data-dir", tmp_path,
        "--metrics", "R@5 RR@5", "--device", "cpu",
    )  # fmt: skip
    assert code == 0
    report = json.loads(out)
    assert set(report) == {
        "models", "reference", "confidence", "intervals", "cutoff", "protocol", "split", "dataset",
        "events", "sessions", "items", "tie_rule", "filter_rated", "missed_because_filtered",
        "left_out",
    }  # fmt: skip
    assert list(report["models"]) == ["first", "copy", "other"]
    assert (report["reference"], report["confidence"]) == ("first", 0.95)
    nothing = {"value": 0, "stderr": 0, "low": 0, "high": 0, "within_noise": True}
    assert report["models"]["copy"]["differences"] == {"R@5": nothing, "RR@5": nothing}
    assert report["models"]["copy"]["beyond_accuracy"]["intersection"] == 1
    difference = report["models"]["other"]["differences"]["RR@5"]
    assert difference["low"] < difference["value"] < difference["high"]
    assert set(report["models"]["other"]["beyond_accuracy"]) == {
        "catalogue_coverage", "average_popularity", "novelty", "serendipity", "intersection",
    }  # fmt: skip


def test_the_command_prints_tables(command: Command, tmp_path: Path, dataset: Dataset) -> None:
    paths = [checkpoint_file(dataset, tmp_path / f"run{seed}.pt", seed=seed) for seed in (1, 2)]
    words = ("--data-dir", tmp_path, "--metrics", "R@5 RR@5", "--cutoff", 4, "--reference", 2)
    code, out, _ = command("compare", *paths, *words)
    assert code == 0
    report = json.loads(command("compare", *paths, *words, "--json")[1])
    rows = [line.split() for line in out.splitlines()]
    assert ["measure", "run1", "run2"] in rows
    assert ["difference", "from", "run2", "run1"] in rows
    assert ["lists", "of", "4", "run1", "run2"] in rows
    for name in ("R@5", "RR@5"):
        one, two = (report["models"][run]["metrics"][name]["value"] for run in ("run1", "run2"))
        assert [name, f"{one:.4f}", f"{two:.4f}"] in rows
        found = report["models"]["run1"]["differences"][name]
        half = (found["high"] - found["low"]) / 2
        mark = ["~"] if found["within_noise"] else []
        assert [name, f"{one - two:+.4f}", f"±{half:.4f}", *mark] in rows
    overlap = report["models"]["run1"]["beyond_accuracy"]["intersection"]
    assert ["intersection", f"{overlap:.4f}", "-"] in rows
    assert str(paths[0]) in out
    assert "not adjusted" in out
    assert "every-step, test split of tiny" in out
    short = command("compare", *paths, *words[:-4], "--cutoff", 0, "--limit-sessions", 1)[1]
    assert "lists of" not in short
    assert "±" not in short.partition("difference ")[0]  # one session has no interval


def test_bad_choices_exit_with_2_and_a_sentence(
    command: Command, tmp_path: Path, dataset: Dataset
) -> None:
    first, second = (
        checkpoint_file(dataset, tmp_path / f"{seed}.pt", seed=seed) for seed in (1, 2)
    )
    ids = np.arange(201, 231)
    another = write_dataset(tmp_path, name="another", train=[[1, 2]], test=[[1, 2]], item_ids=ids)
    foreign = checkpoint_file(another, tmp_path / "foreign.pt")
    for words, sentence in [
        ([first], "at least two checkpoints to compare, got 1"),
        ([first, second, "--reference", 3], "expected 1 to 2, got 3"),
        ([first, second, "--reference", 0], "expected 1 to 2, got 0"),
        ([first, foreign], "different catalogues, with 60 items in only one"),
        ([first, tmp_path / "none.pt"], "no checkpoint at"),
        ([first, second, "--dataset", "nowhere"], "no prepared dataset"),
        ([first, second, "--metrics", "HR@5"], "did you mean R@5"),
        ([first, second, "--sample-sessions", 2, "--limit-sessions", 2], "pass one of them"),
        ([first, second, "--sample-sessions", 0], "--sample-sessions"),
        ([first, second, "--seed", 3], "--seed is the seed of --sample-sessions"),
        ([first, second, "--cutoff", 2000], "--cutoff must be from 0 to 1000"),
    ]:
        code, out, err = command("compare", *words, "--data-dir", tmp_path)
        assert (code, out) == (2, ""), err
        assert sentence in err
        assert "Traceback" not in err


def test_two_seeds_differ_little_and_popularity_and_random_weights_much(
    command: Command, tmp_path: Path
) -> None:
    """The next item is mostly the following one and otherwise any."""
    rng = np.random.default_rng(3)

    def walk() -> list[int]:
        steps = np.where(rng.random(6) < 0.7, 1, rng.integers(1, 20, 6))
        return ((rng.integers(20) + steps.cumsum()) % 20 + 1).tolist()

    shop = write_dataset(
        tmp_path, name="shop", num_items=20,
        train=[walk() for _ in range(400)], test=[walk() for _ in range(200)],
    )  # fmt: skip
    settings = tiny_settings(
        dataset_name="shop", embedding_dim=32, train_batch_size=32, max_epochs=10
    )
    config = tmp_path / "config.py"
    config.write_text(
        f"from tron_cli.config import ExperimentConfig\nconfig = ExperimentConfig(**{settings!r})\n"
    )
    for name, override in [("one", "seed=1"), ("two", "seed=2"), ("popular", "model=popular")]:
        code, _, err = command(
            "train", "--config", config, override, "--data-dir", tmp_path,
            "--output-dir", tmp_path, "--name", name, "--device", "cpu",
        )  # fmt: skip
        assert code == 0, err
    runs = [tmp_path / name for name in ("one", "two", "popular")]
    untrained = checkpoint_file(shop, tmp_path / "untrained.pt")
    words = ("--data-dir", tmp_path, "--metrics", "R@1 RR@5", "--cutoff", 5)
    code, out, err = command("compare", *runs, untrained, "--json", *words)
    assert code == 0, err
    models = json.loads(out)["models"]
    assert list(models) == ["one", "two", "popular", "untrained"]
    assert models["one"]["metrics"]["R@1"]["value"] > 0.6
    # Seeds may differ by more than sessions do: within_noise would depend on the draws.
    assert abs(models["two"]["differences"]["RR@5"]["value"]) < 0.05
    for label in ("popular", "untrained"):
        assert models[label]["differences"]["RR@5"]["within_noise"] is False
        assert models[label]["differences"]["RR@5"]["high"] < -0.3
    coverage = models["popular"]["beyond_accuracy"]["catalogue_coverage"]
    assert coverage == 5 / 20 < models["one"]["beyond_accuracy"]["catalogue_coverage"]
