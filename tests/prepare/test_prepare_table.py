"""A user's own table: the same result from every format, and an honest split."""

from __future__ import annotations

import gzip
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from helpers.tables import DAY, MINUTE, SESSION, START, USER, Row, Session, shop, unpack, write_csv
from hypothesis import given, settings
from hypothesis import strategies as st

from tron_cli.data.dataset import Dataset
from tron_cli.errors import InputError
from tron_cli.prepare.sources.table import TableColumns, prepare_table

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")


def brute_force(
    rows: list[Row],
    *,
    gap: int | None,
    leave_one_out: bool,
    min_length: int,
    min_count: int,
    val_days: float,
    test_days: float,
) -> dict[str, Any]:
    numbered: dict[str, list[tuple[int, int, str]]] = {}
    for number, (user, item, at, _) in enumerate(rows):
        numbered.setdefault(user, []).append((at, number, item))
    sessions: list[list[tuple[int, int, str]]] = []
    for events in numbered.values():
        events.sort()
        current = [events[0]]
        for event in events[1:]:
            if gap is not None and event[0] - current[-1][0] > gap:
                sessions.append(current)
                current = []
            current.append(event)
        sessions.append(current)
    sessions.sort(key=lambda events: min(number for _, number, _ in events))  # as in the file
    least = max(min_length, 3) if leave_one_out else min_length
    sessions = [events for events in sessions if len(events) >= least]
    support = Counter(item for events in sessions for _, _, item in events)
    sessions = [[e for e in events if support[e[2]] >= min_count] for events in sessions]
    sessions = [events for events in sessions if len(events) >= least]
    plain = [[(at, item) for at, _, item in events] for events in sessions]
    if leave_one_out:
        held = 2 if val_days > 0 else 1
        period = [events[:-1] for events in plain]
        train = [events[:-held] for events in plain if len(events) - held >= 2]
        val = period if val_days > 0 else []
        known = {item for events in period for _, item in events}
        test = [events for events in plain if events[-1][1] in known]
        lost = len(plain) - len(test)
    else:

        def divide(whole: list[Session], days: float) -> tuple[list[Session], list[Session]]:
            if not whole:
                return [], []
            limit = max(events[0][0] for events in whole) - days * DAY
            late = [events for events in whole if events[0][0] >= limit]
            start = min(events[0][0] for events in late)
            early = [[e for e in s if e[0] < start] for s in whole if s[0][0] < limit]
            return [events for events in early if len(events) >= 2], late

        period, test = divide(plain, test_days)
        train, val = divide(period, val_days) if val_days > 0 else (period, [])
        known = {item for events in period for _, item in events}
        before = sum(len(events) - 1 for events in test)
        test = [[e for e in events if e[1] in known] for events in test]
        test = [events for events in test if len(events) >= 2]
        lost = before - sum(len(events) - 1 for events in test)
    splits = {"train": train, "val": val, "test": test}
    ordered = {name: sorted(part, key=lambda s: s[0][0]) for name, part in splits.items()}
    return {**ordered, "lost": lost, "items": len(known)}


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    users=st.integers(1, 60),
    gap=st.booleans(),
    leave_one_out=st.booleans(),
    min_length=st.integers(2, 3),
    min_count=st.integers(1, 5),
    val_days=st.sampled_from([0, 0.5, 1]),
)
def test_table_equals_brute_force(
    seed: int,
    users: int,
    gap: bool,
    leave_one_out: bool,
    min_length: int,
    min_count: int,
    val_days: float,
) -> None:
    rows = shop(np.random.default_rng(seed), users=users, days=4)
    expected = brute_force(
        rows,
        gap=30 * MINUTE if gap and not leave_one_out else None,
        leave_one_out=leave_one_out,
        min_length=min_length,
        min_count=min_count,
        val_days=val_days,
        test_days=1,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_csv(folder / "events.csv", rows)

        def prepare() -> Dataset:
            return prepare_table(
                file,
                USER if gap else SESSION,
                folder,
                "out",
                leave_one_out=leave_one_out,
                min_session_length=min_length,
                min_item_count=min_count,
                val_days=val_days,
            )

        if not expected["train"] or not expected["test"]:
            with pytest.raises(InputError, match="no session is left"):
                prepare()
            return
        dataset = prepare()
        for split in ("train", "val", "test"):
            assert unpack(dataset, split) == expected[split]
        assert dataset.split_info("test")["lost_predictions"] == expected["lost"]
        assert dataset.num_items == expected["items"]
        assert dataset.protocol == ("last-item" if leave_one_out else "every-step")
        if not leave_one_out:
            ends = [[s[-1][0] for s in expected[split]] for split in ("train", "val")]
            starts = [[s[0][0] for s in expected[split]] for split in ("val", "test")]
            for before, after in zip(ends, starts, strict=True):
                assert max(before, default=0) < min(after, default=2**62)


def test_long_sessions_do_not_carry_the_test_period_into_training(tmp_path: Path) -> None:
    """One user is active every hour of ten days; training must end before the first test event."""
    rows = [("always", f"i{hour % 5}", START + hour * 60 * MINUTE, "view") for hour in range(240)]
    for day in range(10):
        rows += [(f"u{day}", f"i{n}", START + day * DAY + n, "view") for n in range(5)]
    dataset = prepare_table(write_csv(tmp_path / "a.csv", rows), SESSION, tmp_path, "out")
    train, val, test = (unpack(dataset, split) for split in ("train", "val", "test"))
    assert [len(part) for part in (train, val, test)] == [7, 2, 2]
    longest = max(train, key=len)
    assert longest[-1][0] < min(session[0][0] for session in val)
    assert len(longest) == 6 * 24
    (late,) = [step for step in dataset.info["filters"] if step["step"] == "late events"]
    assert (late["dropped_sessions"], late["dropped_events"]) == (0, 240 - len(longest))


def test_only_the_kinds_to_keep(tmp_path: Path, rng: np.random.Generator) -> None:
    rows = shop(rng, users=200, days=4)
    views = [row for row in rows if row[3] == "view"]
    columns = TableColumns("item", "time", user="user", event="kind", keep_events=("view",))
    dataset = prepare_table(write_csv(tmp_path / "all.csv", rows), columns, tmp_path, "kept")
    expected = prepare_table(write_csv(tmp_path / "views.csv", views), USER, tmp_path, "views")
    assert dataset.info["splits"] == expected.info["splits"]
    first, second = dataset.info["filters"][:2]
    assert (first["events"], second["events"]) == (len(rows), len(views))
    assert second["dropped_events"] == len(rows) - len(views)
    wrong = TableColumns("item", "time", user="user", event="kind", keep_events=("buy", "sell"))
    with pytest.raises(InputError, match="no event of the kind buy or sell: its kind holds cart, "):
        prepare_table(tmp_path / "all.csv", wrong, tmp_path, "none")


def test_every_kind_to_keep_must_occur(tmp_path: Path, rng: np.random.Generator) -> None:
    file = write_csv(tmp_path / "all.csv", shop(rng, users=200, days=4))
    wrong = TableColumns("item", "time", user="user", event="kind", keep_events=("view", "crat"))
    with pytest.raises(InputError, match=r"all\.csv has no event of the kind crat: .* cart, view;"):
        prepare_table(file, wrong, tmp_path, "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_rows_of_other_kinds_need_nothing_but_their_line(
    tmp_path: Path, rng: np.random.Generator, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searches without item, pages without time, events of no kind: dropped, and no bad lines."""
    rows = [row for row in shop(rng, users=150, days=4) if row[3] == "view"]
    expected = prepare_table(write_csv(tmp_path / "views.csv", rows), USER, tmp_path, "views")
    others = [("u1", "", START, "search"), ("u2", "i1", "", "page"), ("u3", "", START, "")]
    frame = pl.DataFrame(
        [[str(value) or None for value in row] for row in [*others * 100, *rows, *others]],
        schema=["user", "item", "time", "kind"],
        orient="row",
    )
    write = {"a.csv": frame.write_csv, "a.jsonl": frame.write_ndjson}
    write.get(name, frame.write_parquet)(tmp_path / name)
    monkeypatch.setattr("tron_cli.prepare.reading.columns.BLOCK_BYTES", 500)
    monkeypatch.setattr("tron_cli.prepare.reading.parquet.PARQUET_ROWS", 50)
    columns = TableColumns("item", "time", user="user", event="kind", keep_events=("view",))
    dataset = prepare_table(tmp_path / name, columns, tmp_path, "out")
    assert dataset.info["splits"] == expected.info["splits"]
    first, second = dataset.info["filters"][:2]
    assert (first["events"], second["dropped_events"]) == (len(rows) + 303, 303)
    wrong = TableColumns("item", "time", user="user", event="kind", keep_events=("buy",))
    with pytest.raises(InputError, match="its kind holds nothing, page, search, view"):
        prepare_table(tmp_path / name, wrong, tmp_path, "none")


def test_what_is_left_of_the_kinds_is_told_where_nothing_is(tmp_path: Path) -> None:
    rows = [(f"u{n // 3}", f"i{n % 3}", START + n, "view") for n in range(30)]
    columns = TableColumns("item", "time", session="user", event="kind", keep_events=("view",))
    problem = r"no session is left for the train split \(read 10 sessions; short "
    with pytest.raises(InputError, match=problem):
        prepare_table(write_csv(tmp_path / "a.csv", rows), columns, tmp_path, "out", test_days=30)


@needs_shared
def test_recbole_movielens_100k(tmp_path: Path) -> None:
    file = SHARED / "ml100k" / "ml-100k.inter.gz"
    columns = TableColumns("item_id", "timestamp", user="user_id")
    dataset = prepare_table(file, columns, tmp_path, "ml", leave_one_out=True, min_item_count=1)
    read = dataset.info["filters"][0]
    assert (read["sessions"], read["events"], read["items"]) == (943, 100_000, 1_682)
    with gzip.open(file, "rt") as lines:
        rows = [line.split("\t") for line in lines.read().splitlines()[1:]]
    parsed = [(user, int(item), int(at) * 1000, "") for user, item, _, at in rows]
    expected = brute_force(
        parsed, gap=None, leave_one_out=True, min_length=2, min_count=1, val_days=1, test_days=1
    )
    for split in ("train", "val", "test"):
        assert unpack(dataset, split) == expected[split]
    test = dataset.split_info("test")
    assert test["sessions"] + test["lost_predictions"] == 943


def test_a_wrong_latest_time_is_named_where_it_leaves_test_empty(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    rows = shop(rng, users=200, days=4)
    file = write_csv(tmp_path / "a.csv", rows)
    year_9999 = [("u", f"i{n}", 253_402_300_000_000 + n, "view") for n in (3, 6, 9)]
    write_csv(file, [*rows[:10], *year_9999, *rows[10:]])
    problem = (
        r"a\.csv, line 14: the latest time, 9999-12-31 23:46, is 7,976 years after the "
        r"other sessions, so that 1 of \d+ would be held out; correct it or remove it"
    )
    with pytest.raises(InputError, match=problem):
        prepare_table(file, SESSION, tmp_path, "out")
    # A session that begins as others do, and a gap that is no longer than the log, are no errors.
    write_csv(file, [*rows, (rows[0][0], rows[0][1], 253_402_300_000_000, "view")])
    prepare_table(file, SESSION, tmp_path, "long")


def test_last_items_that_the_histories_lack_are_named(tmp_path: Path) -> None:
    rows = [(f"u{user}", f"{user}-{n}", START + n, "view") for user in range(5) for n in range(4)]
    problem = "of the 5 different last items of its 5 sessions, training has 0; give longer hist"
    with pytest.raises(InputError, match=problem):
        prepare_table(
            write_csv(tmp_path / "a.csv", rows),
            USER,
            tmp_path,
            "out",
            leave_one_out=True,
            min_item_count=1,
        )


def test_test_items_that_training_lacks_are_named(tmp_path: Path) -> None:
    rows = [
        (f"u{day}{user}", f"{'old' if day < 3 else 'new'}{n}", START + day * DAY + n, "view")
        for day in range(5)
        for user in range(5)
        for n in range(3)
    ]
    problem = "for the test split: of the 3 different items of its 10 sessions, training has 0;"
    with pytest.raises(InputError, match=problem):
        prepare_table(write_csv(tmp_path / "a.csv", rows), SESSION, tmp_path, "out")


@pytest.mark.parametrize("val_users", ["all", 7])
def test_the_users_that_validate_are_counted_or_all(tmp_path: Path, val_users: Any) -> None:
    rows = shop(np.random.default_rng(0), users=60, days=4)
    words: dict[str, Any] = {"leave_one_out": True, "max_val_sessions": 9}
    file = write_csv(tmp_path / "events.csv", rows)
    dataset = prepare_table(file, USER, tmp_path, "out", val_users=val_users, **words)
    plain = prepare_table(file, USER, tmp_path, "plain", **words)
    histories = {tuple(history) for history in unpack(dataset, "test")}
    val = [tuple(history) for history in unpack(dataset, "val")]
    whole = [tuple(history[:-1]) for history in unpack(dataset, "test")]
    assert len(histories) == dataset.split_info("test")["sessions"]
    assert len(unpack(plain, "val")) == 9
    assert len(val) == (7 if val_users == 7 else len(whole))
    assert set(val) <= set(whole)
    assert unpack(dataset, "train") == unpack(plain, "train")
