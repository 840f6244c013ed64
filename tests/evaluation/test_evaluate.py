"""Reports of `tron evaluate`: refusals, warnings, and the events behind the figures."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
import torch
from helpers.checkpoints import random_checkpoint
from helpers.datasets import pack_sessions, random_sessions, write_dataset

from tron_cli.checkpoint import (
    Checkpoint,
)
from tron_cli.cli.report import evaluation_text
from tron_cli.data.batches import Batch
from tron_cli.data.dataset import Dataset
from tron_cli.errors import InputError
from tron_cli.evaluation.beyond_accuracy import beyond_accuracy, count_items
from tron_cli.evaluation.evaluate import EvaluationOptions, assess
from tron_cli.evaluation.predict import predict
from tron_cli.models.sasrec import SASRec
from tron_cli.prepare.sources.table import TableColumns, prepare_table

CPU = torch.device("cpu")
TRAIN = [[1, 2, 3], [4, 5]]


@pytest.fixture
def test_sessions(rng: np.random.Generator) -> list[list[int]]:
    return random_sessions(rng, 40, 20, longest=12)


@pytest.fixture
def dataset(tmp_path: Path, test_sessions: list[list[int]]) -> Dataset:
    return write_dataset(tmp_path, train=TRAIN, test=test_sessions, val=[[1, 2]], num_items=20)


@pytest.fixture
def checkpoint(tmp_path: Path, dataset: Dataset) -> Checkpoint:
    return random_checkpoint(dataset, tmp_path / "model.pt")


def test_the_report_holds_the_figures_and_all_they_rest_on(
    checkpoint: Checkpoint, dataset: Dataset, test_sessions: list[list[int]]
) -> None:
    report = assess(checkpoint, dataset, EvaluationOptions(metrics="R@5 RR@5"), CPU)
    window = checkpoint.config.sequence_length
    events = sum(min(len(session) - 1, window) for session in test_sessions)
    ranks = predict(
        checkpoint.build_model(CPU), pack_sessions(test_sessions), protocol="every-step"
    ).rank_E
    assert report["metrics"]["R@5"]["value"] == pytest.approx(np.mean(ranks <= 5))
    assert report["metrics"]["RR@5"]["value"] == pytest.approx(np.mean((ranks <= 5) / ranks))
    assert report["metrics"]["R@5"]["stderr"] > 0
    assert report["events"] == events
    assert report["left_out"]["earlier_events"] == sum(map(len, test_sessions)) - 40 - events > 0
    assert {key: report[key] for key in ("sessions", "items", "split", "protocol", "dataset")} == {
        "sessions": 40, "items": 20, "split": "test", "protocol": "every-step", "dataset": "tiny",
    }  # fmt: skip
    assert report["checkpoint"] == str(checkpoint.path)
    assert "tie_rule" in report
    assert report["positions"].startswith("end")
    assert report["filter_rated"] is False


def test_metrics_default_to_those_of_the_config(checkpoint: Checkpoint, dataset: Dataset) -> None:
    assert set(assess(checkpoint, dataset, EvaluationOptions(), CPU)["metrics"]) == {"R@5", "RR@5"}


def test_full_sessions_leave_no_event_out(
    checkpoint: Checkpoint, dataset: Dataset, test_sessions: list[list[int]]
) -> None:
    report = assess(checkpoint, dataset, EvaluationOptions(full_sessions=True), CPU)
    assert report["events"] == sum(len(session) - 1 for session in test_sessions)
    assert report["left_out"]["earlier_events"] == 0


def test_one_pass_is_named_in_the_output(checkpoint: Checkpoint, dataset: Dataset) -> None:
    assert (
        "one pass"
        in assess(checkpoint, dataset, EvaluationOptions(one_pass=True), CPU)["positions"]
    )


def test_other_training_sessions_are_a_warning(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "tron"):
        assess(checkpoint, dataset, EvaluationOptions(), CPU)
        assert not caplog.records
        later = write_dataset(tmp_path, name="later", train=[[3, 4]], test=[[1, 2]], num_items=20)
        report = assess(checkpoint, later, EvaluationOptions(), CPU)
    assert report["events"] == 1
    assert "other sessions" in caplog.text


def test_every_step_on_leave_one_out_data_is_refused(tmp_path: Path) -> None:
    data = write_dataset(tmp_path, train=TRAIN, test=[[1, 2, 3], [4, 5]], protocol="last-item")
    checkpoint = random_checkpoint(data, tmp_path / "model.pt")
    report = assess(checkpoint, data, EvaluationOptions(), CPU)
    assert (report["protocol"], report["events"]) == ("last-item", 2)
    with pytest.raises(InputError, match="leave-one-out"):
        assess(checkpoint, data, EvaluationOptions(protocol="every-step"), CPU)


def test_one_pass_with_full_sessions_is_refused(checkpoint: Checkpoint, dataset: Dataset) -> None:
    with pytest.raises(InputError, match="--one-pass"):
        assess(checkpoint, dataset, EvaluationOptions(one_pass=True, full_sessions=True), CPU)


def test_one_file_for_run_and_qrels_is_refused(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path
) -> None:
    both = tmp_path / "both.txt"
    with pytest.raises(InputError, match=r"both name .*both\.txt"):
        assess(checkpoint, dataset, EvaluationOptions(run=both, qrels=both), CPU)
    assert not both.exists()


def test_empty_metrics_are_refused(checkpoint: Checkpoint, dataset: Dataset) -> None:
    with pytest.raises(InputError, match="no measure given"):
        assess(checkpoint, dataset, EvaluationOptions(metrics=""), CPU)


def test_an_empty_split_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    empty = write_dataset(tmp_path, name="empty", train=TRAIN, test=[], num_items=20)
    with pytest.raises(InputError, match=r"test split .* is empty"):
        assess(checkpoint, empty, EvaluationOptions(), CPU)


def test_a_measure_without_a_cutoff_is_refused(checkpoint: Checkpoint, dataset: Dataset) -> None:
    with pytest.raises(InputError, match="cutoff"):
        assess(checkpoint, dataset, EvaluationOptions(metrics="nDCG"), CPU)


def test_the_validation_split_can_be_evaluated(checkpoint: Checkpoint, dataset: Dataset) -> None:
    report = assess(checkpoint, dataset, EvaluationOptions(split="val"), CPU)
    assert (report["split"], report["events"], report["sessions"]) == ("val", 1, 1)
    assert report["metrics"]["R@5"]["stderr"] is None


def test_limit_sessions_takes_the_first_ones(
    checkpoint: Checkpoint, dataset: Dataset, test_sessions: list[list[int]]
) -> None:
    report = assess(checkpoint, dataset, EvaluationOptions(limit_sessions=3), CPU)
    window = checkpoint.config.sequence_length
    assert report["events"] == sum(min(len(row) - 1, window) for row in test_sessions[:3])
    assert (report["sessions"], report["left_out"]["sessions_beyond_limit"]) == (3, 37)
    whole = assess(checkpoint, dataset, EvaluationOptions(limit_sessions=400), CPU)
    assert (whole["sessions"], whole["left_out"]["sessions_beyond_limit"]) == (40, 0)


def test_a_sample_is_seeded_and_without_replacement(
    checkpoint: Checkpoint, dataset: Dataset, test_sessions: list[list[int]]
) -> None:
    def evaluated(**options: Any) -> dict[str, Any]:
        return assess(checkpoint, dataset, EvaluationOptions(full_sessions=True, **options), CPU)

    report = evaluated(sample_sessions=15)
    drawn = np.sort(np.random.default_rng(42).choice(40, 15, replace=False))
    chosen = [test_sessions[number] for number in drawn]
    ranks = predict(
        checkpoint.build_model(CPU), pack_sessions(chosen), protocol="every-step",
        full_sessions=True,
    ).rank_E  # fmt: skip
    assert report["events"] == len(ranks)
    assert report["metrics"]["R@5"]["value"] == pytest.approx(np.mean(ranks <= 5))
    assert report["sample"] == {"sessions": 15, "of": 40, "seed": 42}
    assert report["left_out"]["sessions_beyond_limit"] == 25
    assert evaluated(sample_sessions=15, seed=42) == report
    assert evaluated(sample_sessions=15, seed=1)["metrics"] != report["metrics"]
    more = evaluated(sample_sessions=41)
    assert more.pop("sample") == {"sessions": 40, "of": 40, "seed": 42}
    assert more == evaluated()


def test_the_error_of_a_sample_is_how_far_samples_lie_apart(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """The split is so large that a finite-population correction would not matter."""
    test = random_sessions(rng, 3000, 20, longest=6)
    data = write_dataset(tmp_path, train=TRAIN, test=test, num_items=20)
    checkpoint = random_checkpoint(data, tmp_path / "model.pt")
    figures = [
        assess(checkpoint, data, EvaluationOptions(sample_sessions=60, seed=seed), CPU)["metrics"]
        for seed in range(400)
    ]
    values = [figure["R@5"]["value"] for figure in figures]
    errors = [figure["R@5"]["stderr"] for figure in figures]
    # 400 values tell their spread to 1 / sqrt(798) = 3.5 %.
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.15)
    whole = assess(checkpoint, data, EvaluationOptions(), CPU)["metrics"]["R@5"]["value"]
    assert np.mean(values) == pytest.approx(whole, abs=4 * np.mean(errors) / np.sqrt(400))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sample_sessions": 3, "limit_sessions": 3}, "pass one of them"),
        ({"seed": 3}, "--seed is the seed of --sample-sessions"),
        ({"cutoff": -1}, "--cutoff must be from 0 to 1000, got -1"),
        ({"cutoff": 1001}, "--cutoff must be from 0 to 1000, got 1001"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: dict[str, int], sentence: str, checkpoint: Checkpoint, dataset: Dataset
) -> None:
    with pytest.raises(InputError, match=sentence):
        assess(checkpoint, dataset, EvaluationOptions(**options), CPU)


def test_a_cutoff_gives_coverage_popularity_novelty_and_serendipity(
    checkpoint: Checkpoint, dataset: Dataset, test_sessions: list[list[int]], tmp_path: Path
) -> None:
    assert "beyond_accuracy" not in assess(checkpoint, dataset, EvaluationOptions(), CPU)
    run = tmp_path / "run.txt"
    found = predict(
        checkpoint.build_model(CPU), pack_sessions(test_sessions), protocol="every-step",
        top_items=20,
    )  # fmt: skip
    assert found.top_EK is not None
    counts = count_items(dataset.split("train"), dataset.num_items)
    for cutoff, depth in ((4, 9), (15, 9), (1000, 20)):
        options = EvaluationOptions(cutoff=cutoff, metrics=f"R@{depth}", run=run)
        report = assess(
            random_checkpoint(dataset, tmp_path / "9.pt", recommendation_limit=5),
            dataset, options, CPU,
        )  # fmt: skip
        expected = vars(beyond_accuracy(found.top_EK[:, :cutoff], found.target_E, counts))
        assert expected.pop("intersection") is None
        assert report["beyond_accuracy"] == pytest.approx(expected)
        assert report["cutoff"] == min(cutoff, 20)
        assert len(run.read_text().splitlines()) == report["events"] * depth
    assert report["beyond_accuracy"]["catalogue_coverage"] == 1


def test_events_lost_in_preparation_are_also_counted_as_misses(tmp_path: Path) -> None:
    """Published session-based figures keep events whose item training lacks."""
    test = random_sessions(np.random.default_rng(0), 30, 20, longest=6)
    data = write_dataset(tmp_path, train=TRAIN, test=test, num_items=20, lost_predictions=17)
    checkpoint = random_checkpoint(data, tmp_path / "model.pt")
    report = assess(checkpoint, data, EvaluationOptions(metrics="R@5"), CPU)
    ranks = predict(checkpoint.build_model(CPU), pack_sessions(test), protocol="every-step").rank_E
    hits, events = int((ranks <= 5).sum()), sum(len(row) - 1 for row in test)
    figure = report["metrics"]["R@5"]
    assert hits > 0
    assert figure["value"] == pytest.approx(hits / events)
    assert figure["value_with_lost_as_misses"] == pytest.approx(hits / (events + 17))
    assert report["left_out"]["lost_predictions"] == 17
    limited = assess(checkpoint, data, EvaluationOptions(metrics="R@5", limit_sessions=5), CPU)
    assert "value_with_lost_as_misses" not in limited["metrics"]["R@5"]


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_error_with_lost_events_as_misses_is_clustered_by_the_sessions_that_lost_them(
    tmp_path: Path, shuffled: bool
) -> None:
    """Count from the raw log: an event without a predicted row is a miss of its session."""
    rng = np.random.default_rng(4)
    lengths: dict[int, int] = {}  # of the test sessions
    lines = []
    for visit in range(400):
        length = int(rng.integers(1, 7))
        for step in range(length):
            unseen = visit > 250 and rng.random() < 0.3
            item = 90 + rng.integers(9) if unseen else rng.integers(8)
            lines.append(f"{visit},i{item},{1_700_000_000 + visit * 1000 + step}")
        if visit > 250:
            lengths[visit] = length
    if shuffled:  # so that the sessions of the file are not in the order of their start
        lines = [lines[row] for row in rng.permutation(len(lines))]
    (tmp_path / "log.csv").write_text("\n".join(["session,item,time", *lines]) + "\n")
    data = prepare_table(
        tmp_path / "log.csv", TableColumns("item", "time", session="session"), tmp_path, "shop",
        test_days=148_500 / 86_400, val_days=0.5, min_item_count=1,
    )  # fmt: skip
    checkpoint = random_checkpoint(data, tmp_path / "model.pt")
    options = EvaluationOptions(
        metrics="RR@5", full_sessions=True, per_event=tmp_path / "events.parquet"
    )
    report = assess(checkpoint, data, options, CPU)
    totals = {visit: 0.0 for visit, length in lengths.items() if length > 1}
    events = {visit: lengths[visit] - 1 for visit in totals}
    for row in polars.read_parquet(tmp_path / "events.parquet").to_dicts():
        totals[row["session"]] += 1 / row["rank"] if row["rank"] <= 5 else 0
    count, groups = sum(events.values()), len(totals)
    mean = sum(totals.values()) / count
    squares = sum((totals[visit] - events[visit] * mean) ** 2 for visit in totals)
    assert report["left_out"]["lost_predictions"] == count - report["events"] > 100
    assert groups > report["sessions"]
    figure = report["metrics"]["RR@5"]
    assert figure["value_with_lost_as_misses"] == pytest.approx(mean)
    assert figure["stderr_with_lost_as_misses"] == pytest.approx(
        np.sqrt(groups / (groups - 1) * squares) / count
    )
    lost_file = data.path / "test" / "lost_predictions.npy"
    lost_file.unlink()
    with pytest.raises(InputError, match=r"lost_predictions\.npy of the test split .* is damaged"):
        assess(checkpoint, data, options, CPU)
    del data.split_info("test")["files"]  # as earlier versions prepared it
    older = assess(checkpoint, data, options, CPU)
    assert older["metrics"]["RR@5"] == {**figure, "stderr_with_lost_as_misses": None}
    assert "for its error, prepare the dataset again" in evaluation_text(older)
    np.save(lost_file, np.ones(3, np.int32))
    with pytest.raises(InputError, match=r"lost_predictions\.npy of the test split .* is damaged"):
        assess(checkpoint, data, options, CPU)


def test_each_lost_prediction_of_leave_one_out_data_is_a_session(tmp_path: Path) -> None:
    test = [[1, 2, 3], [4, 5], [2, 1], [3, 3]]
    data = write_dataset(
        tmp_path, train=TRAIN, test=test, protocol="last-item", lost_predictions=3, num_items=6
    )
    checkpoint = random_checkpoint(data, tmp_path / "model.pt")
    figure = assess(checkpoint, data, EvaluationOptions(metrics="RR@5"), CPU)["metrics"]["RR@5"]
    ranks = predict(checkpoint.build_model(CPU), pack_sessions(test), protocol="last-item").rank_E
    values = [*np.where(ranks <= 5, 1 / ranks, 0), 0, 0, 0]
    assert figure["value_with_lost_as_misses"] == pytest.approx(np.mean(values))
    assert figure["stderr_with_lost_as_misses"] == pytest.approx(
        np.std(values, ddof=1) / np.sqrt(7)
    )


def test_lost_events_count_as_misses_only_where_whole_sessions_are_predicted(
    tmp_path: Path,
) -> None:
    """Lost events were counted over whole sessions, not over the last events of long ones."""
    data = write_dataset(
        tmp_path, train=TRAIN, test=[[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]], num_items=20,
        lost_predictions=17,
    )  # fmt: skip
    checkpoint = random_checkpoint(data, tmp_path / "model.pt", sequence_length=6)
    last_six = assess(checkpoint, data, EvaluationOptions(metrics="R@19"), CPU)
    assert last_six["left_out"]["lost_predictions"] == 17
    assert "value_with_lost_as_misses" not in last_six["metrics"]["R@19"]
    whole = assess(checkpoint, data, EvaluationOptions(metrics="R@20", full_sessions=True), CPU)
    assert whole["metrics"]["R@20"]["value_with_lost_as_misses"] == pytest.approx(9 / (9 + 17))


def test_lost_predictions_count_only_for_the_protocol_they_were_counted_for(
    tmp_path: Path,
) -> None:
    """The number of events lost for every-step does not tell how many last items were lost."""
    data = write_dataset(
        tmp_path, train=TRAIN, test=[[1, 2], [3, 4]], num_items=20, lost_predictions=17
    )
    checkpoint = random_checkpoint(data, tmp_path / "model.pt")
    report = assess(checkpoint, data, EvaluationOptions(protocol="last-item"), CPU)
    assert all("value_with_lost_as_misses" not in figure for figure in report["metrics"].values())


@pytest.mark.parametrize("in_config", [False, True])
def test_filter_rated_defaults_to_the_config_and_can_be_overridden(
    in_config: bool, tmp_path: Path
) -> None:
    data = write_dataset(tmp_path, train=TRAIN, test=[[1, 2, 1], [3, 4, 5]], num_items=20)
    checkpoint = random_checkpoint(data, tmp_path / "model.pt", filter_rated=in_config)
    missed = {
        asked: assess(checkpoint, data, EvaluationOptions(filter_rated=asked), CPU)[
            "missed_because_filtered"
        ]
        for asked in (None, False, True)
    }
    assert missed == {None: int(in_config), False: 0, True: 1}


def test_references_are_shown_where_they_hold(tmp_path: Path) -> None:
    best = {"best": {"R@5": 0.7}}
    data = write_dataset(
        tmp_path, train=TRAIN, test=[[1, 2, 3], [3, 4]], num_items=20, references={"test": best}
    )
    checkpoint = random_checkpoint(data, tmp_path / "model.pt")
    assert assess(checkpoint, data, EvaluationOptions(), CPU)["references"] == best
    for changes in ({"filter_rated": True}, {"protocol": "last-item"}, {"limit_sessions": 1}):
        assert "references" not in assess(checkpoint, data, EvaluationOptions(**changes), CPU)


def test_a_run_file_is_as_deep_as_the_limit_or_the_largest_cutoff(
    dataset: Dataset, tmp_path: Path
) -> None:
    checkpoint = random_checkpoint(dataset, tmp_path / "model.pt", recommendation_limit=9)
    for metrics, depth in (("R@5", 9), ("R@12", 12)):
        run = tmp_path / "run.txt"
        report = assess(checkpoint, dataset, EvaluationOptions(metrics=metrics, run=run), CPU)
        assert len(run.read_text().splitlines()) == report["events"] * depth


def test_lists_are_no_longer_than_the_catalogue(dataset: Dataset, tmp_path: Path) -> None:
    """A limit of a billion would take 8 GB for each event."""
    checkpoint = random_checkpoint(dataset, tmp_path / "model.pt", recommendation_limit=10**9)
    run = tmp_path / "run.txt"
    report = assess(checkpoint, dataset, EvaluationOptions(run=run), CPU)
    assert len(run.read_text().splitlines()) == report["events"] * dataset.num_items


def test_no_forward_pass_sees_more_histories_than_eval_batch_size(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = random_checkpoint(dataset, tmp_path / "model.pt", eval_batch_size=7)
    rows: list[int] = []
    forward = SASRec.forward

    def counted(self: SASRec, batch: Batch, *others: Any) -> Any:
        rows.append(len(batch.lengths_B))
        return forward(self, batch, *others)

    monkeypatch.setattr(SASRec, "forward", counted)
    assess(checkpoint, dataset, EvaluationOptions(), CPU)
    assert max(rows) == 7


def test_a_dataset_prepared_again_while_it_is_ranked_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared(visit: str) -> Dataset:
        rows = [
            f"{visit}{n},{n % 7},{1_700_000_000 + n * 9000 + e}" for n in range(60) for e in (0, 1)
        ]
        (tmp_path / "log.csv").write_text("\n".join(["visit,product,ts", *rows]))
        return prepare_table(
            tmp_path / "log.csv", TableColumns("product", "ts", session="visit"), tmp_path, "tiny",
            force=True,
        )  # fmt: skip

    def ranked(*args: Any, **options: Any) -> Any:
        prepared("other")
        return predict(*args, **options)

    data = prepared("visit")
    checkpoint = random_checkpoint(data, tmp_path / "model.pt")
    files = {
        "run": tmp_path / "a.run",
        "qrels": tmp_path / "a.qrels",
        "per_event": tmp_path / "a.csv",
    }
    asked = EvaluationOptions(by=("popularity",), cutoff=3, **files)
    expected = assess(checkpoint, data, asked, CPU)
    contents = {name: path.read_text() for name, path in files.items()}
    monkeypatch.setattr("tron_cli.evaluation.evaluate.predict", ranked)
    assert assess(checkpoint, Dataset.open(data.path), asked, CPU) == expected
    assert contents == {name: path.read_text() for name, path in files.items()}
    assert "visit" in contents["run"]


def test_what_is_needed_after_the_ranking_is_looked_at_before(
    tmp_path: Path, checkpoint: Checkpoint, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tron_cli.evaluation.evaluate.predict", lambda *_, **__: pytest.fail("ranked")
    )
    (dataset.path / "train" / "items.npy").write_bytes(b"rubbish")
    with pytest.raises(InputError, match="the train split"):
        assess(checkpoint, dataset, EvaluationOptions(by=("popularity",)), CPU)
