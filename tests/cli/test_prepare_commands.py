"""`tron prepare ...` as a person runs it: tables, --json, exit codes, and how fast help answers."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tron_cli.api.preparation import SOURCES, options_of
from tron_cli.cli.prepare import app
from tron_cli.data.dataset import Dataset
from tron_cli.errors import InputError
from tron_cli.evaluation.reference import reference_figures
from tron_cli.prepare.sources import table
from tron_cli.prepare.sources.table import TableColumns
from tron_cli.prepare.summary import agrees, summary_text

DAY = 86_400_000
START = 1_700_000_000_000


def prepare(*words: object) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def events(tmp_path: Path) -> Path:
    """100 sessions of 3 events over 10 days; an item that only the last session has."""
    rows = ["session,item,time"]
    for session in range(100):
        at = START + session * DAY // 10
        rows += [f"s{session},item{(session + n) % 7},{at + n}" for n in range(3)]
    rows += [f"s99,new,{at + 3 + n}" for n in range(5)] + ["s5,rare,1700000000000", "s7x,item1,0"]
    file = tmp_path / "events.csv"
    file.write_text("\n".join(rows))
    return file


TABLE = ("--session-col", "session", "--item-col", "item", "--time-col", "time", "--name", "shop")


def test_table_prints_what_came_in_what_was_dropped_and_the_splits(
    tmp_path: Path, events: Path
) -> None:
    result = prepare("table", "--input", events, *TABLE, "--data-dir", tmp_path)
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert f"{tmp_path / 'shop'}: every-step, 7 items" in lines
    for line in (
        "read 101 307 9 0 0",
        "short sessions (fewer than 2 events) 100 306 9 1 1",
        "rare items (fewer than 5 events) 100 305 8 0 1",
        "short sessions again (fewer than 2 events left) 100 305 8 0 0",
        "train 78 234 3.00 3 3 0.0 % 2023-11-14 22:13 2023-11-22 15:01",
        "val 11 33 3.00 3 3 0.0 % 2023-11-22 17:25 2023-11-23 17:25",
        "test 11 33 3.00 3 3 0.0 % 2023-11-23 19:49 2023-11-24 19:49",
    ):
        assert line in lines
    assert "Test lost 5 events of items that training lacks, and with them 5 predictions" in (
        result.stdout
    )
    info = Dataset.open(tmp_path / "shop").info
    assert (info["source"], info["sources"][0]["file"]) == ("table", "events.csv")
    assert info["sources"][0]["bytes"] == events.stat().st_size
    assert info["options"]["min_item_count"] == 5


def test_times_far_after_all_others_are_pointed_out(tmp_path: Path, events: Path) -> None:
    """A session with a wrong clock becomes the whole test split; after a year it is refused."""
    words = ("table", "--input", events, *TABLE, "--data-dir", tmp_path, "--force")
    assert "No event lies in" not in prepare(*words).stdout
    right = events.read_text()
    wrong = "".join(f"\nwrong,item{n},1717200000000" for n in (1, 2))
    events.write_text(right + wrong)
    out = prepare(*words).stdout
    assert "No event lies in the 189 days before 2024-06-01 00:00" in out
    assert "test 1 2 2.00 2 2 0.0 % 2024-06-01 00:00 2024-06-01 00:00" in [
        " ".join(line.split()) for line in out.splitlines()
    ]
    events.write_text(right + wrong.replace("1717200000000", "4070908800000"))
    with pytest.raises(
        InputError, match="line 309: the latest time, 2099-01-01 00:00, is 75 years"
    ):
        prepare(*words)


def test_json_prints_dataset_json(tmp_path: Path, events: Path) -> None:
    result = prepare("table", "--input", events, *TABLE, "--data-dir", tmp_path, "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "shop/dataset.json").read_text())


def test_skipped_lines_are_reported(tmp_path: Path, events: Path) -> None:
    events.write_text(events.read_text() + "\nbroken\n")
    words = ("table", "--input", events, *TABLE, "--data-dir", tmp_path)
    with pytest.raises(InputError, match=r"events.csv, line 309: expected 3 fields"):
        prepare(*words)
    result = prepare(*words, "--skip-bad-lines")
    line = "1 bad line was skipped (wrong number of fields); the first: events.csv, line 309:"
    assert line in result.stdout


def test_options_reach_the_table(tmp_path: Path, events: Path) -> None:
    words = ("table", "--input", events, *TABLE, "--data-dir", tmp_path, "--force", "--json")
    options = ("--split", "leave-one-out", "--min-item-count", 2, "--max-val-sessions", 9)
    info = json.loads(prepare(*words, *options, "--time-unit", "ms").stdout)
    assert info["protocol"] == "last-item"
    assert info["splits"]["val"]["sessions"] == 9
    assert {key: info["options"][key] for key in ("split", "min_item_count", "time_unit")} == {
        "split": "leave-one-out",
        "min_item_count": 2,
        "time_unit": "ms",
    }
    info = json.loads(prepare(*words, "--test-days", 2, "--val-days", 0).stdout)
    dated = json.loads(
        prepare(*words, "--test-from", "2023-11-24", "--val-from", "2023-11-23").stdout
    )
    assert dated["options"]["test_from"] == "2023-11-24"
    assert [split["sessions"] for split in dated["splits"].values()] == [81, 10, 9]
    cleaning = ("--collapse-repeats", "--drop-duplicates", "--max-session-length", 50)
    options = json.loads(prepare(*words, *cleaning).stdout)["options"]
    assert options["collapse_repeats"] is options["drop_duplicates"] is True
    assert options["max_session_length"] == 50
    limited = prepare(*words, "--skip-bad-lines", "--max-bad-share", 0.5).stdout
    assert json.loads(limited)["options"]["max_bad_share"] == 0.5
    assert info["splits"]["test"]["sessions"] == 21
    assert info["splits"]["val"]["sessions"] == 0


COMMON = {"force": True, "skip_bad_lines": True, "catalogue": "old"}
SAMPLED = {**COMMON, "max_val_sessions": 9, "seed": 5}
WORDS = {
    "force": "--force",
    "catalogue": "--catalogue=old",
    "skip_bad_lines": "--skip-bad-lines",
    "max_val_sessions": "--max-val-sessions=9",
    "seed": "--seed=5",
    "val_days": "--val-days=0.5",
    "val": "--val=v.txt",
    "val_users": "--val-users=all",
    "input": "--input=i.txt",
    "lines": "--lines=user-item",
    "max_bad_share": "--max-bad-share=0.25",
}


def recorder(function: Any, calls: list[Any]) -> Any:
    """Return a function with the options of another, which records its calls."""
    plain = function.func if isinstance(function, functools.partial) else function

    def record(*places: Any, **options: Any) -> None:
        calls.append((list(places), options))

    record.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    record.__annotations__ = typing.get_type_hints(plain, localns={"Dataset": Any})
    return record


@pytest.mark.parametrize("source", SOURCES)
def test_the_commands_call_the_python_function(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    calls: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        "tron_cli.api.preparation.prepare",
        lambda source, **options: calls.append((source, options)),
    )
    monkeypatch.setattr("tron_cli.cli.prepare._report", lambda dataset, as_json: None)
    words = {"table": ["--input=a", "--item-col=i", "--time-col=t"],
             "sequences": ["--train=a", "--test=b"]}.get(source, [])  # fmt: skip
    assert prepare(source, *words, "--name=n", "--data-dir=d").exit_code == 0
    ((called, options),) = calls
    assert (called, options["name"], options["data_dir"]) == (source, "n", Path("d"))
    assert options.keys() - {"name", "data_dir"} <= options_of(source).keys()


@pytest.mark.parametrize(
    ("source", "words", "places", "options"),
    [
        (
            "otto",
            ["--train=a", "--train=b", "--test=c"],
            [None, Path("d"), "n"],
            {**SAMPLED, "val_days": 0.5, "train": [Path("a"), Path("b")], "test": [Path("c")]},
        ),
        ("yoochoose", ["--raw=r"], [Path("r"), Path("d"), "n"], {**SAMPLED, "val_days": 0.5}),
        ("diginetica", ["--raw=r"], [Path("r"), Path("d"), "n"], {**SAMPLED, "val_days": 0.5}),
        ("ml1m", ["--raw=r"], [Path("r"), Path("d"), "n"], {**COMMON, "val_users": "all"}),
        (
            "sequences",
            ["--train=a", "--test=b"],
            [Path("a"), Path("b"), Path("d"), "n"],
            {
                **SAMPLED,
                "input": Path("i.txt"),
                "val": Path("v.txt"),
                "lines": "user-item",
                "val_users": "all",
                "max_bad_share": 0.25,
            },
        ),
        ("synthetic", [], [Path("d"), "n", reference_figures], {"force": True, "seed": 5}),
    ],
)
def test_every_option_reaches_its_source(
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    words: list[str],
    places: list[Any],
    options: dict[str, Any],
) -> None:
    calls: list[tuple[list[Any], dict[str, Any]]] = []
    module = importlib.import_module(f"tron_cli.prepare.sources.{source}")
    function = f"prepare_{source}"
    monkeypatch.setattr(module, function, recorder(getattr(module, function), calls))
    monkeypatch.setattr("tron_cli.cli.prepare._report", lambda dataset, as_json: None)
    given = [WORDS[option] for option in options if option in WORDS]
    assert prepare(source, *words, "--data-dir=d", "--name=n", *given).exit_code == 0
    assert calls == [(places, options)]


COLUMNS = {
    "item": "i", "time": "t", "session": "s", "user": "u", "event": "e", "time_unit": "us",
    "time_format": "%d/%m/%Y", "session_gap": "2h", "keep_events": ("view", "click"),
    "null_tokens": ("-", "none"),
}  # fmt: skip
TABLE_OPTIONS = {
    **SAMPLED, "max_bad_share": 0.25, "val_users": 7, "val_days": 3.5, "test_days": 4.0,
    "val_from": "2026-01-01", "test_from": "2026-01-02", "min_session_length": 3,
    "max_session_length": 70, "min_item_count": 6, "drop_duplicates": True,
    "collapse_repeats": True,
}  # fmt: skip


def option(name: str, value: Any) -> str:
    if value is True:
        return f"--{name.replace('_', '-')}"
    return f"--{name.replace('_', '-')}={','.join(value) if isinstance(value, tuple) else value}"


def test_every_option_of_table_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[Any], dict[str, Any]]] = []
    monkeypatch.setattr(table, "prepare_table", recorder(table.prepare_table, calls))
    monkeypatch.setattr("tron_cli.cli.prepare._report", lambda dataset, as_json: None)
    named = {"item", "time", "session", "user", "event"}
    words = [option(f"{key}_col" if key in named else key, COLUMNS[key]) for key in COLUMNS]
    words += [option(key, value) for key, value in TABLE_OPTIONS.items()]
    places = ["--data-dir=d", "--name=n", "--split=leave-one-out"]
    split = ["--train=a", "--train=b", "--val=v", "--test=w"]
    assert prepare("table", *places, *split, *words).exit_code == 0
    inputs = [Path("a"), Path("b")]
    expected = {"leave_one_out": True, "val": [Path("v")], "test": [Path("w")], **TABLE_OPTIONS}
    calls[0][1].pop("frames")  # a temporary folder
    assert calls == [([inputs, TableColumns(**COLUMNS), Path("d"), "n"], expected)]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("otto", []),
        ("yoochoose", []),
        ("diginetica", []),
        ("ml1m", []),
        ("sequences", ["--train=a", "--test=b", "--name=n"]),
        ("table", ["--item-col=i", "--time-col=t", "--input=a", "--name=n"]),
        ("synthetic", []),
    ],
)
def test_the_defaults_of_a_command_are_those_of_its_function(
    monkeypatch: pytest.MonkeyPatch, source: str, words: list[str]
) -> None:
    module = importlib.import_module(f"tron_cli.prepare.sources.{source}")
    function = getattr(module, f"prepare_{source}")
    signature = inspect.signature(function)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    if isinstance(function, functools.partial):  # the log has the defaults that are None
        (log,) = function.args
        defaults |= {"name": log.source, "val_days": log.val_days}
    calls: list[tuple[list[Any], dict[str, Any]]] = []
    monkeypatch.setattr(module, f"prepare_{source}", recorder(function, calls))
    monkeypatch.setattr("tron_cli.cli.prepare._report", lambda dataset, as_json: None)
    assert prepare(source, *words).exit_code == 0
    ((places, named),) = calls
    given = signature.bind(*places, **named).arguments
    given.pop("frames", None)  # a temporary folder
    assert given.get("columns") in (None, TableColumns(item="i", time="t"))
    for name, value in given.items():
        default = defaults[name]
        assert default in (inspect.Parameter.empty, value) or (value, default) == ([], ()), name


@pytest.mark.parametrize("source", ["otto", "yoochoose", "diginetica", "synthetic"])
def test_a_negative_seed_is_wrong_usage(source: str) -> None:
    result = prepare(source, "--seed", -1)
    assert result.exit_code == 2
    assert "--seed" in result.stderr


def test_what_is_read_is_never_replaced(tmp_path: Path, events: Path) -> None:
    words = ("table", *TABLE, "--data-dir", tmp_path, "--force", "--input")
    prepare(*words, events)
    inside = events.rename(tmp_path / "shop" / "events.csv")
    with pytest.raises(InputError, match=r"events\.csv lies in .*shop, which is to be replaced"):
        prepare(*words, inside)
    assert inside.exists()


@pytest.mark.parametrize("source", ["yoochoose", "diginetica", "ml1m", "sequences"])
def test_every_source_from_raw(tmp_path: Path, source: str) -> None:
    raw = tmp_path / "raw.txt"
    words: list[object] = [source, "--raw", raw, "--data-dir", tmp_path, "--json"]
    if source == "yoochoose":
        raw.write_text(
            "".join(
                f"{s},2014-04-{1 + s // 10:02}T10:00:0{n}.000Z,{n},S\n"
                for s in range(60)
                for n in range(3)
            )
        )
        expected = [20, 20, 20]  # the last day reaches back to the same second of the day before
    elif source == "diginetica":
        rows = [f"{s};NA;{n};{n};2016-05-{1 + s // 2:02}\n" for s in range(40) for n in range(3)]
        raw.write_text("sessionId;userId;itemId;timeframe;eventdate\n" + "".join(rows))
        expected = [8, 16, 16]
    elif source == "ml1m":
        drawn = set(np.random.RandomState(42).choice(6040, 512, replace=False).tolist())
        raw.write_text("".join(f"{u} {i}\n" for u in range(1, 101) for i in (1, 2, 3, 4, 1)))
        expected = [100, len(drawn & set(range(1, 101))), 100]
    else:
        raw.write_text("1 2 3\n" * 40)
        (tmp_path / "test.txt").write_text("1 3 2\n" * 40)
        words = [
            source,
            "--train",
            raw,
            "--test",
            tmp_path / "test.txt",
            "--name",
            "lines",
            *words[3:],
        ]
        expected = [38, 2, 40]
    info = json.loads(prepare(*words).stdout)
    assert info["source"] == source
    assert [info["splits"][split]["sessions"] for split in ("train", "val", "test")] == expected


def test_wrong_usage_exits_with_2(tmp_path: Path, events: Path) -> None:
    """Through the real program: one sentence on stderr, no traceback, nothing left behind."""
    words = ["prepare", "table", "--input", str(events), *TABLE, "--data-dir", str(tmp_path / "d")]
    words[words.index("item")] = "article"
    code = "import sys; from tron_cli.cli import main; sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert "no column 'article': its columns are session, item, time" in result.stderr
    assert "Traceback" not in result.stderr
    assert list((tmp_path / "d").iterdir()) == []


def test_help_needs_no_heavy_imports() -> None:
    code = (
        "import sys; import tron_cli.cli.prepare; "
        "print([name for name in ('torch', 'polars', 'numpy') if name in sys.modules])"
    )
    environment = {**os.environ, "POLARS_MAX_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("value", "published", "same"),
    [
        (7_966_257, "7.9M", True),  # cut off
        (31_637_239, "31.6M", True),
        (15_324, "15k", True),
        (14_500, "15k", True),  # rounded
        (14_499, "15k", False),
        (16_000, "15k", False),
        (1_855_603, "1,855,603", True),
        (1_855_602, "1,855,603", False),
        (12_340_303, "12.34M", True),
        (12_350_000, "12.34M", False),
    ],
)
def test_published_figures_agree_when_rounded_or_cut_off(
    value: int, published: str, same: bool
) -> None:
    assert agrees(value, published) is same


def test_published_sizes_stand_beside_ours_with_a_mark(tmp_path: Path) -> None:
    split = {"sessions": 15_324, "events": 70_000, "mean_length": 4.6, "median_length": 3.0}
    info = {
        "name": "yoochoose",
        "protocol": "every-step",
        "num_items": 37_483,
        "catalogue_fingerprint": "",
        "source": "yoochoose",
        "splits": {name: {**split, "max_length": 9} for name in ("train", "val", "test")},
        "training_period": {"sessions": 7_966_257, "events": 31_637_239},
    }
    text = summary_text(Dataset(tmp_path, info))
    lines = [line.split() for line in text.splitlines()]
    for line in (
        "train sessions 7.9M 7,966,257 yes",
        "train events 31.6M 31,637,239 yes",
        "test sessions 15k 15,324 yes",
        "test events 71k 70,000 differs",
        "items 37k 37,483 yes",
    ):
        assert line.split() in lines
