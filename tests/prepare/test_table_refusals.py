"""Wrong options and bad lines of a table are refused in a sentence, or skipped and counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.table_files import CSV, FORMATS, few
from helpers.tables import START, USER, shop, write_csv

from tron_cli.errors import InputError
from tron_cli.prepare.sources.table import TableColumns, prepare_table
from tron_cli.prepare.summary import summary_text


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        (TableColumns("item", "time"), "expected --session-col, --user-col or both"),
        (TableColumns("item", "time", session="user", user="user"), "expected different columns"),
        (TableColumns("item", "time", user="user", event="kind"), "go together"),
        (TableColumns("item", "time", user="user", keep_events=("view",)), "go together"),
        (TableColumns("item", "time", session="user", session_gap="30m"), "goes with --user-col"),
        (TableColumns("item", "when", user="user"), "no column 'when': its columns are user, item"),
        (TableColumns("item", "item", user="user"), "expected different columns"),
        (TableColumns("", "time", user="user"), "a column for --item-col and --time-col"),
        (TableColumns("item", "", user="user"), "a column for --item-col and --time-col"),
        (TableColumns("item", "time", user="user", time_unit="h"), "--time-unit 'h'"),
        (TableColumns("item", "time", user="user", session_gap="x"), "expected a duration"),
        (
            TableColumns("item", "time", user="user", session_gap="9" * 400 + "d"),
            "longer than a thousand years",
        ),
    ],
)
def test_wrong_options(tmp_path: Path, columns: TableColumns, problem: str) -> None:
    file = write_csv(tmp_path / "events.csv", [("u", "i", START, "view")])
    with pytest.raises(InputError, match=problem):
        prepare_table(file, columns, tmp_path, "out")
    assert [path.name for path in tmp_path.iterdir()] == ["events.csv"]


@pytest.mark.parametrize(
    ("name", "line", "problem"),
    [
        ("a.csv", "u1,i1,2024-01-01", "expected 4 fields separated by ',', found 3"),
        (
            "a.csv",
            "u1,,1700000000000,view",
            "expected an id without line breaks in item, found nothing",
        ),
        (
            "a.csv",
            ",i1,1700000000000,view",
            "expected an id without line breaks in user, found nothing",
        ),
        ("a.csv", "u1,i1,yesterday,view", "in time, found 'yesterday'"),
        ("a.csv", '"u1"x,i1,1700000000000,view', "a quote opens a field and does not close it"),
        ("a.csv", '"u1","i\n1",1700000000000,view', "expected an id without line breaks in item"),
        ("a.jsonl", '{"user": "u1", "item": "i1"', "cannot be parsed"),
        ("a.jsonl", '{"user": "u1", "item": "i1"}', "in time, found nothing"),
        ("a.jsonl", '["u1", "i1", 1700000000000]', ""),
        ("a.jsonl", '{"user": "u1", "item": "i1", "time": "soon"}', "in time, found 'soon'"),
        ("a.jsonl", '{"user": "u1", "item": "i1", "item": "i2", "time": 1}', "the key 'item'"),
        ("a.jsonl", '{"user": "u1", "time": 1, "item": "i1","time": 2}', "the key 'time'"),
        ("a.jsonl", '{"user" :"u1", "user" : "u2", "item": "i1", "time": 1}', "the key 'user'"),
        ("a.jsonl", '{"user": "u1", "item": "i1", "\\u0069tem": 1, "time": 1}', "the key 'item'"),
        (
            "a.jsonl",
            '{"item": [1], "user": 1, "time": 1, "x": ' + "[" * 1010 + "]" * 1010 + "}",
            "",
        ),
        ("a.jsonl", "7", ""),
        ("a.jsonl", '"user"', ""),
        ("a.jsonl", '[["u1"], {}]', ""),
        (
            "a.csv",
            "  ,i1,1700000000000,view",
            "expected an id without line breaks in user, found '  '",
        ),
    ],
)
def test_bad_lines_are_named_or_skipped(
    tmp_path: Path, rng: np.random.Generator, name: str, line: str, problem: str
) -> None:
    file = tmp_path / name
    FORMATS["events" + file.suffix](file, shop(rng, users=150, days=4))
    clean = prepare_table(file, USER, tmp_path, "clean")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:20], line, *lines[20:], line, lines[-1]]))
    with pytest.raises(InputError) as error:
        prepare_table(file, USER, tmp_path, "bad")
    assert f"{name}, line 21: " in str(error.value)
    assert problem in str(error.value)
    assert not (tmp_path / "bad").exists()
    file.write_text("\n".join([*lines[:20], line, *lines[20:], line]))
    skipped = prepare_table(file, USER, tmp_path, "skipped", skip_bad_lines=True)
    assert skipped.info["splits"] == clean.info["splits"]
    assert skipped.info["bad_lines"]["count"] == 2


def test_bad_lines_are_counted_by_kind(tmp_path: Path, rng: np.random.Generator) -> None:
    """Each bad line has one kind: that of the first fault in the order of the checks."""
    file = tmp_path / "a.csv"
    FORMATS["events.csv"](file, shop(rng, users=150, days=4))
    bad = [
        *3 * ["u1,i1,yesterday,view"],
        *2 * ["u1,i1"],
        "u1,,1700000000000,view",
        "NULL,i1,1700000000000,view",
        "u1,i1,,view",
        "  ,i1,yesterday,view",
        '"u1"x,i1,1700000000000,view',
    ]
    expected = {
        "unreadable time": 3,
        "wrong number of fields": 2,
        "missing user": 1,
        "missing item": 1,
        "missing time": 1,
        "unreadable user": 1,
        "unclosed quote": 1,
    }
    file.write_text("\n".join([file.read_text().rstrip(), *bad]))
    with file.open("ab") as content:
        content.write(b"\nu1,\xff,1700000000000,view\n")
    dataset = prepare_table(file, USER, tmp_path, "out", skip_bad_lines=True)
    found = dataset.info["bad_lines"]
    assert found["kinds"] == {**expected, "not UTF-8": 1}
    assert found["count"] == 11
    assert list(found["kinds"])[:2] == ["unreadable time", "wrong number of fields"]
    shown = "11 bad lines were skipped (unreadable time: 3, wrong number of fields: 2, "
    assert shown in summary_text(dataset)


def test_bad_json_lines_are_counted_by_kind(tmp_path: Path, rng: np.random.Generator) -> None:
    file = tmp_path / "a.jsonl"
    FORMATS["events.jsonl"](file, shop(rng, users=150, days=4))
    bad = ["{broken", '{"user": "u1", "time": 1700000000000, "event": "view"}', "7"]
    bad += ['{"user": "u1", "item": [1], "time": 1700000000000, "event": "view"}']
    file.write_text("\n".join([file.read_text().rstrip(), *bad]))
    dataset = prepare_table(file, USER, tmp_path, "out", skip_bad_lines=True)
    expected = {"unreadable line": 2, "missing item": 1, "unreadable item": 1}
    assert dataset.info["bad_lines"]["kinds"] == expected


def test_one_column_is_not_two(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [("u1", "i1", START, "view")])
    with pytest.raises(InputError, match="'Item' and 'item' are both the column 'item'"):
        prepare_table(file, TableColumns("item", "time", session="Item"), tmp_path, "out")


def test_a_wrong_column_is_named_before_a_bad_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(CSV + b"u,i\n")
    with pytest.raises(InputError, match="no column 'thing': its columns are user, item, time"):
        prepare_table(tmp_path / "a.csv", replace(USER, item="thing"), tmp_path, "out")


def test_test_days_go_with_a_split_by_time(
    tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    few([1, 2, 3, 1]).write_csv(tmp_path / "a.csv")
    words = ["prepare", "table", "--input", tmp_path / "a.csv", "--item-col", "item"]
    words += ["--time-col", "time", "--user-col", "user", "--data-dir", tmp_path]
    words += ["--name", "out", "--split", "leave-one-out"]
    code, _, error = command(*words, "--test-days", 1)
    assert (code, "--test-days has no effect with --split leave-one-out" in error) == (2, True)
    assert command(*words)[0] == 0
