"""Slices of the events: definitions checked by a loop, means that add up, errors by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import random_checkpoint
from helpers.datasets import pack_sessions, random_sessions, write_dataset

from tron_cli.data.dataset import Dataset
from tron_cli.errors import InputError
from tron_cli.evaluation.evaluate import EvaluationOptions, assess
from tron_cli.evaluation.predict import predict
from tron_cli.evaluation.slices import KINDS

CPU = torch.device("cpu")
RANGES = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 9), (10, 19), (20, 49), (50, 99), (100, math.inf)]


def range_label(value: int) -> str:
    low, high = next((low, high) for low, high in RANGES if low <= value <= high)
    return f"{low}+" if high == math.inf else str(low) if low == high else f"{low}-{high}"


def popularity_labels(train: list[list[int]], num_items: int) -> dict[int, str]:
    """Apply the definition: an item's fifth follows from the share of more popular items."""
    count = {item: sum(row.count(item) for row in train) for item in range(1, num_items + 1)}
    total = sum(count.values())
    fifth = {
        item: 5 * sum(n for n in count.values() if n > count[item]) // total
        for item in count
        if count[item]
    }
    label = dict.fromkeys(count, "not in training (0)")
    for item, number in fifth.items():
        inside = [count[other] for other in fifth if fifth[other] == number]
        label[item] = f"fifth {number + 1} ({min(inside)}-{max(inside)})"
    return label


def clustered(values: list[float], sessions: list[int]) -> float | None:
    mean = math.fsum(values) / len(values)
    totals: dict[int, float] = {}
    for value, session in zip(values, sessions, strict=True):
        totals[session] = totals.get(session, 0) + value - mean
    groups = len(totals)
    if groups < 2:
        return None
    squares = sum(total**2 for total in totals.values())
    return math.sqrt(groups / (groups - 1) * squares) / len(values)


@pytest.fixture
def train(rng: np.random.Generator) -> list[list[int]]:
    """Training sessions of very unequal popularity, without the last two items."""
    return [(rng.zipf(1.5, 6).clip(max=18)).tolist() for _ in range(60)]


@pytest.fixture
def test_sessions(rng: np.random.Generator) -> list[list[int]]:
    short = random_sessions(rng, 60, 20, longest=12)
    return [*short, rng.integers(1, 21, 130).tolist(), [19, 20, 19]]


@pytest.fixture
def dataset(tmp_path: Path, train: list[list[int]], test_sessions: list[list[int]]) -> Dataset:
    return write_dataset(tmp_path, train=train, test=test_sessions, num_items=20)


@pytest.mark.parametrize("limits", [{}, {"sample_sessions": 25}, {"limit_sessions": 25}])
@pytest.mark.parametrize("filter_rated", [False, True])
def test_slices_are_those_of_a_loop_and_partition_the_events(
    dataset: Dataset,
    train: list[list[int]],
    test_sessions: list[list[int]],
    tmp_path: Path,
    limits: dict[str, int],
    filter_rated: bool,
) -> None:
    checkpoint = random_checkpoint(dataset, tmp_path / "model.pt")
    options = EvaluationOptions(
        metrics="RR@9 R@5", full_sessions=True, filter_rated=filter_rated, by=tuple(KINDS), **limits
    )
    report = assess(checkpoint, dataset, options, CPU)
    found = predict(
        checkpoint.build_model(CPU),
        pack_sessions(test_sessions),
        protocol="every-step",
        full_sessions=True,
        filter_rated=filter_rated,
    )
    taken = set(range(len(test_sessions)))
    if "limit_sessions" in limits:
        taken = set(range(25))
    if "sample_sessions" in limits:
        drawn = np.random.default_rng(42).choice(len(test_sessions), 25, replace=False)
        taken = set(drawn.tolist())
    popularity = popularity_labels(train, 20)
    expected: dict[str, dict[str, list[tuple[int, int]]]] = {kind: {} for kind in KINDS}
    for session, event, rank in zip(
        found.session_E.tolist(), found.event_E.tolist(), found.rank_E.tolist(), strict=True
    ):
        if session not in taken:
            continue
        row = test_sessions[session]
        labels = {
            "length": range_label(len(row)),
            "position": range_label(event + 1),
            "popularity": popularity[row[event]],
            "repeat": "repeat" if row[event] in row[:event] else "new",
        }
        for kind, label in labels.items():
            expected[kind].setdefault(label, []).append((session, rank))

    assert set(report["slices"]) == set(KINDS)
    for kind, sliced in report["slices"].items():
        assert sliced["definition"] == KINDS[kind]
        slices = {row["slice"]: row for row in sliced["slices"]}
        assert set(slices) == set(expected[kind])
        assert len(slices) > 1
        for label, pairs in expected[kind].items():
            sessions = [session for session, _ in pairs]
            values = [1 / rank if 0 < rank <= 9 else 0.0 for _, rank in pairs]
            assert slices[label]["events"] == len(pairs)
            assert slices[label]["sessions"] == len(set(sessions))
            figure = slices[label]["metrics"]["RR@9"]
            assert figure["value"] == pytest.approx(np.mean(values))
            stderr = clustered(values, sessions)
            assert figure["stderr"] == (None if stderr is None else pytest.approx(stderr))
        assert sum(row["events"] for row in slices.values()) == report["events"]
        for name, total in report["metrics"].items():
            weighted = sum(row["events"] * row["metrics"][name]["value"] for row in slices.values())
            assert weighted / report["events"] == pytest.approx(total["value"])


def test_equally_popular_items_share_a_slice(tmp_path: Path) -> None:
    data = write_dataset(
        tmp_path, train=[[1, 2, 3, 4, 5]], test=[[1, 2], [3, 4], [5, 6]], num_items=6
    )
    checkpoint = random_checkpoint(data, tmp_path / "model.pt")
    report = assess(checkpoint, data, EvaluationOptions(by=("popularity",)), CPU)
    slices = report["slices"]["popularity"]["slices"]
    assert [(row["slice"], row["events"]) for row in slices] == [
        ("fifth 1 (1-1)", 2), ("not in training (0)", 1),
    ]  # fmt: skip


def test_an_unknown_kind_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(dataset, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"--by must be one of length, position, .* got 'size'"):
        assess(checkpoint, dataset, EvaluationOptions(by=("size",)), CPU)


def test_the_command_prints_a_table_of_each_kind(
    dataset: Dataset, tmp_path: Path, command: Callable[..., Any]
) -> None:
    random_checkpoint(dataset, tmp_path / "model.pt")
    words = ("evaluate", tmp_path / "model.pt", "--data-dir", tmp_path, "--metrics", "R@5")
    code, out, err = command(*words, "--by", "repeat", "--by", "length", "--by", "repeat")
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()]
    assert rows.count(["repeat", "new", "repeat"]) == 1
    assert sum(row[:2] == ["events", *row[1:2]] for row in rows if row) == 2
    for kind in ("repeat", "length"):
        assert KINDS[kind] in out
    code, out, err = command(*words, "--by", "size")
    assert (code, out) == (2, "")
    assert "size" in err
    assert "popularity" in err
