"""TREC files, from which other tools compute the figures of `tron evaluate`."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import polars
import pytest
import torch
from helpers.checkpoints import random_checkpoint
from helpers.datasets import random_sessions, tiny_settings, write_dataset

from tron_cli.checkpoint import dataset_identity, encode_item_ids, load_checkpoint, save_checkpoint
from tron_cli.config import ExperimentConfig
from tron_cli.errors import InputError
from tron_cli.evaluation.evaluate import EvaluationOptions, assess
from tron_cli.evaluation.predict import Predictions
from tron_cli.evaluation.trec import write_qrels, write_run
from tron_cli.models.base import build_model
from tron_cli.prepare.sources.table import TableColumns, prepare_table

MEASURES = "R@20 nDCG@10 RR@20"


def evaluated(
    folder: Path, item_ids: np.ndarray, test: list[list[int]], **options: Any
) -> dict[str, Any]:
    """Evaluate a random model with many ties and write run.trec and qrels.trec."""
    dataset = write_dataset(folder, test=test, item_ids=item_ids)
    config = ExperimentConfig(**tiny_settings(recommendation_limit=5))
    torch.manual_seed(1)
    model = build_model(config, dataset.num_items)
    with torch.no_grad():
        model.item_table[:] = torch.randint(-1, 2, model.item_table.shape)
        model.item_table[4] = model.item_table[2]
        model.item_table[9:13] = 0
    save_checkpoint(
        folder / "model.pt",
        config=config,
        model=model,
        step=1,
        epoch=0,
        metrics={},
        dataset=dataset_identity(dataset),
        item_ids=encode_item_ids(dataset.item_ids),
        training={},
    )
    return assess(
        load_checkpoint(folder / "model.pt"),
        dataset,
        EvaluationOptions(
            metrics=MEASURES, run=folder / "run.trec", qrels=folder / "qrels.trec", **options
        ),
        torch.device("cpu"),
    )


def awkward_ids(count: int) -> np.ndarray:
    """Text ids with spaces, tabs, percent signs, and one that looks like another's escape."""
    ids = [f"item {number}" for number in range(count)]
    ids[:8] = ["a b", "a%20b", "100%", "a\tb", "é ü", "%", "no\u00a0break", "\u2028line"]
    return np.array(ids, dtype=object)


@pytest.fixture
def sessions(rng: np.random.Generator) -> list[list[int]]:
    return random_sessions(rng, 25, 30)


@pytest.mark.parametrize("filter_rated", [False, True])
@pytest.mark.parametrize("num_items", [12, 30])  # fewer items than the cutoff, and more
@pytest.mark.parametrize("ids", ["text", "integers"])
def test_ir_measures_scores_the_files_to_the_same_figures(
    ids: str, num_items: int, filter_rated: bool, rng: np.random.Generator, tmp_path: Path
) -> None:
    item_ids = awkward_ids(num_items) if ids == "text" else np.arange(num_items) * 7 - 20
    test = random_sessions(rng, 25, num_items)
    report = evaluated(tmp_path, item_ids, test, filter_rated=filter_rated)
    found = ir_measures.calc_aggregate(
        [ir_measures.parse_measure(name) for name in MEASURES.split()],
        list(ir_measures.read_trec_qrels(str(tmp_path / "qrels.trec"))),
        list(ir_measures.read_trec_run(str(tmp_path / "run.trec"))),
    )
    assert {str(measure) for measure in found} == set(report["metrics"])
    for measure, value in found.items():
        assert report["metrics"][str(measure)]["value"] == pytest.approx(value, abs=1e-9)


@pytest.mark.slow
def test_the_ir_measures_command_agrees(sessions: list[list[int]], tmp_path: Path) -> None:
    report = evaluated(tmp_path, awkward_ids(30), sessions)
    words = [tmp_path / "qrels.trec", tmp_path / "run.trec", MEASURES, "--places", "9"]
    done = subprocess.run(
        [sys.executable, "-m", "ir_measures", *map(str, words)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    figures = dict(line.split("\t") for line in done.stdout.splitlines())
    assert set(figures) == set(report["metrics"])
    for name, value in figures.items():
        assert report["metrics"][name]["value"] == pytest.approx(float(value), abs=1e-9)


def test_run_has_six_columns_ranks_from_one_and_strictly_falling_scores(
    sessions: list[list[int]], tmp_path: Path
) -> None:
    evaluated(tmp_path, np.arange(1000, 1030), sessions)
    lists: dict[str, list[list[str]]] = {}
    for line in (tmp_path / "run.trec").read_text().splitlines():
        columns = line.split()
        assert len(columns) == 6
        lists.setdefault(columns[0], []).append(columns)
    window = tiny_settings()["sequence_length"]
    queries = [
        f"s{number}_e{event}"
        for number, session in enumerate(sessions)
        for event in range(max(1, len(session) - window), len(session))
    ]
    assert list(lists) == queries
    for rows in lists.values():
        assert [row[1] for row in rows] == ["Q0"] * 20
        assert [int(row[3]) for row in rows] == list(range(1, 21))
        scores = [float(row[4]) for row in rows]
        assert all(a > b for a, b in pairwise(scores))
        assert len({row[2] for row in rows}) == 20


def test_qrels_hold_the_original_id_of_every_target(
    sessions: list[list[int]], tmp_path: Path
) -> None:
    evaluated(tmp_path, np.arange(1000, 1030), sessions, full_sessions=True)
    assert (tmp_path / "qrels.trec").read_text().splitlines() == [
        f"s{number}_e{event} 0 {999 + item} 1"
        for number, session in enumerate(sessions)
        for event, item in enumerate(session)
        if event
    ]


def test_ids_with_whitespace_are_escaped_without_ambiguity(
    sessions: list[list[int]], tmp_path: Path
) -> None:
    test = [[9, item] for item in range(1, 9)]
    evaluated(tmp_path, awkward_ids(30), test)
    lines = (tmp_path / "qrels.trec").read_text(encoding="utf-8").split("\n")[:-1]
    assert [line.split(" ")[2] for line in lines] == [
        "a%20b", "a%2520b", "100%25", "a%09b", "é%20ü", "%25", "no%C2%A0break", "%E2%80%A8line",
    ]  # fmt: skip


@pytest.mark.parametrize("place", ["missing/run.trec", "folder"])
def test_a_file_that_cannot_be_written_is_an_input_error(place: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    found = Predictions(*(np.array([1]) for _ in range(4)), np.array([[1, 2]]))
    for write in (write_run, write_qrels):
        with pytest.raises(InputError, match="cannot write"):
            write(tmp_path / place, found, np.array([5, 6]))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def found_events(*pairs: tuple[int, int]) -> Predictions:
    session_E, event_E = np.array(pairs, dtype=np.int64).T
    ones = np.ones(len(pairs), dtype=np.int64)
    return Predictions(session_E, event_E, ones, ones, ones[:, None])


@pytest.mark.parametrize(
    ("ids", "queries"),
    [
        (None, ["s0_e1", "s0_e2", "s2_e1"]),
        (np.array([70, -5, 80]), ["70_e1", "70_e2", "80_e1"]),
        (np.array([70, 70, 80]), ["70_s0_e1", "70_s0_e2", "80_s2_e1"]),  # also without event
        (np.array(["a b", "x", "a%20b"], object), ["a%20b_e1", "a%20b_e2", "a%2520b_e1"]),
        (np.array(["", "x", "_e1"], object), ["_e1", "_e2", "_e1_e1"]),
        (np.array(["é\t", "x", "x"], object), ["é%09_s0_e1", "é%09_s0_e2", "x_s2_e1"]),
    ],
)
def test_queries_are_named_by_the_ids_of_the_sessions(
    ids: np.ndarray | None, queries: list[str], tmp_path: Path
) -> None:
    found = found_events((0, 1), (0, 2), (2, 1))
    for write in (write_run, write_qrels):
        write(tmp_path / "file", found, np.array([9]), ids)
        lines = (tmp_path / "file").read_text(encoding="utf-8").splitlines()
        assert [line.split(" ")[0] for line in lines] == queries


@pytest.mark.parametrize("ids", [["a", "b"], ["1", "2"], ["x", "x_s0"], ["x", "x"], ["_s1_e1", ""]])
def test_no_two_events_share_a_query(ids: list[str], tmp_path: Path) -> None:
    pairs = [(session, event) for session in range(2) for event in range(1, 12)]
    write_qrels(tmp_path / "q", found_events(*pairs), np.array([9]), np.array(ids, object))
    lines = (tmp_path / "q").read_text().splitlines()
    assert len({line.split(" ")[0] for line in lines}) == len(pairs)


@pytest.mark.parametrize("source", ["sessions", "users"])
@pytest.mark.parametrize("limits", [{}, {"sample_sessions": 9}])
def test_files_of_a_prepared_log_join_back_to_it(
    source: str, limits: dict[str, int], tmp_path: Path
) -> None:
    """Every query leads to a session of the log that contains the target."""
    rng = np.random.default_rng(2)
    log: dict[str, list[str]] = {}
    lines = ["user,session,item,time"]
    for visit in range(300):
        user, start = f"user {visit % 15}", 1_700_000_000 + visit * 5_000
        key = user if source == "users" else f"v{visit}"
        for step in range(int(rng.integers(2, 7))):
            item = f"i{rng.integers(12)}"
            log.setdefault(key, []).append(item)
            lines.append(f"{user},v{visit},{item},{start + step}")
    file = tmp_path / "log.csv"
    file.write_text("\n".join(lines) + "\n")
    columns = TableColumns(
        "item", "time",
        session="session" if source == "sessions" else None,
        user="user" if source == "users" else None,
        session_gap="30m" if source == "users" else None,
    )  # fmt: skip
    data = prepare_table(file, columns, tmp_path, "shop", test_days=3, val_days=2, min_item_count=1)
    checkpoint = random_checkpoint(data, tmp_path / "model.pt")
    run, qrels, table = (tmp_path / name for name in ("run", "qrels", "events.parquet"))
    options = EvaluationOptions(run=run, qrels=qrels, per_event=table, **limits)
    report = assess(checkpoint, data, options, torch.device("cpu"))
    queries = [line.split(" ") for line in qrels.read_text().splitlines()]
    rows = polars.read_parquet(table).to_dicts()
    assert len(rows) == len(queries) == report["events"] > 0
    assert {line.split(" ")[0] for line in run.read_text().splitlines()} == {q[0] for q in queries}
    for (query, _, target, _), row in zip(queries, rows, strict=True):
        name = query.rpartition("_e")[0].replace("%20", " ")
        if source == "users":  # of whom some have several sessions
            assert name == f"{row['user']}_s{row['session']}"
            name = row["user"]
        assert name == row["user" if source == "users" else "session"]
        assert target == row["target"]
        assert target in log[name]
        assert query.endswith(f"_e{row['event']}")
        if source != "users":
            assert log[name][row["event"]] == target
    assert ("user" in rows[0]) == (source != "sessions")
