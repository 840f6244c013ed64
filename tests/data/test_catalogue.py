"""A checkpoint on data whose catalogue is another list of the same items, or of other ones too."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import random_checkpoint
from helpers.datasets import random_sessions, tiny_settings, write_dataset

from tron_cli.checkpoint import Checkpoint, load_checkpoint
from tron_cli.cli.report import comparison_text, evaluation_text
from tron_cli.config import ExperimentConfig
from tron_cli.data.catalogue import numbers_among
from tron_cli.data.dataset import Dataset
from tron_cli.errors import InputError
from tron_cli.evaluation.compare import compare
from tron_cli.evaluation.evaluate import EvaluationOptions, assess
from tron_cli.training.fit import fit

CPU = torch.device("cpu")
Command = Callable[..., tuple[int, str, str]]
Rows = list[list[int]]
IDS = np.arange(101, 131)  # of the checkpoint's catalogue, in its order


@pytest.fixture
def splits(rng: np.random.Generator) -> dict[str, Rows]:
    """Sessions of original ids."""
    return {
        name: [[100 + item for item in row] for row in random_sessions(rng, count, 30, longest=12)]
        for name, count in (("train", 80), ("val", 30), ("test", 40))
    }


@pytest.fixture
def checkpoint(tmp_path: Path, splits: dict[str, Rows]) -> Checkpoint:
    return random_checkpoint(write(tmp_path, "first", splits, IDS), tmp_path / "model.pt")


def write(
    folder: Path, name: str, splits: dict[str, Rows], item_ids: np.ndarray, **info: Any
) -> Dataset:
    """Write sessions of original ids under the numbers of a list of these."""
    number_of = {str(item): number for number, item in enumerate(item_ids.tolist(), start=1)}
    numbered = {
        split: [[number_of[str(item)] for item in row] for row in rows]
        for split, rows in splits.items()
    }
    return write_dataset(folder, name=name, item_ids=item_ids, **numbered, **info)


def with_strangers(splits: dict[str, Rows], rng: np.random.Generator) -> dict[str, Rows]:
    """Every fourth event or so is on an item that the checkpoint does not know: 901, 902, ..."""
    return {
        split: [[item if rng.random() < 0.75 else int(rng.integers(901, 906)) for item in row]
                for row in rows]
        for split, rows in splits.items()
    }  # fmt: skip


def evaluated(
    checkpoint: Checkpoint, dataset: Dataset, folder: Path, **options: Any
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the report without the dataset's name, and the files."""
    folder.mkdir(exist_ok=True)
    files = {name: folder / f"{name}.csv" for name in ("run", "qrels", "per_event")}
    report = assess(checkpoint, dataset, EvaluationOptions(**files, **options), CPU)
    del report["dataset"]
    return report, {name: file.read_text() for name, file in files.items()}


def test_numbers_are_found_by_id_whatever_the_order_and_the_kind() -> None:
    known = np.array([30, 10, -5, 20])
    for ids, expected in (
        ([10, 20, 30], [2, 4, 1]),
        ([-6, 31, -5, 15], [0, 0, 3, 0]),
        ([], []),
        (["10", "010", "x", "-5"], [2, 0, 0, 3]),
    ):
        array = np.array(ids, object if ids and isinstance(ids[0], str) else np.int64)
        found = numbers_among(known, array)
        assert (found.dtype, found.tolist()) == (np.int32, expected)
        text = np.array([str(item) for item in known], object)
        assert numbers_among(text, array).tolist() == expected
    assert numbers_among(known[:0], known).tolist() == [0, 0, 0, 0]


OPTIONS: list[dict[str, Any]] = [
    {"by": ("popularity", "repeat", "position", "length"), "cutoff": 5},
    {"protocol": "last-item", "filter_rated": True},
    {"sample_sessions": 9, "seed": 3},
    {"limit_sessions": 4, "full_sessions": True},
    {"split": "val"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("as_text", [False, True])
def test_another_order_changes_nothing(
    checkpoint: Checkpoint,
    splits: dict[str, Rows],
    tmp_path: Path,
    rng: np.random.Generator,
    options: dict[str, Any],
    as_text: bool,
) -> None:
    """Neither figures nor slices nor files; ids that are stored as text are the same ids."""
    ids = rng.permutation(IDS)
    other = write(tmp_path, "other", splits, ids.astype(str).astype(object) if as_text else ids)
    report, files = evaluated(checkpoint, other, tmp_path / "b", **options)
    assert report.pop("catalogue") == {
        "only_in_checkpoint": 0, "only_in_dataset": 0, "events_on_unknown_items": 0,
    }  # fmt: skip
    expected = evaluated(checkpoint, Dataset.open(tmp_path / "first"), tmp_path / "a", **options)
    assert (report, files) == expected


@pytest.mark.parametrize("protocol", ["every-step", "last-item"])
@pytest.mark.parametrize("split", ["test", "val"])
def test_unknown_items_are_left_out_and_what_they_cost_is_counted(
    checkpoint: Checkpoint,
    splits: dict[str, Rows],
    tmp_path: Path,
    rng: np.random.Generator,
    protocol: str,
    split: str,
) -> None:
    """The ranks are those of the data without these events, which are counted by hand."""
    ids = rng.permutation(np.append(IDS[5:], np.arange(901, 906)))
    strange = {
        name: [[item for item in row if item in ids] for row in rows]
        for name, rows in with_strangers(splits, rng).items()
    }
    lacking = strange[split]
    other = write(tmp_path, "other", strange, ids, protocol=protocol)
    unknown = sum(item > 900 for row in lacking for item in row)
    options = {"split": split, "full_sessions": True}
    with pytest.raises(InputError) as error:
        assess(checkpoint, other, EvaluationOptions(**options), CPU)
    assert f"lacks 5 items of the {split} split" in str(error.value)
    assert f", {unknown} of its {sum(map(len, lacking))} events" in str(error.value)
    assert "--drop-unknown" in str(error.value)

    report, files = evaluated(checkpoint, other, tmp_path / "b", drop_unknown=True, **options)
    known = [[item for item in row if item < 900] for row in lacking]
    if protocol == "last-item":
        known = [
            left if row and row[-1] < 900 else [] for row, left in zip(lacking, known, strict=True)
        ]
    possible, left_over = (
        sum(len(row) > 1 if protocol == "last-item" else max(len(row) - 1, 0) for row in rows)
        for rows in (lacking, known)
    )
    lost = possible - left_over
    plain = write(tmp_path, "plain", {**splits, split: known}, IDS, protocol=protocol)
    expected, plain_files = evaluated(checkpoint, plain, tmp_path / "a", **options)
    assert report["catalogue"] == {
        "only_in_checkpoint": 5, "only_in_dataset": 5, "events_on_unknown_items": unknown,
    }  # fmt: skip
    assert report["left_out"]["lost_predictions"] == lost > 0
    for name, figure in expected["metrics"].items():
        found = report["metrics"][name]
        assert found["value"] == figure["value"]
        assert found["stderr"] == figure["stderr"]
        share = report["events"] / (report["events"] + lost)
        assert found["value_with_lost_as_misses"] == pytest.approx(figure["value"] * share)
        assert found["stderr_with_lost_as_misses"] > 0

    # The same predictions in the same order, at the places that they have in the prepared sessions.
    rows = list(csv.DictReader(files["per_event"].splitlines()))
    plain_rows = list(csv.DictReader(plain_files["per_event"].splitlines()))
    assert [row["rank"] for row in rows] == [row["rank"] for row in plain_rows]
    for row in rows:
        assert lacking[int(row["session"])][int(row["event"])] == int(row["target"])
    assert f"{unknown} events on items that the checkpoint lacks" in evaluation_text(
        {**report, "dataset": "other"}
    )


def test_ranks_are_over_all_items_of_the_checkpoint(
    checkpoint: Checkpoint, splits: dict[str, Rows], tmp_path: Path
) -> None:
    """Items that the data lacks count too: the model recommends them."""
    few = {
        split: [[101 + item % 3 for item in row] for row in rows] for split, rows in splits.items()
    }
    report, files = evaluated(
        checkpoint, write(tmp_path, "few", few, IDS[[2, 0, 1]]), tmp_path / "b"
    )
    assert report["items"] == 30
    expected, plain = evaluated(checkpoint, write(tmp_path, "all", few, IDS), tmp_path / "a")
    assert (report["metrics"], files) == (expected["metrics"], plain)
    assert report["catalogue"]["only_in_checkpoint"] == 27


def test_data_without_a_prediction_left_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for name, test in (("none", [[901, 902]]), ("short", [[101, 901], [902, 102]])):
        ids = np.array([901, 902, 101, 102])
        data = write(tmp_path, name, {"train": [[901, 902]], "test": test}, ids)
        with pytest.raises(InputError, match="nothing is left to predict"):
            assess(checkpoint, data, EvaluationOptions(drop_unknown=True), CPU)


def test_first_sessions_without_a_prediction_are_refused(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    data = write(
        tmp_path, "other", {"train": [[101, 102]], "test": [[901, 101], [101, 102]]},
        np.array([901, 101, 102]),
    )  # fmt: skip
    options = EvaluationOptions(drop_unknown=True, limit_sessions=1)
    with pytest.raises(InputError, match="no event"):
        assess(checkpoint, data, options, CPU)


def test_compare_takes_checkpoints_of_the_same_items_in_any_order(
    checkpoint: Checkpoint, splits: dict[str, Rows], tmp_path: Path, rng: np.random.Generator
) -> None:
    """A model that counts pairs comes to the same scores whatever the numbers of the items."""
    baselines = []
    settings = tiny_settings(model="markov", metrics=("R@5", "RR@5"))
    for name, ids in (("one", IDS), ("two", rng.permutation(IDS))):
        data = write(tmp_path, name, splits, ids)
        config = ExperimentConfig(**{**settings, "dataset_name": name})
        baselines.append(fit(config, data, tmp_path / f"run_{name}"))
    loaded = [load_checkpoint(path) for path in baselines]
    third = write(tmp_path, "three", splits, rng.permutation(IDS))
    for data in (Dataset.open(tmp_path / "one"), Dataset.open(tmp_path / "two"), third):
        report = compare([*loaded, checkpoint], data, EvaluationOptions(), CPU, cutoff=5)
        one, two, other = report["models"].values()
        assert one["metrics"] == two["metrics"] != other["metrics"]
        assert two["differences"]["R@5"]["value"] == 0
        single = assess(checkpoint, data, EvaluationOptions(cutoff=5), CPU)
        for name, figure in single["metrics"].items():
            assert other["metrics"][name]["value"] == figure["value"]
        for name, value in single["beyond_accuracy"].items():
            assert other["beyond_accuracy"][name] == pytest.approx(value)
        assert ("catalogue" in report) == (data.name != "one")
        assert "RR@5" in comparison_text(report)


def test_compare_refuses_checkpoints_of_other_items(
    checkpoint: Checkpoint, splits: dict[str, Rows], tmp_path: Path
) -> None:
    more = write(tmp_path, "more", splits, np.append(IDS[::-1], [901, 902]))
    other = random_checkpoint(more, tmp_path / "other.pt")
    with pytest.raises(InputError, match="with 2 items in only one of them"):
        compare([checkpoint, other], more, EvaluationOptions(), CPU, cutoff=0)


def test_the_commands_take_drop_unknown(
    checkpoint: Checkpoint, splits: dict[str, Rows], tmp_path: Path, rng: np.random.Generator,
    command: Command,
) -> None:  # fmt: skip
    write(tmp_path, "next", with_strangers(splits, rng), np.append(np.arange(901, 906), IDS))
    words = [checkpoint.path, "--dataset", "next", "--data-dir", tmp_path, "--json"]
    code, out, err = command("evaluate", *words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    code, out, err = command("evaluate", *words, "--drop-unknown")
    assert code == 0
    lost = json.loads(out)["catalogue"]["events_on_unknown_items"]
    assert lost > 0
    assert "are left out" in err
    code, out, _ = command("compare", checkpoint.path, *words, "--drop-unknown")
    assert code == 0
    assert json.loads(out)["catalogue"]["events_on_unknown_items"] == lost
