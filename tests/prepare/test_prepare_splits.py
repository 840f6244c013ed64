"""Tables of many files, fixed dates, given splits and session ids of a user's own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from helpers.books import assert_balanced
from helpers.tables import Row, Session, shop, unpack, write_csv

from tron_cli.data.dataset import SPLITS, Dataset
from tron_cli.errors import InputError
from tron_cli.prepare.sources.table import TableColumns, prepare_table
from tron_cli.prepare.summary import summary_text

DAY = 86_400_000
START = 1_700_006_400_000  # 2023-11-15 in ms
SESSION = TableColumns("item", "time", session="user")
USER = TableColumns("item", "time", user="user")


@pytest.fixture
def rows() -> list[Row]:
    """Events on five days from 2023-11-14 22:13 on, in no order."""
    return shop(np.random.default_rng(5), users=120, days=5)


def everything(dataset: Dataset) -> dict[str, list[Session]]:
    return {split: unpack(dataset, split) for split in SPLITS}


# Many files -----------------------------------------------------------------------------------


def parts_of(rows: list[Row], folder: Path, suffix: str = "csv") -> list[Path]:
    folder.mkdir(parents=True)
    files = []
    for part in range(4):
        share = rows[part * len(rows) // 4 : (part + 1) * len(rows) // 4]
        file = folder / f"part-{part}.{suffix}"
        if suffix == "parquet":
            names = ["user", "item", "time", "kind"]
            pl.DataFrame(share, schema=names, orient="row").write_parquet(file)
        else:
            write_csv(file, share)
        files.append(file)
    return files


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("kind", ["files", "folder", "pattern", "nested", "linked"])
def test_parts_are_one_table(tmp_path: Path, rows: list[Row], suffix: str, kind: str) -> None:
    whole = prepare_table(write_csv(tmp_path / "whole.csv", rows), USER, tmp_path, "whole")
    files = parts_of(rows, tmp_path / "parts", suffix)
    (tmp_path / "parts" / "_SUCCESS").touch()
    (tmp_path / "parts" / f".part-0.{suffix}.crc").write_bytes(b"crc")
    if kind == "linked":
        (tmp_path / "elsewhere").mkdir()
        for file in files[2:]:
            file.rename(tmp_path / "elsewhere" / file.name)
        (tmp_path / "parts" / "x").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "parts" / "y").symlink_to(tmp_path / "parts")  # a circle
        (tmp_path / "elsewhere" / "z").symlink_to(tmp_path / "elsewhere")
    if kind == "nested":
        for number, file in enumerate(files):
            folder = tmp_path / "parts" / f"day={number}"
            folder.mkdir()
            file.rename(folder / file.name)
    inputs: dict[str, Any] = {
        "files": files,
        "folder": tmp_path / "parts",
        "pattern": tmp_path / "parts" / f"part-*.{suffix}",
        "nested": tmp_path / "parts",
        "linked": tmp_path / "parts",
    }
    dataset = prepare_table(inputs[kind], USER, tmp_path, "out")
    assert everything(dataset) == everything(whole)
    names = [source["file"] for source in dataset.info["sources"]]
    assert names == [file.name for file in files]
    assert all(len(source["sha256"]) == 64 for source in dataset.info["sources"])
    assert_balanced(dataset, events=len(rows))


@pytest.mark.parametrize(
    ("arrange", "problem"),
    [
        (lambda files: [files[0], files[0]], r"part-0.csv is given twice: its events"),
        (lambda files: [files[0], files[0].parent], r"part-0.csv is given twice"),
        (lambda files: [files[0], linked(files[0])], r"given twice \(as .*part-0.csv and .*link"),
        (lambda files: [files[0], hard_linked(files[0])], r"twice \(as .*part-0.csv and .*hard"),
        (lambda files: [files[0].parent / "*.tsv"], r"--input .*\*.tsv fits no file"),
        (lambda files: [files[0].parent / "no.csv"], r"no.csv is not a file, a folder or"),
        (lambda files: [emptied(files[0].parent)], r"--input .*parts is a folder without files"),
        (lambda files: [files[0], odd(files[1])], r"part-1.parquet: user holds integers, but text"),
        (lambda files: [files[0], renamed(files[1])], r"part-1.csv has no column 'item'"),
    ],
)
def test_inputs_that_make_no_sense(
    tmp_path: Path, rows: list[Row], arrange: Callable[[list[Path]], list[Path]], problem: str
) -> None:
    files = parts_of(rows, tmp_path / "parts")
    with pytest.raises(InputError, match=problem):
        prepare_table(arrange(files), USER, tmp_path, "out")
    assert not (tmp_path / "out").exists()


def test_an_unreadable_subfolder_is_refused(
    tmp_path: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = parts_of(rows, tmp_path / "parts")
    locked = tmp_path / "parts" / "locked"
    locked.mkdir()
    files[3].rename(locked / "part-3.csv")
    scandir = os.scandir

    def refuse(place: Any) -> Any:
        if Path(place) == locked:
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"--input .*locked cannot be read: Permission denied"):
        prepare_table(tmp_path / "parts", USER, tmp_path, "out")


def linked(file: Path) -> Path:
    link = file.parent.parent / "link.csv"
    link.symlink_to(file)
    return link


def hard_linked(file: Path) -> Path:
    link = file.parent.parent / "hard.csv"
    link.hardlink_to(file)
    return link


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "_SUCCESS").touch()
    return folder


def odd(file: Path) -> Path:
    frame = pl.read_csv(file).with_columns(user=pl.lit(7))
    frame.write_parquet(file.with_suffix(".parquet"))
    return file.with_suffix(".parquet")


def renamed(file: Path) -> Path:
    file.write_text(file.read_text().replace("user,item", "user,article"))
    return file


# Fixed dates ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("val_from", "test_from", "val_ms", "test_ms"),
    [
        ("2023-11-17", "2023-11-18", 2 * DAY, 3 * DAY),
        ("2023-11-17T06:00", "2023-11-18 12:30:15", 2.25 * DAY, 3 * DAY + 45_015_000),
        ("2023-11-17T02:00+02:00", "2023-11-17T19:00-05:00", 2 * DAY, 3 * DAY),
        ("2023-11-17T00:00Z", "2023-11-18T00:00:00.000Z", 2 * DAY, 3 * DAY),
    ],
)
def test_splits_at_fixed_dates_equal_brute_force(
    tmp_path: Path, rows: list[Row], val_from: str, test_from: str, val_ms: float, test_ms: float
) -> None:
    dataset = prepare_table(
        write_csv(tmp_path / "a.csv", rows), SESSION, tmp_path, "out",
        val_from=val_from, test_from=test_from, min_item_count=1,
    )  # fmt: skip
    sessions: dict[str, Session] = {}
    for user, item, at, _ in rows:
        sessions.setdefault(user, []).append((at, item))
    whole = [sorted(events, key=lambda e: e[0]) for events in sessions.values()]
    whole = [events for events in whole if len(events) >= 2]
    bounds = START + val_ms, START + test_ms
    expected: dict[str, list[Session]] = {"train": [], "val": [], "test": []}
    for events in whole:
        split = SPLITS[sum(events[0][0] >= bound for bound in bounds)]
        limit = {"train": bounds[0], "val": bounds[1], "test": np.inf}[split]
        kept = [event for event in events if event[0] < limit]
        if len(kept) >= 2:
            expected[split].append(kept)
    for split in ("train", "val"):
        got = everything(dataset)[split]
        assert sorted(map(in_any_order, got)) == sorted(map(in_any_order, expected[split]))
    assert_balanced(dataset, events=len(rows), sessions=len(sessions))
    test = unpack(dataset, "test")
    assert min(at for events in test for at, _ in events) >= bounds[1]


def in_any_order(events: Session) -> tuple[Any, ...]:
    return tuple(sorted(events))


def test_a_fixed_test_date_goes_with_days_of_validation(tmp_path: Path, rows: list[Row]) -> None:
    file = write_csv(tmp_path / "a.csv", rows)
    dataset = prepare_table(file, SESSION, tmp_path, "out", test_from="2023-11-18", val_days=0.5)
    starts = [events[0][0] for events in unpack(dataset, "val")]
    assert START + 3 * DAY > max(starts) >= min(starts) >= START + 2 * DAY
    none = prepare_table(file, SESSION, tmp_path, "none", test_from="2023-11-18", val_days=0)
    assert len(none.split("val")) == 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"test_from": "2024-02-30"}, "--test-from '2024-02-30': expected a date or time such as"),
        ({"val_from": "yesterday"}, "--val-from 'yesterday': expected a date"),
        ({"test_from": ""}, "--test-from '': expected a date"),
        ({"test_from": "2030-01-01"}, r"--test-from 2030-01-01 00:00: no session .* 2023-11-"),
        ({"test_from": "2001-01-01"}, r"--test-from 2001-01-01 00:00: every session to split"),
        ({"val_from": "2023-11-30"}, "--val-from 2023-11-30 00:00: no session to split starts"),
        ({"val_from": "2001-01-01"}, "--val-from 2001-01-01 00:00: every session"),
        (
            {"val_from": "2023-11-18", "test_from": "2023-11-18T01:00+01:00"},
            "--val-from 2023-11-18 is not before --test-from",
        ),
        ({"test_from": "2023-11-18", "test_days": 2}, "--test-days has no effect with --test-from"),
        ({"val_from": "2023-11-17", "val_days": 0}, "--val-days has no effect with --val-from"),
        ({"test_from": "2023-11-18", "leave_one_out": True}, "--test-from has no effect with --sp"),
        ({"val_from": "2023-11-18", "leave_one_out": True}, "--val-from has no effect with --spl"),
        ({"val_users": "all"}, "--val-users has no effect with --split time"),
        ({"val_users": 5, "val_days": 0, "leave_one_out": True}, "--val-users has no effect with "),
        ({"val_users": 0, "leave_one_out": True}, "--val-users 0: expected all, or a number of at"),
        ({"test_days": 1, "leave_one_out": True}, "--test-days has no effect with --split leave"),
    ],
)
def test_dates_that_make_no_sense(
    tmp_path: Path, rows: list[Row], options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        prepare_table(write_csv(tmp_path / "a.csv", rows), SESSION, tmp_path, "out", **options)


# Given splits ---------------------------------------------------------------------------------


def given(tmp_path: Path, rows: list[Row]) -> dict[str, Path]:
    """The rows of users by their number: 70 train, 20 validate, 30 test."""
    parts: dict[str, list[Row]] = {"train": [], "val": [], "test": []}
    for row in rows:
        number = int(row[0][1:])
        parts["train" if number < 70 else "val" if number < 90 else "test"].append(row)
    return {name: write_csv(tmp_path / f"{name}.csv", part) for name, part in parts.items()}


def test_tables_that_are_split_stay_as_they_are(tmp_path: Path, rows: list[Row]) -> None:
    files = given(tmp_path, rows)
    dataset = prepare_table(
        files["train"], SESSION, tmp_path, "out", val=[files["val"]], test=[files["test"]]
    )
    events: dict[str, Session] = {}
    for user, item, at, _ in rows:
        events.setdefault(user, []).append((at, item))
    known = {item for user, item, *_ in rows if int(user[1:]) < 90 and len(events[user]) >= 2}
    for split, numbers in zip(SPLITS, (range(70), range(70, 90), range(90, 120)), strict=True):
        expected = {}
        for user in (f"u{number}" for number in numbers):
            kept = sorted(events[user], key=lambda event: event[0])
            if len(kept) >= 2:
                kept = [event for event in kept if split != "test" or event[1] in known]
            if len(kept) >= 2:
                expected[user] = sorted(kept)
        ids = dataset.session_ids(split)
        assert ids is not None
        found = zip(ids[np.arange(len(ids))], map(sorted, unpack(dataset, split)), strict=True)
        assert dict(found) == expected
    assert_balanced(dataset, events=len(rows), sessions=120)
    assert [source["file"] for source in dataset.info["sources"]] == [
        "train.csv", "val.csv", "test.csv",
    ]  # fmt: skip
    assert dataset.info["options"]["split"] == "given"


def test_a_given_split_of_which_nothing_is_left_is_refused(tmp_path: Path, rows: list[Row]) -> None:
    files = given(tmp_path, rows)
    late = [(user, item, at + 30 * DAY, kind) for user, item, at, kind in rows]
    one = write_csv(tmp_path / "one.csv", late[:1])
    with pytest.raises(InputError, match=r"no session is left for the val split: .*one.csv has n"):
        prepare_table(files["train"], SESSION, tmp_path, "out", val=[one], test=[files["test"]])
    with pytest.raises(InputError, match=r"for the test split \(read [\w ]*sessions; short sessio"):
        prepare_table(files["train"], SESSION, tmp_path, "out", test=[one])
    after = write_csv(tmp_path / "after.csv", late)
    text = summary_text(prepare_table(files["train"], SESSION, tmp_path, "out", test=[after]))
    assert "No event lies in the 2" in text
    assert "counted back" not in text


def test_sessions_of_a_given_split_that_training_has_as_well_are_counted(
    tmp_path: Path, rows: list[Row]
) -> None:
    files = given(tmp_path, rows)
    text = summary_text(
        prepare_table(files["train"], SESSION, tmp_path, "out", test=[files["test"]])
    )
    assert "as well" not in text
    at_random = np.random.default_rng(2).random(len(rows)) < 0.1  # event by event: a leak
    parts = [
        write_csv(tmp_path / f"{side}.csv", [rows[at] for at in np.flatnonzero(at_random == side)])
        for side in (False, True)
    ]
    dataset = prepare_table(parts[0], SESSION, tmp_path, "leak", test=[parts[1]], val_days=0)
    train, test = (dataset.session_ids(split) for split in ("train", "test"))
    assert train is not None
    assert test is not None
    both = set(train[np.arange(len(train))]) & set(test[np.arange(len(test))])
    assert len(both) > 5
    assert f"the table for test shares the ids of {len(both)} sessions with" in summary_text(
        dataset
    )


def test_rare_items_of_given_splits_are_those_of_training(tmp_path: Path) -> None:
    train = [(f"u{n}", item, START + n * DAY, "v") for n in range(5) for item in ("a", "b")]
    train += [("u9", "a", START, "v"), ("u9", "rare", START + 1, "v"), ("u9", "b", START + 2, "v")]
    test = [("t", item, START + 9 * DAY, "v") for item in ("a", "rare", "b")] * 5
    dataset = prepare_table(
        write_csv(tmp_path / "train.csv", train), SESSION, tmp_path, "out",
        test=[write_csv(tmp_path / "test.csv", test)], val_days=0, min_item_count=5,
    )  # fmt: skip
    assert sorted(dataset.item_ids) == ["a", "b"]
    assert dataset.split_info("test")["unseen_events"] == 5
    assert_balanced(dataset, events=len(train) + len(test), sessions=7)


def test_without_val_the_last_days_of_train_validate(tmp_path: Path, rows: list[Row]) -> None:
    files = given(tmp_path, rows)
    days, date = (
        prepare_table(files["train"], USER, tmp_path, name, test=[files["test"]], **options)
        for name, options in (("days", {"val_days": 2}), ("date", {"val_from": "2023-11-17"}))
    )
    for dataset in (days, date):
        sessions = everything(dataset)
        train_end = max(events[-1][0] for events in sessions["train"])
        assert train_end < min(events[0][0] for events in sessions["val"])
        assert sessions["test"] == everything(days)["test"]
    assert min(events[0][0] for events in unpack(date, "val")) >= START + 2 * DAY


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"test_days": 1}, "--test-days has no effect with --test: leave one"),
        ({"test_from": "2023-11-17"}, "--test-from has no effect with --test"),
        ({"val": "val", "val_days": 1}, "--val-days has no effect with --val:"),
        ({"val": "val", "val_from": "2023-11-17"}, "--val-from has no effect with --val:"),
        ({"leave_one_out": True}, "--test has no effect with --split leave-one-out"),
        ({"val": "test"}, r"test.csv is given twice"),
        ({"val": "copy"}, r"copy.csv and .*test.csv hold the same sessions"),
        ({"val": "val", "test": None}, "--val goes with --train and --test"),
    ],
)
def test_given_splits_that_make_no_sense(
    tmp_path: Path, rows: list[Row], options: dict[str, Any], problem: str
) -> None:
    files = given(tmp_path, rows)
    files["copy"] = shutil.copy(files["test"], tmp_path / "copy.csv")
    named = {"test": "test", **options}
    places = {name: [files[named[name]]] if named.get(name) else [] for name in ("val", "test")}
    rest = {name: value for name, value in options.items() if name not in places}
    with pytest.raises(InputError, match=problem):
        prepare_table(files["train"], SESSION, tmp_path, "out", **places, **rest)


@pytest.mark.parametrize(
    "words", [[], ["--train=a"], ["--test=a"], ["--input=a", "--test=b"]], ids=" ".join
)
def test_the_command_takes_input_or_train_and_test(
    words: list[str], command: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = command("prepare", "table", "--item-col=i", "--time-col=t", "--name=n", *words)
    assert (code, out) == (2, "")
    assert "expected --input, or --train and --test" in err


# Session ids of a user's own ------------------------------------------------------------------


@pytest.mark.parametrize("as_text", [False, True])
def test_sessions_numbered_per_user_are_told_apart(tmp_path: Path, as_text: bool) -> None:
    """Every user has sessions 1 and 2; alone, their column would make two long sessions."""
    rows = [
        (
            f"u{user}" if as_text else str(user),
            number,
            item,
            START + user * DAY // 10 + number * 9 + item,
        )
        for user in range(100)
        for number in (1, 2)
        for item in (1, 2, 3)
    ]
    lines = ["user,visit,item,time", *(",".join(map(str, row)) for row in rows)]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    columns = TableColumns("item", "time", session="visit", user="user")
    dataset = prepare_table(tmp_path / "a.csv", columns, tmp_path, "out")
    assert_balanced(dataset, events=600, sessions=200)
    seen = set()
    for split in SPLITS:
        sessions, users = dataset.session_ids(split), dataset.user_ids(split)
        assert sessions is not None
        assert users is not None
        every = np.arange(len(sessions))
        for number, user, events in zip(
            sessions[every].tolist(), users[every].tolist(), unpack(dataset, split), strict=True
        ):
            at = START + int(str(user).lstrip("u")) * DAY // 10 + number * 9
            assert events == [(at + item, item) for item in (1, 2, 3)]
            seen.add((user, number))
    assert len(seen) == 200


def test_session_and_user_columns_are_not_both_a_history(tmp_path: Path, rows: list[Row]) -> None:
    columns = TableColumns("item", "time", session="user", user="kind")
    with pytest.raises(InputError, match="leave-one-out takes --user-col or --session-col, not bo"):
        prepare_table(
            write_csv(tmp_path / "a.csv", rows), columns, tmp_path, "out", leave_one_out=True
        )
