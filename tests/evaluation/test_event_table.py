"""Table of predicted events: the figures can be recomputed from it."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
import torch
from helpers.checkpoints import random_checkpoint
from helpers.datasets import random_sessions, write_dataset

from tron_cli.data.histories import Predictions
from tron_cli.errors import InputError
from tron_cli.evaluation.evaluate import EvaluationOptions, assess
from tron_cli.evaluation.event_table import write_event_table

CPU = torch.device("cpu")


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a table, without polars where possible."""
    if file.suffix.lower() == ".parquet":
        return polars.read_parquet(file).to_dicts()
    with file.open(encoding="utf-8", newline="") as lines:
        return [
            {**row, "session": int(row["session"]), "rank": int(row["rank"] or 0) or None}
            for row in csv.DictReader(lines)
        ]


@pytest.mark.parametrize("name", ["events.parquet", "events.csv", "EVENTS.CSV"])
@pytest.mark.parametrize("ids", ["text", "integers"])
@pytest.mark.parametrize("limits", [{}, {"sample_sessions": 12}])
def test_figures_and_errors_can_be_computed_from_it(
    name: str, ids: str, limits: dict[str, int], rng: np.random.Generator, tmp_path: Path
) -> None:
    test = random_sessions(rng, 40, 20, longest=12)
    item_ids = np.arange(20) * 7 - 9
    if ids == "text":
        item_ids = np.array([f'i, "{number}"\r' for number in range(20)], dtype=object)
    data = write_dataset(tmp_path, train=[[1, 2]], test=test, item_ids=item_ids)
    checkpoint = random_checkpoint(data, tmp_path / "model.pt")
    file = tmp_path / name
    report = assess(
        checkpoint,
        data,
        EvaluationOptions(metrics="RR@9", filter_rated=True, per_event=file, **limits),
        CPU,
    )
    rows = rows_of(file)
    assert list(rows[0]) == ["session", "event", "target", "rank"]
    assert len(rows) == report["events"]
    sessions = {row["session"] for row in rows}
    assert len(sessions) == report["sessions"]
    if limits:
        drawn = np.random.default_rng(42).choice(40, 12, replace=False)
        assert sessions == set(drawn.tolist())
    totals = dict.fromkeys(sessions, 0.0)
    events = dict.fromkeys(sessions, 0)
    for row in rows:
        target = item_ids[test[row["session"]][int(row["event"])] - 1]
        assert str(row["target"]) == str(target)
        totals[row["session"]] += 1 / row["rank"] if row["rank"] and row["rank"] <= 9 else 0
        events[row["session"]] += 1
    assert sum(row["rank"] is None for row in rows) == report["missed_because_filtered"] > 0
    mean = sum(totals.values()) / len(rows)
    squares = sum((totals[session] - events[session] * mean) ** 2 for session in sessions)
    groups = len(sessions)
    figure = report["metrics"]["RR@9"]
    assert figure["value"] == pytest.approx(mean)
    assert figure["stderr"] == pytest.approx(math.sqrt(groups / (groups - 1) * squares) / len(rows))


@pytest.mark.parametrize("name", ["events.parquet", "events.csv"])
def test_original_session_and_user_ids(name: str, tmp_path: Path) -> None:
    """Session 1 has no event to predict. Ids that repeat come with the session's number."""
    found = Predictions(
        np.array([0, 0, 2]), np.array([1, 2, 1]), np.array([2, 1, 2]), np.array([3, 0, 1]), None
    )
    items = np.array([70, 80])
    file = tmp_path / name
    users = np.array(["u", "v", "w"], dtype=object)
    write_event_table(file, found, items, np.array([5, 6, 7]), users)
    rows = rows_of(file)
    assert [tuple(map(str, row.values())) for row in rows] == [
        ("5", "u", "1", "80", "3"), ("5", "u", "2", "70", "None"), ("7", "w", "1", "80", "1"),
    ]  # fmt: skip
    assert list(rows[0]) == ["session", "user", "event", "target", "rank"]
    write_event_table(file, found, items, np.array([5, 6, 5]), users)
    rows = rows_of(file)
    assert list(rows[0]) == ["session", "session_number", "user", "event", "target", "rank"]
    assert [str(row["session_number"]) for row in rows] == ["0", "0", "2"]


def test_no_event_is_a_table_without_rows(tmp_path: Path) -> None:
    nothing = np.zeros(0, dtype=np.int64)
    found = Predictions(nothing, nothing, nothing, nothing, None)
    for ids in (np.array([1]), np.array(["a"], dtype=object)):
        write_event_table(tmp_path / "e.parquet", found, ids)
        assert rows_of(tmp_path / "e.parquet") == []


def test_bad_files_are_refused_before_anything_is_ranked(
    tmp_path: Path, command: Callable[..., Any]
) -> None:
    data = write_dataset(tmp_path, train=[[1, 2]], test=[[1, 2, 3]])
    checkpoint = random_checkpoint(data, tmp_path / "model.pt")
    before = checkpoint.path.read_bytes()
    (tmp_path / "folder.csv").mkdir()
    both = tmp_path / "both.csv"
    link = tmp_path / "model.csv"
    link.symlink_to(checkpoint.path)
    for words, sentence in [
        (["--per-event", tmp_path / "events.txt"], "ends in .parquet or .csv"),
        (["--per-event", tmp_path / "csv"], "ends in .parquet or .csv"),
        (["--per-event", tmp_path / "none" / "e.csv"], "name a file in a folder that exists"),
        (["--per-event", tmp_path / "folder.csv"], "it is a folder"),
        (["--per-event", "/proc/events.csv"], "cannot write /proc/events.csv"),
        (["--per-event", both, "--run", both], "--run and --per-event both name"),
        (["--per-event", both, "--qrels", tmp_path / "." / "both.csv"], "both name"),
        (["--run", checkpoint.path], "the checkpoint and --run both name"),
        (["--per-event", link], "the checkpoint and --per-event both name"),
    ]:
        code, out, err = command("evaluate", checkpoint.path, "--data-dir", tmp_path, *words)
        assert (code, out) == (2, ""), err
        assert sentence in err
        assert len(err) < 500
    assert checkpoint.path.read_bytes() == before
    assert not both.exists()


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    found = Predictions(*(np.array([1]) for _ in range(4)), None)
    with pytest.raises(InputError, match="cannot write"):
        write_event_table(tmp_path / "none" / "e.csv", found, np.array([1]))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    """A kill leaves the old table and perhaps a part of the new one, under another name."""
    file = tmp_path / "e.csv"
    file.write_text("old")
    (tmp_path / "e.csv.partial").write_text("session,ev")
    found = Predictions(*(np.array([1]) for _ in range(4)), None)
    write_event_table(file, found, np.array([5]))
    assert file.read_text() == "session,event,target,rank\n1,1,5,1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["e.csv"]
