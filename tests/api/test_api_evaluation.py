"""`tron_cli.evaluate` and `tron_cli.compare` from Python."""

from __future__ import annotations

import inspect
import json
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import random_checkpoint
from helpers.command_lines import Command
from helpers.datasets import random_sessions, write_dataset

from tron_cli.api.evaluation import Figure, compare, evaluate
from tron_cli.data.dataset import Dataset
from tron_cli.errors import InputError
from tron_cli.evaluation.evaluate import EvaluationOptions
from tron_cli.evaluation.slices import KINDS


@pytest.fixture
def shop(tmp_path: Path, rng: Any) -> Dataset:
    splits = {split: random_sessions(rng, 60, 30) for split in ("train", "val", "test")}
    return write_dataset(tmp_path, name="shop", **splits, num_items=30)


@pytest.fixture
def models(shop: Dataset, tmp_path: Path) -> list[Path]:
    found = {"a": {}, "b": {"positions": "start"}}
    for name, changes in found.items():
        random_checkpoint(shop, tmp_path / f"{name}.pt", **changes)
    return [tmp_path / "a.pt", tmp_path / "b.pt"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, []),
        (
            {"split": "val", "metrics": ["R@3", "nDCG@10"], "by": ["length", "popularity"]},
            ["--split", "val", "--metrics", "R@3 nDCG@10", "--by", "length", "--by", "popularity"],
        ),
        (
            {"cutoff": 5, "filter_rated": True, "sample_sessions": 20, "seed": 3},
            ["--cutoff", 5, "--filter-rated", "--sample-sessions", 20, "--seed", 3],
        ),
    ],
)
def test_the_result_holds_the_report_of_the_command(
    shop: Dataset,
    models: list[Path],
    command: Command,
    options: dict[str, Any],
    words: list[object],
) -> None:
    found = evaluate(models[0], data_dir=shop.path.parent, device="cpu", **options)
    code, out, err = command(
        "evaluate", models[0], "--data-dir", shop.path.parent, "--json", "--device", "cpu", *words
    )
    report = json.loads(out)
    assert code == 0, err
    assert json.loads(json.dumps(found.to_dict())) == report
    for name, figure in report["metrics"].items():
        assert found.metrics[name] == Figure(figure["value"], figure["stderr"])
    assert found.checkpoint == models[0]
    for name in ("dataset", "split", "protocol", "events", "sessions", "items", "left_out"):
        assert getattr(found, name) == report[name]
    assert found.slices.keys() == set(options.get("by", ()))
    if "cutoff" in options:
        assert found.beyond_accuracy is not None
        expected = report["beyond_accuracy"]["novelty"]
        assert found.beyond_accuracy.novelty == expected
    with pytest.raises(AttributeError):
        found.events = 0  # type: ignore[misc]
    found.to_dict()["metrics"].clear()
    assert found.to_dict()["metrics"]


def test_figures_with_lost_predictions(tmp_path: Path, rng: Any) -> None:
    splits = {split: random_sessions(rng, 20, 9) for split in ("train", "test")}
    shop = write_dataset(tmp_path, name="shop", **splits, num_items=9, lost_predictions=7)
    file = tmp_path / "a.pt"
    random_checkpoint(shop, file)
    found = evaluate(file, dataset=shop, device="cpu", full_sessions=True)
    figure = found.metrics["R@5"]
    events = found.events
    assert figure.value_with_lost_as_misses == pytest.approx(figure.value * events / (events + 7))
    assert found.left_out["lost_predictions"] == 7


def test_a_dataset_may_be_given_open_or_by_name(shop: Dataset, models: list[Path]) -> None:
    places: list[dict[str, Any]] = [
        {"dataset": shop},
        {"dataset": "shop", "data_dir": shop.path.parent},
        {"data_dir": str(shop.path.parent)},
    ]
    assert len({evaluate(str(models[0]), **place).metrics["R@5"].value for place in places}) == 1


def test_the_comparison_holds_the_report_of_the_command(
    shop: Dataset, models: list[Path], command: Command
) -> None:
    found = compare(models, dataset=shop, reference=2, cutoff=5, metrics="R@5", device="cpu")
    code, out, err = command(
        "compare", *models, "--data-dir", shop.path.parent, "--reference", 2, "--cutoff", 5,
        "--metrics", "R@5", "--json", "--device", "cpu",
    )  # fmt: skip
    report = json.loads(out)
    assert code == 0, err
    assert json.loads(json.dumps(found.to_dict())) == report
    assert list(found.models) == ["a", "b"]
    assert (found.reference, found.cutoff, found.events) == ("b", 5, report["events"])
    difference = found.models["a"].differences["R@5"]
    gap = found.models["a"].metrics["R@5"].value - found.models["b"].metrics["R@5"].value
    assert difference.value == pytest.approx(gap)
    assert found.models["b"].differences == {}
    for label, model in found.models.items():
        assert model.beyond_accuracy is not None
        assert (
            model.beyond_accuracy.novelty == report["models"][label]["beyond_accuracy"]["novelty"]
        )
    assert compare(models, dataset=shop, cutoff=0).models["a"].beyond_accuracy is None


def test_evaluate_has_all_options_of_an_evaluation() -> None:
    """With the same defaults; those of lists are of another type."""
    defaults = {name: each.default for name, each in inspect.signature(evaluate).parameters.items()}
    options = vars(EvaluationOptions())
    assert options.items() <= defaults.items()
    hint = typing.get_type_hints(evaluate)["by"]
    assert set(typing.get_args(typing.get_args(hint)[0])) == KINDS.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": 5}, "checkpoint must be a path, got 5"),
        ({"checkpoint": "none.pt"}, "no checkpoint at none.pt"),
        ({"dataset": 5}, "dataset must be text or Dataset or None, got 5"),
        ({"dataset": "hats"}, "no prepared dataset at .*hats"),
        ({"split": "tset"}, "split must be 'test' or 'val', got 'tset'; did you mean 'test'"),
        ({"split": "train"}, "split must be 'test' or 'val', got 'train'"),
        ({"protocol": "last_item"}, "got 'last_item'; did you mean 'last-item'"),
        ({"metrics": 5}, "metrics must be text or a list, each text or None, got 5"),
        ({"metrics": "R"}, "R"),
        ({"metrics": []}, "no measure given"),
        ({"by": "length"}, "by must be a list, each 'length' or .*, got 'length'"),
        ({"by": ["lenght"]}, "did you mean 'length'"),
        ({"filter_rated": "no"}, "filter_rated must be True or False or None, got 'no'"),
        ({"full_sessions": 1}, "full_sessions must be True or False, got 1"),
        ({"limit_sessions": 0}, "limit_sessions must be at least 1, got 0"),
        ({"sample_sessions": -1}, "sample_sessions must be at least 1, got -1"),
        ({"limit_sessions": 2.5}, "limit_sessions must be a whole number or None, got 2.5"),
        ({"limit_sessions": True}, "limit_sessions must be a whole number or None, got True"),
        ({"cutoff": -1}, "cutoff must be from 0"),
        ({"seed": 3}, "--seed is the seed of --sample-sessions"),
        ({"sample_sessions": 3, "seed": -1}, "seed must be at least 0, got -1"),
        ({"per_event": "events.txt"}, "events.txt"),
        ({"run": "nowhere/run"}, "nowhere"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N"),
        ({"plugins": ["nothing"]}, "nothing"),
    ],
)
def test_wrong_input_is_one_sentence(
    shop: Dataset, models: list[Path], options: dict[str, Any], message: str
) -> None:
    given = {"checkpoint": models[0], "data_dir": shop.path.parent, **options}
    with pytest.raises(InputError, match=message) as error:
        evaluate(**given)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 500


@pytest.mark.parametrize(
    ("checkpoints", "options", "message"),
    [
        ("a.pt", {}, "checkpoints must be a list, each a path, got 'a.pt'"),
        ([], {}, "at least two checkpoints to compare, got 0"),
        (["a.pt"], {}, "at least two checkpoints to compare, got 1"),
        (["a.pt", 5], {}, "each a path, got"),
        (["a.pt", "b.pt"], {"reference": 0}, "expected 1 to 2, got 0"),
        (["a.pt", "b.pt"], {"reference": "a"}, "reference must be a whole number, got 'a'"),
        (["a.pt", "b.pt"], {"cutoff": 1.5}, "cutoff must be a whole number or None, got 1.5"),
    ],
)
def test_wrong_input_of_compare_is_one_sentence(
    checkpoints: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compare(checkpoints, **options)


def test_an_unknown_option_is_pythons_own_error(models: list[Path]) -> None:
    with pytest.raises(TypeError, match="splt"):
        evaluate(models[0], splt="val")  # type: ignore[call-arg]


def test_evaluations_in_threads_do_not_disturb_each_other(
    shop: Dataset, models: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    expected = [evaluate(file, dataset=shop).report for file in models]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda file: evaluate(file, dataset=shop).report, models * 4))
    assert found == expected * 4
    assert capfd.readouterr().out == ""
