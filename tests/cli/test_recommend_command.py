"""`tron recommend` and `tron similar`: files, streams and refusals."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from helpers.checkpoints import random_checkpoint
from helpers.command_lines import Command, is_one_sentence
from helpers.datasets import random_sessions, write_dataset

from tron_cli.serving import session_files
from tron_cli.serving.recommender import Recommender

NUM_ITEMS, FIRST_ID = 30, 101
SESSIONS: dict[str, list[int]] = {
    "s1": [101, 105, 101],
    "s2": [110],
    'ünïcode, "quoted"': [120, 7, 121],
    "s4": [],
    "s5": [103, 104, 105, 106, 107, 108, 109, 110, 111],
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    data = write_dataset(
        tmp_path / "data", train=random_sessions(rng, 40, NUM_ITEMS), num_items=NUM_ITEMS
    )
    return random_checkpoint(data, tmp_path / "model.pt").path


def json_lines(sessions: dict[str, list[int]]) -> bytes:
    rows = [{"session": name, "items": items} for name, items in sessions.items()]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(sessions: dict[str, list[int]], *, shuffled: bool = False) -> pl.DataFrame:
    rows = [
        (name, item, 1_700_000_000 + place)
        for name, items in sessions.items()
        for place, item in enumerate(items)
    ]
    frame = pl.DataFrame(rows, schema=["session", "item", "time"], orient="row")
    return frame.sample(fraction=1, shuffle=True, seed=1) if shuffled else frame


def expected(checkpoint: Path, **options: Any) -> dict[str, list[int]]:
    lists = Recommender.load(checkpoint).recommend(SESSIONS.values(), **options)
    return {name: found.items for name, found in zip(SESSIONS, lists, strict=True)}


def write_table(frame: pl.DataFrame, file: Path) -> None:
    if file.suffix == ".parquet":
        frame.write_parquet(file)
        return
    text = frame.write_csv(separator="\t" if ".tsv" in file.name else ",").encode()
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)


def read_lists(file: Path) -> dict[str, list[int]]:
    if file.suffix == ".parquet":
        frame = pl.read_parquet(file)
    else:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        if ".jsonl" in file.name:
            rows = [json.loads(line) for line in content.splitlines()]
            return {row["session"]: row["items"] for row in rows}
        frame = pl.read_csv(content, separator="\t" if ".tsv" in file.name else ",")
    assert frame.columns == ["session", "rank", "item"]
    found: dict[str, list[int]] = {}
    for session, rank, item in frame.rows():
        found.setdefault(session, []).append(item)
        assert rank == len(found[session])
    return found


FORMATS = ["csv", "tsv", "parquet", "jsonl", "csv.gz", "tsv.gz", "jsonl.gz"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_is_read_and_written(
    suffix: str, checkpoint: Path, command: Command, tmp_path: Path
) -> None:
    given, written = tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}"
    if "jsonl" in suffix:
        content = json_lines(SESSIONS)
        given.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    else:
        write_table(table(SESSIONS), given)
    code, out, err = command(
        "recommend", checkpoint, "--input", given, "--output", written, "-k", 7, "--batch-size", 2
    )
    assert (code, out) == (0, ""), err
    lists = expected(checkpoint, k=7)
    if "jsonl" not in suffix:
        del lists["s4"]  # which has no row
    assert read_lists(written) == lists
    left_out = "left out 1 of 16 events, on items that the model does not know, in 1 session, the"
    assert f"{len(lists)} sessions; {left_out} first" in err
    assert ("1 session without known items" in err) == ("jsonl" in suffix)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_rows_of_a_session_may_be_anywhere_and_are_ordered_by_time(
    suffix: str, checkpoint: Path, command: Command, tmp_path: Path
) -> None:
    frame = table(SESSIONS, shuffled=True).rename({"session": "sid", "item": "iid", "time": "ts"})
    write_table(frame, tmp_path / f"in.{suffix}")
    code, _, err = command(
        "recommend", checkpoint, "--input", tmp_path / f"in.{suffix}", "--output",
        tmp_path / "out.jsonl", "--session-col", "sid", "--item-col", "iid", "--time-col", "ts",
    )  # fmt: skip
    assert code == 0, err
    found = read_lists(tmp_path / "out.jsonl")
    assert list(found) == frame["sid"].unique(maintain_order=True).to_list()
    lists = expected(checkpoint)
    assert found == {name: lists[name] for name in found}


@pytest.mark.parametrize("separator", [";", "|", "\t"])
def test_an_export_that_prepare_reads_is_read_as_it_is(
    separator: str, checkpoint: Path, command: Command, tmp_path: Path
) -> None:
    """Other separators, a byte order mark, quotes, times of a named format, broken lines."""
    rows = ["visitor,sku,clicked", "ü 1,101,25.10.2026 10:05", '"x;y|\t",110,25.10.2026 10:00']
    rows += ["#### connection lost", "ü 1,105,25.10.2026 09:59", "ü 1,106,tomorrow", "b,,", ""]
    given, written = tmp_path / "export.csv", tmp_path / "out.jsonl"
    given.write_text("\r\n".join(rows).replace(",", separator), encoding="utf-8-sig")
    words = ["recommend", checkpoint, "--input", given, "--output", written, "--session-col"]
    words += ["visitor", "--item-col", "sku", "--time-col", "clicked"]
    code, _, err = command(*words, "--time-format", "%d.%m.%Y %H:%M")
    assert code == 2
    assert "export.csv, line 4: expected 3 fields" in err
    assert "correct it, or pass --skip-bad-lines" in err
    code, _, err = command(*words, "--time-format", "%d.%m.%Y %H:%M", "--skip-bad-lines")
    assert code == 0, err
    kinds = "wrong number of fields: 1, unreadable clicked: 1, missing sku: 1"
    assert f"3 bad lines were skipped ({kinds}); the first: export.csv, line 4: expected" in err
    first, second = Recommender.load(checkpoint).recommend([[105, 101], [110]])
    assert read_lists(written) == {"ü 1": first.items, "x;y|\t": second.items}
    code, _, err = command(*words, "--skip-bad-lines")
    assert code == 2
    assert is_one_sentence(err)
    assert 'pass --time-format "%d.%m.%Y %H:%M"' in err
    code, _, err = command(*words, "--skip-bad-lines", "--time-format", "%m.%d.%Y %H:%M")
    assert code == 2
    assert "4 of 4 times do not fit --time-format" in err


def test_a_history_of_ids_with_spaces_is_pointed_to_json(tmp_path: Path, command: Command) -> None:
    data = write_dataset(
        tmp_path / "data",
        train=random_sessions(np.random.default_rng(3), 40, 3),
        num_items=3,
        item_ids=np.array(["red shoe", "blue shoe", "hat"], object),
    )
    words = ["recommend", random_checkpoint(data, tmp_path / "text.pt").path, "--history"]
    hint = 'ids with spaces go into a JSON list, such as ["red shoe", "blue shoe"]'
    assert hint in command(*words, "red shoe", "-k", 2)[2]
    for history in ("hat red shoe", "nothing", '["red shoe", "no shoe"]', '["no shoe"]'):
        assert hint not in command(*words, history, "-k", 2)[2]


def test_adjacent_rows_are_read_some_at_a_time(
    checkpoint: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session may begin in one block and end in another."""
    from tron_cli.prepare.reading import columns

    rng = np.random.default_rng(1)
    sessions = {
        f"s{n}": [100 + i for i in row] for n, row in enumerate(random_sessions(rng, 60, 30))
    }
    frame = table(sessions)
    write_table(frame, tmp_path / "in.csv")
    words = ["recommend", checkpoint, "--input", tmp_path / "in.csv", "--output"]
    assert command(*words, tmp_path / "whole.csv")[0] == 0
    monkeypatch.setattr(columns, "BLOCK_BYTES", 100)
    largest = []
    grouped = session_files._grouped

    def noted(frame: pl.DataFrame, *, adjacent: bool) -> pl.DataFrame:
        largest.append(len(frame))
        return grouped(frame, adjacent=adjacent)

    monkeypatch.setattr(session_files, "_grouped", noted)
    assert command(*words, tmp_path / "parts.csv", "--adjacent")[0] == 0
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert len(largest) > 20
    assert max(largest) < 20


def test_stdin_to_stdout(checkpoint: Path, command: Command, monkeypatch: Any) -> None:
    content = json_lines(SESSIONS).replace(b"\n", b"\r\n\n")[:-3]  # and no line end at the end
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    code, out, err = command("recommend", checkpoint, "-k", 3, "--scores", "--no-filter-rated")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    lists = Recommender.load(checkpoint).recommend(SESSIONS.values(), k=3, filter_rated=False)
    assert [(row["session"], row["items"], row["scores"]) for row in rows] == [
        (name, found.items, found.scores) for name, found in zip(SESSIONS, lists, strict=True)
    ]


def test_a_session_without_an_id_has_the_number_of_its_line(
    checkpoint: Path, command: Command, monkeypatch: Any
) -> None:
    content = b'\xef\xbb\xbf{"items": [101]}\n\n{"items": ["102"], "other": 1.5}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    code, out, _ = command("recommend", checkpoint)
    assert code == 0
    assert [json.loads(line)["session"] for line in out.splitlines()] == [1, 3]


def tron(*words: object, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tron_cli", *map(str, words)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def test_a_stream_is_answered_line_by_line_and_its_reader_may_go(checkpoint: Path) -> None:
    """The case of `tail -f sessions.jsonl | tron recommend CKPT | head -2`."""
    process = tron("recommend", checkpoint, "-k", 2)
    assert process.stdin
    assert process.stdout
    assert process.stderr
    for number in (1, 2):
        process.stdin.write(b'{"session": %d, "items": [101]}\n' % number)
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["session"] == number
    process.stdout.close()
    process.stdin.write(b'{"items": [101]}\n' * 5)
    process.stdin.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""


def test_one_history_on_the_command_line(checkpoint: Path, command: Command) -> None:
    found = Recommender.load(checkpoint).recommend([[101, 105]], k=4)[0]
    words = ["recommend", checkpoint, "-k", 4, "--history"]
    code, out, err = command(*words, " 101  105 ", "--json", "--scores")
    assert (code, json.loads(out), err) == (0, {"items": found.items, "scores": found.scores}, "")
    assert json.loads(command(*words, '[101, 9, "105"]', "--json")[1]) == {"items": found.items}
    code, out, err = command(*words, "101 105 9")
    assert [line.split()[0] for line in out.splitlines()[2:]] == [*map(str, found.items)]
    assert "1 of 3 events" in err
    _, out, err = command(*words, "", "--json")
    assert json.loads(out)["items"] == Recommender.load(checkpoint).recommend([[]], k=4)[0].items
    assert "popular" in err


def test_candidates_exclusions_and_rated_items(
    checkpoint: Path, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "few.txt").write_text("101\r\n\n103\n104\n105\n")
    (tmp_path / "not.txt").write_text("104\nnever heard of\n")
    code, out, err = command(
        "recommend", checkpoint, "--history", "101", "--json", "--filter-rated",
        "--candidates", tmp_path / "few.txt", "--exclude", tmp_path / "not.txt",
    )  # fmt: skip
    assert code == 0, err
    assert sorted(json.loads(out)["items"]) == [103, 105]


def test_ids_that_exclude_nothing_and_the_first_unknown_one_are_said(
    checkpoint: Path, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "not.txt").write_text("101\n102 \n")
    (tmp_path / "in.csv").write_text("session,item\na,104.5\na,105.0\n")
    code, _, err = command(
        "recommend", checkpoint, "--input", tmp_path / "in.csv", "--exclude", tmp_path / "not.txt"
    )
    assert code == 0, err
    assert "not.txt: the catalogue lacks 1 of 2 ids, the first '102 '" in err
    assert "left out 1 of 2 events, on items that the model does not know" in err
    assert "the first '104.5'" in err
    assert "in.csv, session 'a'" in err
    assert err.count("its 30 ids look like 101") == 2


def test_closed_streams(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(json_lines(SESSIONS))
    words = [sys.executable, "-m", "tron_cli", "recommend", str(checkpoint)]
    words += ["--input", str(tmp_path / "in.jsonl"), "-k", "1"]
    closed_out = ["bash", "-c", '"$@" >&-', "bash", *words]
    result = subprocess.run(closed_out, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "tron: stdout is closed; name a file with --output\n"
    closed_err = ["bash", "-c", '"$@" 2>&-', "bash", *words]
    result = subprocess.run(closed_err, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == len(SESSIONS)


def test_an_interrupt_ends_the_wait_for_a_line_and_leaves_no_file(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "lists" / "out.jsonl"
    out.parent.mkdir()
    process = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            # A shell without job control, and some that run tests, let it be ignored.
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from tron_cli.cli import main; main()",
            *("recommend", checkpoint, "--output", out),
        ],
        stdin=subprocess.PIPE,
    )
    with process:
        assert process.stdin is not None
        process.stdin.write(json_lines(SESSIONS))
        process.stdin.flush()
        partial = out.with_name("out.jsonl.partial")
        deadline = time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=30) == 130
        finally:
            process.kill()
    assert list(out.parent.iterdir()) == []


def test_unknown_items_are_warned_of_or_refused_by_line(
    checkpoint: Path, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_bytes(json_lines(SESSIONS))
    words = ["recommend", checkpoint, "--input", tmp_path / "in.jsonl", "--on-unknown"]
    code, out, err = command(*words, "warn")
    assert code == 0
    assert "does not know the items of 1 of 3 events" in err
    code, out, err = command(*words, "raise")
    assert (code, out) == (2, "")
    assert is_one_sentence(err)
    assert "does not know the items of 1 of 3 events" in err
    code, out, err = command(*words, "skip", "--on-empty", "raise", "--output", tmp_path / "o.csv")
    assert code == 2
    assert "in.jsonl, line 4 holds no item" in err
    assert not (tmp_path / "o.csv").exists()


WRONG_LINES = {
    "{": "no JSON",
    '{"session": "a"}': "no key 'items', only 'session'",
    "[1, 2]": "expected an object per line",
    '{"items": "101 102"}': "expected a list of item ids",
    '{"items": [101, 2.5]}': "got 2.5 (float) at place 2",
    '{"items": [true]}': "got True",
    '{"items": [null]}': "got None",
    '{"items": [[101]]}': "got [101] (list)",
    '{"items": [NaN]}': "got nan",
    '{"items": [101], "session": 1.5}': "text or an integer as session",
    '{"items": [101], "session": null}': "text or an integer as session",
    '{"items": [101], "session": "\\ud800"}': "no valid text",
    '{"items": ["\xff"]}': "no JSON",
    "[" * 100_000: "no JSON (too deeply nested)",
}


@pytest.mark.parametrize("line", WRONG_LINES)
def test_a_wrong_line_is_named_after_those_before_it_are_answered(
    line: str, checkpoint: Path, command: Command, tmp_path: Path
) -> None:
    content = b'{"session": 0, "items": [101]}\n' + line.encode("latin-1") + b"\n"
    (tmp_path / "in.jsonl").write_bytes(content)
    words = ["recommend", checkpoint, "--input", tmp_path / "in.jsonl"]
    code, out, err = command(*words)
    assert code == 2
    assert is_one_sentence(err), err
    assert f"{tmp_path / 'in.jsonl'}, line 2" in err
    assert WRONG_LINES[line] in err
    assert len(err) < 600
    if "list of item ids" not in WRONG_LINES[line] and "got" not in WRONG_LINES[line]:
        assert json.loads(out)["session"] == 0
    assert command(*words, "--output", tmp_path / "out.csv")[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "in.jsonl", "model.pt"]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("recommend CKPT --history 101 -k 0", "k must be from 1 to 30"),
        ("recommend CKPT --history 101 -k 31", "k must be from 1 to 30"),
        ("recommend CKPT --history 101 --input good.csv", "leave out --input"),
        ("recommend CKPT --history [101", "begins like a JSON list"),
        ("recommend CKPT --history [[101]]", "got [101] (list)"),
        ("recommend CKPT --history 9 --on-unknown raise", "the items of 1 of 1 event"),
        ("recommend CKPT --history 9 --on-empty raise", "--history holds no item"),
        ("recommend CKPT --input good.csv --json", "--json goes with --history"),
        ("recommend CKPT --input good.xlsx", "ends with .csv, .tsv, .jsonl"),
        ("recommend CKPT --input good.parquet.gz", "ends with .csv, .tsv, .jsonl"),
        ("recommend CKPT --input good.csv --output out.txt", "--output out.txt"),
        ("recommend CKPT --input good.csv --output no/out.csv", "cannot write no/out.csv"),
        ("recommend CKPT --input missing.csv", "missing.csv"),
        ("recommend CKPT --input empty.csv", "empty.csv is empty"),
        ("recommend CKPT --input good.csv --item-col product", "no column 'product'"),
        ("recommend CKPT --input good.csv --time-col item --item-col item", "different columns"),
        (
            "recommend CKPT --input good.csv --session-col item --item-col time --time-col session",
            "good.csv, line 2: expected an ISO 8601 time or a number in session, found 'a'",
        ),
        ("recommend CKPT --input ragged.csv", "ragged.csv, line 3: expected 3 fields"),
        (
            "recommend CKPT --input gap.csv",
            "gap.csv, line 3: expected an id in item, found nothing",
        ),
        ("recommend CKPT --input bad.parquet", "bad.parquet is not a readable Parquet file"),
        ("recommend CKPT --input float.parquet", "float.parquet, row 1: expected an id"),
        ("recommend CKPT --input good.jsonl --adjacent", "are for tables"),
        ("recommend CKPT --input good.jsonl --skip-bad-lines", "are for tables"),
        ("recommend CKPT --input good.csv --time-format %d/%m/%Y", "goes with --time-col"),
        ("recommend CKPT --input good.csv --candidates ids.txt", "ids.txt, line 2: 'x' is not in"),
        ("recommend CKPT --input good.csv --candidates empty.csv", "empty.csv holds no ids"),
        ("recommend CKPT --input good.csv --output good.csv", "--output good.csv is also read"),
        ("recommend CKPT --input good.csv --output link.csv", "--output link.csv is also read"),
        (
            "recommend CKPT --input good.csv --candidates few.csv --output few.csv",
            "--output few.csv is also read",
        ),
        ("recommend CKPT --input good.csv --exclude latin.txt", "latin.txt is not UTF-8"),
        ("recommend CKPT --input good.csv --exclude nowhere.txt", "nowhere.txt"),
        ("recommend CKPT --input good.csv --batch-size 0", "--batch-size"),
        ("recommend good.csv --history 101", "good.csv is truncated or no tron checkpoint"),
        ("similar CKPT", "name items, or pass --all"),
        ("similar CKPT 101 --all --output out.csv", "name items, or pass --all"),
        ("similar CKPT --all", "--all needs a file"),
        ("similar CKPT 101 nothing", "'nothing' is not in the catalogue"),
        ("similar CKPT 101 -k 31", "k must be from 1 to 30"),
        ("similar CKPT 101 --json --output out.csv", "--json prints to stdout"),
    ],
)
def test_wrong_usage_is_one_sentence(
    words: str, found: str, checkpoint: Path, command: Command, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    good = table({"a": [101, 102], "b": [103]})
    for name in ("good.csv", "good.parquet"):
        write_table(good, Path(name))
    Path("good.jsonl").write_bytes(json_lines(SESSIONS))
    Path("empty.csv").touch()
    Path("ragged.csv").write_text("session,item,time\na,101,1\nb,102\n")
    Path("gap.csv").write_text("session,item\na,101\nb,\n")
    Path("bad.parquet").write_bytes(Path("good.parquet").read_bytes()[:-20])
    good.with_columns(pl.col("item") + 0.5).write_parquet("float.parquet")
    Path("ids.txt").write_text("101\nx\n")
    Path("few.csv").write_text("101\n")
    Path("link.csv").symlink_to("good.csv")
    Path("latin.txt").write_bytes(b"\xe9\n")
    before = sorted(tmp_path.iterdir())
    code, out, err = command(*words.replace("CKPT", str(checkpoint)).split())
    assert (code, out) == (2, "")
    assert is_one_sentence(err), err
    assert found in err.replace(f"{tmp_path}{os.sep}", "")
    assert sorted(tmp_path.iterdir()) == before


def test_stdin_of_a_terminal_is_refused(
    checkpoint: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    code, out, err = command("recommend", checkpoint)
    assert (code, out) == (2, "")
    assert "pass --history or --input" in err


@pytest.mark.parametrize("name", ["out.csv", "out.parquet", "out.jsonl"])
def test_an_input_without_sessions_gives_an_output_without_lists(
    name: str, checkpoint: Path, command: Command, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert command("recommend", checkpoint, "--output", tmp_path / name)[0] == 0
    assert read_lists(tmp_path / name) == {}


def test_ids_of_sessions_in_parquet_are_of_one_type(
    checkpoint: Path, command: Command, tmp_path: Path
) -> None:
    lines = [{"session": n, "items": [101]} for n in (1, 2, 3)]
    file, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    words = ["recommend", checkpoint, "--input", file, "--output", out, "--batch-size", 2]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert command(*words)[0] == 0
    assert pl.read_parquet(out)["session"].unique().sort().to_list() == [1, 2, 3]
    for odd in ("x", 1 << 70):
        file.write_text(
            "".join(json.dumps(line) + "\n" for line in [*lines, {**lines[0], "session": odd}])
        )
        code, _, err = command(*words)
        assert code == 2
        assert "the first session ids are 64-bit integers" in err


def test_similar_prints_what_python_returns(checkpoint: Path, command: Command) -> None:
    served = Recommender.load(checkpoint)
    code, out, err = command("similar", checkpoint, 101, 130, "-k", 3, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["similar"] == [
        {"item": str(item), "items": found.items, "scores": found.scores}
        for item in (101, 130)
        for found in (served.similar(item, k=3),)
    ]
    _, out, _ = command("similar", checkpoint, 101, "-k", 3)
    assert [line.split()[2] for line in out.splitlines()[2:]] == [
        str(item) for item in served.similar(101, k=3).items
    ]


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_similar_of_all_items_goes_to_a_file(
    suffix: str, checkpoint: Path, command: Command, tmp_path: Path
) -> None:
    file = tmp_path / f"near.{suffix}"
    code, out, err = command("similar", checkpoint, "--all", "-k", 2, "--output", file)
    assert (code, out) == (0, ""), err
    served = Recommender.load(checkpoint)
    expected = [
        (item, rank, other, score)
        for item in served.item_ids.tolist()
        for found in (served.similar(item, k=2),)
        for rank, (other, score) in enumerate(zip(found.items, found.scores, strict=True), start=1)
    ]
    if suffix == "jsonl":
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        pairs = [
            (row["item"], *pair)
            for row in rows
            for pair in zip(row["items"], row["scores"], strict=True)
        ]
        assert pairs == [(item, other, score) for item, _, other, score in expected]
        return
    frame = pl.read_csv(file) if suffix == "csv" else pl.read_parquet(file)
    assert frame.columns == ["item", "rank", "similar", "score"]
    assert frame.rows() == expected
