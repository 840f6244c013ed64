"""Events in = events out + drops that are named, for every source."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.books import assert_balanced
from helpers.click_logs import write_diginetica, write_yoochoose
from helpers.datasets import pack_sessions
from helpers.tables import SESSION, USER, shop, write_csv

from tron_cli.data.dataset import DatasetWriter
from tron_cli.errors import RunError
from tron_cli.prepare.filters import Steps
from tron_cli.prepare.sources.diginetica import prepare_diginetica
from tron_cli.prepare.sources.ml1m import prepare_ml1m
from tron_cli.prepare.sources.otto import prepare_otto
from tron_cli.prepare.sources.sequences import prepare_sequences
from tron_cli.prepare.sources.table import prepare_table
from tron_cli.prepare.sources.yoochoose import prepare_yoochoose
from tron_cli.prepare.write import check_books

DAY = 86_400_000
START = 1_700_000_000_000
TRIES = range(6)


@pytest.mark.parametrize("seed", TRIES)
@pytest.mark.parametrize("most", [3, 10**6])
@pytest.mark.parametrize("kind", ["sessions", "users", "leave-one-out"])
def test_books_of_a_table(tmp_path: Path, seed: int, most: int, kind: str) -> None:
    rows = shop(np.random.default_rng(seed), users=80, days=5)
    dataset = prepare_table(
        write_csv(tmp_path / "a.csv", rows),
        SESSION if kind == "sessions" else USER,
        tmp_path,
        "out",
        leave_one_out=kind == "leave-one-out",
        min_item_count=1 + seed,
        max_val_sessions=most,
        val_days=seed % 2,
    )
    users = len({row[0] for row in rows})
    assert_balanced(dataset, events=len(rows), sessions=None if kind == "users" else users)


def test_books_of_a_table_of_which_some_kinds_are_kept(tmp_path: Path) -> None:
    rows = shop(np.random.default_rng(0), users=80, days=5)
    columns = type(SESSION)("item", "time", session="user", event="kind", keep_events=("view",))
    dataset = prepare_table(write_csv(tmp_path / "a.csv", rows), columns, tmp_path, "out")
    assert_balanced(dataset, events=len(rows))


@pytest.mark.parametrize("seed", TRIES)
def test_books_of_yoochoose_and_diginetica(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    events = [
        (session, int(rng.zipf(1.5)) % 40, START + session * DAY // 20 + int(rng.integers(9)))
        for session in range(800)
        for _ in range(min(int(rng.geometric(0.35)), 9))
    ]
    most = int(rng.choice([3, 10**6]))
    for prepare, raw in (
        (prepare_yoochoose, write_yoochoose(tmp_path / "y", events)),
        (prepare_diginetica, write_diginetica(tmp_path / "d", events)),
    ):
        dataset = prepare(raw, tmp_path, val_days=seed % 3, max_val_sessions=most)
        assert_balanced(dataset, events=len(events), sessions=800)


@pytest.mark.parametrize("seed", TRIES)
def test_books_of_otto(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    events = 0
    for part, days in (("train", (0, 6)), ("test", (6, 7))):
        with (tmp_path / f"otto-recsys-{part}.jsonl").open("w") as file:
            for number in range(150):
                at = START + int(rng.integers(days[0] * DAY, days[1] * DAY))
                rows = [
                    {
                        "aid": int(rng.integers(60)),
                        "ts": at + n * DAY // 3,
                        "type": str(rng.choice(["clicks", "clicks", "carts", "orders"])),
                    }
                    for n in range(int(rng.integers(6)))
                ]
                events += len(rows)
                file.write(json.dumps({"session": number, "events": rows}) + "\n")
    dataset = prepare_otto(
        tmp_path, tmp_path, val_days=seed % 3, max_val_sessions=int(rng.choice([3, 10**6]))
    )
    assert_balanced(dataset, events=events, sessions=300)


@pytest.mark.parametrize("seed", TRIES)
@pytest.mark.parametrize("with_val", [False, True])
def test_books_of_sequences(tmp_path: Path, seed: int, with_val: bool) -> None:
    rng = np.random.default_rng(seed)
    files, events, sessions = [], 0, 0
    for name, items in (("train", 30), ("test", 60), ("val", 30)):
        rows = [rng.integers(items, size=rng.integers(1, 5)).tolist() for _ in range(200)]
        (tmp_path / name).write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
        files.append(tmp_path / name)
        if name != "val" or with_val:
            events += sum(map(len, rows))
            sessions += len(rows)
    train, test, val = files
    dataset = prepare_sequences(
        train, test, tmp_path, "out", val=val if with_val else None, max_val_sessions=5
    )
    assert_balanced(dataset, events=events, sessions=sessions)


@pytest.mark.parametrize("seed", TRIES)
def test_books_of_ml1m(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [
        f"{user} {int(rng.zipf(1.5)) % 50}\n"
        for user in range(1, 300)
        for _ in range(int(rng.integers(1, 9)))
    ]
    (tmp_path / "ml-1m.txt").write_text("".join(rows))
    dataset = prepare_ml1m(tmp_path / "ml-1m.txt", tmp_path)
    assert_balanced(dataset, events=len(rows), sessions=299)


def test_books_that_do_not_balance_are_an_internal_error(tmp_path: Path) -> None:
    steps = Steps()
    steps.record("read", [pack_sessions([[1, 2], [1, 2, 3]])], "")
    with DatasetWriter(tmp_path / "out") as writer:
        written = [writer.write_split("train", [pack_sessions([[1, 2]])])]
    with pytest.raises(RunError, match=r"internal error: .* 2 sessions and 5 events, but 1 ses"):
        check_books(steps, written, "every-step")
