"""`tron_cli.prepare` from Python: every source of the command, data frames, bad input."""

from __future__ import annotations

import inspect
import tempfile
import typing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pytest

from tron_cli.api.preparation import BOUNDS, SOURCES, options_of, prepare
from tron_cli.cli.prepare import app
from tron_cli.errors import InputError

COLUMNS = {"session_col": "session", "item_col": "item", "time_col": "time"}
COMMANDS = {
    command.name or command.callback.__name__: inspect.signature(
        command.callback, eval_str=True
    ).parameters
    for command in app.registered_commands
    if command.callback is not None
}


@pytest.fixture
def events(rng: np.random.Generator) -> pl.DataFrame:
    """400 visits of 20 days; the next item is the one after."""
    rows = []
    for visit in range(400):
        first, start = int(rng.integers(12)), 1_740_787_200 + int(rng.integers(20 * 86_400))
        for place in range(int(rng.integers(2, 7))):
            rows.append((f"v{visit}", f"SKU-{(first + place) % 12}", start + place))
    return pl.DataFrame(rows, schema=["session", "item", "time"], orient="row")


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_has_the_options_of_its_command(source: str) -> None:
    """With the same defaults, choices and bounds."""
    assert set(SOURCES) == set(COMMANDS)
    known = options_of(source)
    seen = {"sessions"} if source == "synthetic" else set()
    for name, option in COMMANDS[source].items():
        kind, info = typing.get_args(option.annotation)[:2]
        word = info.default if isinstance(info.default, str) else name
        name = word.removeprefix("--").replace("-", "_")
        if name in ("name", "data_dir", "json"):
            continue
        seen.add(name)
        hint, default = known[name]
        assert (default is option.empty) == (option.default is option.empty), name
        assert default in (option.default, None, ()), name  # None: the source's own
        assert (info.min, info.max) == BOUNDS.get(name, (None, None)), name
        if typing.get_origin(kind) is Literal:
            assert typing.get_args(hint) == typing.get_args(kind), name
    assert known.keys() == seen


def test_a_data_frame_is_prepared_as_its_file_is(events: pl.DataFrame, tmp_path: Path) -> None:
    file = tmp_path / "events.csv"
    events.write_csv(file)
    given: dict[str, Any] = {"csv": file, "list": [str(file)], "polars": events}
    found = {
        name: prepare("table", name=name, data_dir=tmp_path, input=table, **COLUMNS)
        for name, table in given.items()
    }
    assert found["csv"].path == tmp_path / "csv"
    fingerprints = {
        (each.catalogue_fingerprint, each.split_info("train")["fingerprint"])
        for each in found.values()
    }
    assert len(fingerprints) == 1
    assert found["csv"].num_items == 12


def test_a_data_frame_of_pandas(events: pl.DataFrame, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(events.to_dict(as_series=False))
    frame["time"] = pandas.to_datetime(frame["time"], unit="s")
    found = prepare("table", name="pandas", data_dir=tmp_path, input=frame, **COLUMNS)
    expected = prepare("table", name="polars", data_dir=tmp_path, input=events, **COLUMNS)
    assert found.split_info("test")["fingerprint"] == expected.split_info("test")["fingerprint"]


def test_tables_already_split_and_words(events: pl.DataFrame, tmp_path: Path) -> None:
    kinds = events.with_columns(kind=pl.lit("view"))
    early, late = (
        kinds.filter(pl.col.time < 1_742_000_000),
        kinds.filter(pl.col.time >= 1_742_000_000),
    )
    for number, words in enumerate(("view,click", ["view", "click"])):
        with pytest.raises(InputError, match="no event of the kind click"):
            prepare("table", name=f"shop-{number}", data_dir=tmp_path, train=early, test=late,
                    event_col="kind", keep_events=words, **COLUMNS)  # fmt: skip
    found = prepare("table", name="shop", data_dir=str(tmp_path), train=early, test=[late],
                    event_col="kind", keep_events=["view"], null_tokens=[], **COLUMNS)  # fmt: skip
    assert found.info["options"]["keep_events"] == ["view"]
    assert found.info["options"]["null_tokens"] == []


def test_sequences(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("".join(f"{i % 7} {(i + 1) % 7}\n" for i in range(60)))
    (tmp_path / "test.txt").write_text("1 2\n3 4\n")
    files = {split: str(tmp_path / f"{split}.txt") for split in ("train", "test")}
    found = prepare("sequences", name="lines", data_dir=tmp_path, **files)
    assert found.num_items == 7


def test_synthetic_has_the_name_of_its_source(tmp_path: Path) -> None:
    found = prepare("synthetic", data_dir=tmp_path, sessions=12_000)
    assert found.path == tmp_path / "synthetic"
    with pytest.raises(InputError, match="synthetic"):
        prepare("synthetic", data_dir=tmp_path, sessions=12_000)
    assert prepare("synthetic", data_dir=tmp_path, sessions=12_000, force=True).num_items == 5000


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("tabel", {}, "no source 'tabel' of datasets; did you mean 'table'"),
        ("shop", {}, "no source 'shop' of datasets; there are table"),
        (5, {}, "source must be text, got 5"),
        ("synthetic", {"sessions": -1}, "sessions must be at least 1, got -1"),
        ("table", {}, r"prepare\('table'\) needs the name of the dataset"),
        ("table", {"name": "x"}, r"prepare\('table'\) needs item_col and time_col"),
        ("table", {"name": "x", "sesion_col": "s"}, "'sesion_col'; did you mean session_col"),
        ("table", {"name": "x", "item_col": 5}, "item_col must be text, got 5"),
        ("table", {"name": "x", "split": "days"}, "split must be 'time' or 'leave-one-out'"),
        ("table", {"name": "x", "min_item_count": 0}, "min_item_count must be at least 1, got 0"),
        ("table", {"name": "x", "max_bad_share": 2}, "max_bad_share must be from 0 to 1, got 2"),
        ("table", {"name": "x", "val_days": "1"}, "val_days must be a number or None, got '1'"),
        ("table", {"name": "x", "item_col": "i", "time_col": "t"}, "expected --input"),
        ("table", {"name": "x", "item_col": "i", "time_col": "t", "input": 5}, "input must be"),
        ("table", {"name": "x", "item_col": "i", "time_col": "t", "input": [5]}, "must be a path"),
        ("table", {"name": "x", **COLUMNS, "input": "no.csv"}, "no.csv"),
        ("sequences", {"name": "x", "train": "a"}, "expected --train and --test, or --input for"),
        ("sequences", {"name": "x", "lines": "user"}, "lines must be 'items' or 'user-items' or"),
        ("ml1m", {"raw": 5}, "raw must be a path or None, got 5"),
        ("ml1m", {"data_dir": None}, "data_dir must be a path, got None"),
        ("synthetic", {"name": 5}, "name must be text or None, got 5"),
        ("synthetic", {"name": "a/b"}, "a/b"),
        ("synthetic", {"force": "yes"}, "force must be True or False, got 'yes'"),
        ("synthetic", {"sessions": 10}, "never occur in the training part of 10 sessions"),
    ],
)
def test_wrong_input_is_one_sentence(
    tmp_path: Path, source: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        prepare(source, **{"data_dir": tmp_path, **options})
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"time": pl.lit("soon")},
            "the data frame input, row 1: expected .* in time, found 'soon'",
        ),
        ({"item": pl.lit(None)}, "the data frame input, row 1: .* in item, found nothing"),
        ({"session": pl.lit([1])}, "the data frame input: expected .* in session, found the type"),
        ({"Item": pl.lit("a")}, "the data frame input has 2 columns named 'ITEM'"),
    ],
)
def test_an_error_names_the_data_frame_its_row_and_its_column(
    events: pl.DataFrame, tmp_path: Path, changes: dict[str, pl.Expr], message: str
) -> None:
    frame = events.with_columns(**changes)
    columns = {**COLUMNS, "item_col": "ITEM" if "Item" in changes else "item"}
    with pytest.raises(InputError, match=f"^{message}") as error:
        prepare("table", name="x", data_dir=tmp_path, input=frame, **columns)
    assert tempfile.gettempdir() not in str(error.value).replace(str(tmp_path), "")


def test_each_of_several_data_frames_has_a_name(events: pl.DataFrame, tmp_path: Path) -> None:
    late = events.with_columns(time=pl.when(pl.col.session == "v7").then(None).otherwise("time"))
    row = late["time"].is_null().arg_max()
    assert row is not None
    frames = [events, late]
    with pytest.raises(InputError, match=f"^the data frame input 2, row {row + 1}: .* in time"):
        prepare("table", name="x", data_dir=tmp_path, input=frames, **COLUMNS)
    with pytest.raises(InputError, match=r"^the data frame test has no column 'item': its columns"):
        prepare("table", name="x", data_dir=tmp_path, train=events, test=events.drop("item"),
                **COLUMNS)  # fmt: skip
    found = prepare(
        "table", name="x", data_dir=tmp_path, input=frames, skip_bad_lines=True, **COLUMNS
    )
    assert found.info["bad_lines"]["first"].startswith(f"the data frame input 2, row {row + 1}: ")
    names = ["the data frame input 1", "the data frame input 2"]
    assert [source["file"] for source in found.info["sources"]] == names
    assert found.info["options"]["input"] == names


def test_a_column_of_pandas_that_cannot_be_read_is_named(
    events: pl.DataFrame, tmp_path: Path
) -> None:
    """Columns that are not used may hold anything."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(events.to_dict(as_series=False))
    frame["note"] = [object(), *[1] * (len(frame) - 1)]
    prepare("table", name="shop", data_dir=tmp_path, input=frame, **COLUMNS)
    frame["item"] = [5, *frame["item"][1:]]
    with pytest.raises(InputError, match=r"^the data frame input, column item: .*; convert it"):
        prepare("table", name="x", data_dir=tmp_path, input=frame, **COLUMNS)


def test_a_column_of_objects_is_named(tmp_path: Path) -> None:
    frame = pl.DataFrame({"item": [object()], "time": [1], "session": [1]})
    with pytest.raises(InputError, match=r"^the data frame input, column item: .*; convert it"):
        prepare("table", name="x", data_dir=tmp_path, input=frame, **COLUMNS)


def test_nothing_is_printed(
    events: pl.DataFrame, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare("table", name="shop", data_dir=tmp_path, input=events, **COLUMNS)
    assert capfd.readouterr().out == ""
