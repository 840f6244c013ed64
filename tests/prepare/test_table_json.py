"""JSON lines: keys, values that are no ids, and files that are JSON but not lines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from helpers.table_files import few
from helpers.tables import SESSION, START

from tron_cli.errors import InputError
from tron_cli.prepare.sources.table import TableColumns, prepare_table


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ('{"id": 1}', "found \"{'id': 1}\""),
        ("[1, 2]", "found '[1, 2]'"),
        ("[]", "found '[]'"),
        ('"\\ud800"', "found"),
        ('"a\\u0000b"', "found"),
        ("9007199254740993.0", "found '9007199254740993.0'"),
        ("0.12345678901234567891", "found '0.12345678901234567891'"),
        ("1.5", "found '1.5'"),
        ("-0.0", "found '-0.0'"),
        ("1e20", "found '1E+20'"),
        ("true", "found 'True'"),
        ("false", "found 'False'"),
        ("null", "found nothing"),
        ('""', "found nothing"),
        ('" \u00a0\\t"', "found"),
        ('"NULL"', "found 'NULL', which means a missing value (see --null-tokens)"),
    ],
)
@pytest.mark.parametrize("column", ["user", "item"])
def test_values_of_json_that_are_no_ids(
    tmp_path: Path, column: str, value: str, found: str
) -> None:
    file = tmp_path / "a.jsonl"
    lines = [json.dumps(row) for row in few([1, 2, 3]).to_dicts()]
    bad = f'{{"{column}": {value}, "{"item" if column == "user" else "user"}": 1, "time": {START}}}'
    file.write_text("\n".join([*lines[:4], bad, *lines[4:]]))
    with pytest.raises(
        InputError, match=r"a\.jsonl, line 5: expected an id without line breaks"
    ) as error:
        prepare_table(file, SESSION, tmp_path, "out")
    assert found in str(error.value)
    dataset = prepare_table(file, SESSION, tmp_path, "out", skip_bad_lines=True)
    assert dataset.info["bad_lines"]["count"] == 1
    assert sorted(dataset.item_ids.tolist()) == [1, 2, 3]


@pytest.mark.parametrize("first", ["5", '["user"]', "[[1]]", '"user"', "null"])
def test_lines_of_json_that_are_no_objects_have_no_keys(tmp_path: Path, first: str) -> None:
    file = tmp_path / "a.jsonl"
    few([1, 2, 3]).write_ndjson(file)
    file.write_text(file.read_text() + first + "\n")
    with pytest.raises(InputError, match=r"no column 'thing': its columns are user, item, time$"):
        prepare_table(file, replace(SESSION, item="thing"), tmp_path, "out", skip_bad_lines=True)


def test_a_key_within_another_value_does_not_stand_twice(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = [
        json.dumps({"more": {"item": 8, "x": [{"item": 9}]}, **row, "é": '"item":', "a": "item"})
        for row in few([1, 2, 3]).to_dicts()
    ]
    file.write_text("\n".join(line.replace(": ", ":") for line in lines))
    assert prepare_table(file, SESSION, tmp_path, "out").item_ids.tolist() == [1, 2, 3]


def test_texts_of_json_that_look_like_lists_are_ids(tmp_path: Path) -> None:
    ids = [
        "1.5",
        "-0",
        "[new]",
        "{sale}",
        '{"id": 1}',
        "12345678901234567890",
        "-1",
        "true",
        "False",
    ]
    file = tmp_path / "a.jsonl"
    few(ids).write_ndjson(file)
    assert prepare_table(file, SESSION, tmp_path, "out").item_ids.tolist() == ids


def test_a_json_array_is_named_in_a_short_sentence(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for indent in (None, 1):
        file.write_text(json.dumps(few([1, 2, 3]).to_dicts() * 500, indent=indent))
        with pytest.raises(InputError, match=r"a\.jsonl is a JSON array: expected one object per"):
            prepare_table(file, SESSION, tmp_path, "out", skip_bad_lines=True)


def test_objects_of_json_over_several_lines_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(row, indent=2) for row in few([1, 2, 3]).to_dicts()))
    with pytest.raises(InputError, match=r"a\.jsonl has objects of several lines: .* as jq -c"):
        prepare_table(file, SESSION, tmp_path, "out")


def test_columns_of_json_are_found_as_those_of_csv(tmp_path: Path) -> None:
    frame = few([1, 2, 3]).select(
        pl.col("user").alias("sessionId"), pl.col("item").alias("item_id:token"), pl.col("time")
    )
    frame.write_ndjson(tmp_path / "a.jsonl")
    columns = TableColumns("item_id", "Time", session="session_id")
    assert prepare_table(tmp_path / "a.jsonl", columns, tmp_path, "out").num_items == 3
    wrong = TableColumns("item", "time", session="sessionId")
    problem = "no column 'item': its columns are sessionId, item_id:token, time"
    with pytest.raises(InputError, match=problem):
        prepare_table(tmp_path / "a.jsonl", wrong, tmp_path, "wrong")


def test_keys_of_json_that_the_first_lines_lack(tmp_path: Path) -> None:
    """Events without an item may lack its key."""
    file = tmp_path / "a.jsonl"
    page = json.dumps({"user": 1, "time": START, "kind": "page"}) + "\n"
    few([1, 2, 3]).with_columns(kind=pl.lit("view")).write_ndjson(file)
    file.write_text(page * 3000 + file.read_text())
    columns = replace(SESSION, event="kind", keep_events=("view",))
    assert prepare_table(file, columns, tmp_path, "out").num_items == 3
