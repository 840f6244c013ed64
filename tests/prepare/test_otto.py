"""OTTO: its protocol against a plain reimplementation, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tron_cli.data.dataset import Dataset, Sessions
from tron_cli.errors import InputError
from tron_cli.prepare.sources import otto_files, otto_spool
from tron_cli.prepare.sources.otto import prepare_otto

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd
from helpers.otto_logs import DAY, START, Session, expected_clicks, published_line, random_log

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


TRAIN, TEST = "otto-recsys-train.jsonl", "otto-recsys-test.jsonl"


@pytest.fixture
def write_raw(tmp_path: Path) -> Callable[..., Path]:
    def write(train: list[Session], test: list[Session], compress: str | None = None) -> Path:
        folder = tmp_path / "raw"
        folder.mkdir(exist_ok=True)
        for name, log in ((TRAIN, train), (TEST, test)):
            text = "".join(published_line(i, s) + "\n" for i, s in enumerate(log)).encode()
            if compress:
                packed = gzip.compress(text) if compress == ".gz" else zstd.compress(text)
                (folder / (name + compress)).write_bytes(packed)
            else:
                (folder / name).write_bytes(text)
        return folder

    return write


def as_sessions(split: Sessions, item_ids: np.ndarray) -> list[Session]:
    if not len(split):
        return []
    assert split.times is not None
    bounds = zip(split.offsets[:-1], split.offsets[1:], strict=True)
    return [
        [
            (int(item_ids[item - 1]), int(time), "clicks")
            for item, time in zip(split.items[a:b], split.times[a:b], strict=True)
        ]
        for a, b in bounds
    ]


def plain_protocol(train: list[Session], test: list[Session], val_days: float) -> dict[str, Any]:
    """The protocol, session by session in Python. `candidates` are all that val may draw from."""
    clicks = [expected_clicks(session) for session in train]
    catalogue = sorted({aid for session in clicks for aid, _, _ in session})
    boundary = max(t for session in clicks for _, t, _ in session) - val_days * DAY
    kept = [session for session in clicks if len(session) >= 2]
    candidates = [s for s in kept if val_days > 0 and s[0][1] >= boundary]
    early = [s for s in kept if not (val_days > 0 and s[0][1] >= boundary)]
    cut = [[e for e in s if val_days == 0 or e[1] < boundary] for s in early]
    test_clicks = [expected_clicks(session) for session in test]
    known = [[e for e in s if e[0] in set(catalogue)] for s in test_clicks]
    final = [s for s in known if len(s) >= 2]
    return {
        "catalogue": catalogue,
        "period": kept,
        "train": [s for s in cut if len(s) >= 2],
        "candidates": candidates,
        "late_sessions": sum(len(s) < 2 for s in cut),
        "late_events": sum(map(len, early)) - sum(len(s) for s in cut if len(s) >= 2),
        "test": final,
        "unseen_events": sum(map(len, test_clicks)) - sum(map(len, known)),
        "lost_of_kept": [
            len(before) - len(after)
            for before, after in zip(test_clicks, known, strict=True)
            if len(after) >= 2
        ],
        "lost_of_others": [
            len(before) - 1
            for before, after in zip(test_clicks, known, strict=True)
            if len(after) < 2 <= len(before)
        ],
    }


def assert_follows(
    dataset: Dataset, train: list[Session], test: list[Session], val_days: float, most: int
) -> None:
    plain = plain_protocol(train, test, val_days)
    ids = dataset.item_ids
    assert ids.tolist() == plain["catalogue"]
    assert dataset.num_items == len(plain["catalogue"])
    assert as_sessions(dataset.split("train"), ids) == plain["train"]
    assert as_sessions(dataset.split("test"), ids) == plain["test"]
    val = as_sessions(dataset.split("val"), ids)
    left = iter(plain["candidates"])
    assert all(session in left for session in val)  # a subsequence: in the order of the file
    assert len(val) == min(most, len(plain["candidates"]))
    info = dataset.info
    dropped = {
        step["step"]: (step["dropped_sessions"], step["dropped_events"]) for step in info["filters"]
    }
    assert dropped["late events"] == (plain["late_sessions"], plain["late_events"])
    assert dropped["validation sample"] == (
        len(plain["candidates"]) - len(val),
        sum(map(len, plain["candidates"])) - sum(map(len, val)),
    )
    trained = {aid for session in plain["train"] for aid, _, _ in session}
    assert info["items_unseen_in_train"] == len(set(plain["catalogue"]) - trained)
    unseen_in_val = sum(aid not in trained for session in val for aid, _, _ in session)
    assert dataset.split_info("val")["events_unseen_in_train"] == unseen_in_val
    assert dataset.split_info("test")["unseen_events"] == plain["unseen_events"]
    lost = plain["lost_of_kept"] + plain["lost_of_others"]
    assert dataset.split_info("test")["lost_predictions"] == sum(lost)
    lost_of_sessions = dataset.lost_of_sessions("test")
    assert lost_of_sessions is not None
    assert lost_of_sessions[: len(lost)].tolist() == lost
    assert not lost_of_sessions[len(lost) :].any()
    assert info["training_period"] == {
        "sessions": len(plain["period"]),
        "events": sum(map(len, plain["period"])),
    }


def arrays(dataset: Dataset) -> dict[str, bytes]:
    files = [path for path in dataset.path.rglob("*.*") if path.name != "dataset.json"]
    return {str(path.relative_to(dataset.path)): path.read_bytes() for path in files}


def test_several_files_in_any_order_are_the_whole(
    tmp_path: Path, write_raw: Callable[..., Path]
) -> None:
    raw = write_raw(random_log(5, sessions=60), random_log(6, sessions=20))
    whole = prepare_otto(raw, tmp_path / "d", "whole", max_val_sessions=5)
    for name in (TRAIN, TEST):
        lines = (raw / name).read_bytes().splitlines(keepends=True)
        low, high = len(lines) // 3, len(lines) // 2
        for part, piece in (("z", lines[:low]), ("b", lines[low:high]), ("a", lines[high:])):
            content = b"".join(piece)
            packed = gzip.compress(content) if part == "b" else content
            (raw / f"{part}-{name}").write_bytes(packed)
    train, test = ([raw / f"{part}-{name}" for part in "bza"] for name in (TRAIN, TEST))
    for given in (
        {"train": train, "test": test},
        {"train": [raw / f"?-{TRAIN}"], "test": test[::-1]},
    ):
        found = prepare_otto(None, tmp_path / "d", "x", max_val_sessions=5, force=True, **given)
        assert arrays(found) == arrays(whole)
        assert found.info["filters"] == whole.info["filters"]
        assert len(found.info["sources"]) == 6
    (raw / "copy").write_bytes(train[0].read_bytes())
    for wrong, message in (
        ({"train": [*train, train[1]], "test": test}, "z-otto.* is given twice"),
        ({"train": [*train, raw / "copy"], "test": test}, "hold the same sessions"),
        ({"train": [raw / "no-*"], "test": test}, "--train .*no-.* fits no file"),
        ({"train": train}, "expected --train and --test"),
    ):
        with pytest.raises(InputError, match=message):
            prepare_otto(None, tmp_path / "e", **wrong)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("val_days", "most"), [(2, 100), (2, 7), (0, 100), (0.5, 3)])
def test_follows_the_protocol(
    tmp_path: Path, write_raw: Callable[..., Path], seed: int, val_days: float, most: int
) -> None:
    train, test = random_log(seed, 200), random_log(seed + 50, 60, items=50)
    raw = write_raw(train, test)
    dataset = prepare_otto(raw, tmp_path / "d", val_days=val_days, max_val_sessions=most)
    assert_follows(dataset, train, test, val_days, most)


@pytest.mark.parametrize("compress", [None, ".gz", ".zst"])
def test_blocks_and_threads_change_nothing(
    tmp_path: Path,
    write_raw: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    compress: str | None,
) -> None:
    train, test = random_log(1, 400), random_log(2, 80)
    whole = prepare_otto(write_raw(train, test), tmp_path / "d", "whole", max_val_sessions=20)
    raw = write_raw(train, test, compress)
    if compress:
        for name in (TRAIN, TEST):
            (raw / name).unlink()
    monkeypatch.setattr(otto_files, "BLOCK_BYTES", 5000)
    monkeypatch.setattr("tron_cli.prepare.reading.columns.BLOCK_BYTES", 5000)
    monkeypatch.setattr(otto_spool, "SPOOL_SESSIONS", 37)
    parts = prepare_otto(raw, tmp_path / "d", "parts", max_val_sessions=20)
    assert_follows(parts, train, test, 2, 20)
    for split in ("train", "val", "test"):
        assert parts.split_info(split) == whole.split_info(split)
    assert parts.catalogue_fingerprint == whole.catalogue_fingerprint
    assert parts.info["filters"] == whole.info["filters"]


@pytest.mark.parametrize("compress", [False, True])
def test_sources_are_recorded_as_they_lie_there(
    tmp_path: Path,
    write_raw: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    compress: bool,
) -> None:
    train, test = random_log(1, 100), random_log(2, 20)
    raw = write_raw(train, test)
    marked = b"\xef\xbb\xbf" + (raw / TRAIN).read_bytes().removesuffix(b"\n")
    (raw / TRAIN).write_bytes(marked)  # a byte order mark, no line end: both are no part of it
    if compress:
        for name in (TRAIN, TEST):
            (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
            (raw / name).unlink()
    monkeypatch.setattr(otto_files, "BLOCK_BYTES", 3000)
    dataset = prepare_otto(raw, tmp_path / "d")
    assert_follows(dataset, train, test, 2, 100_000)
    contents = [(file, file.read_bytes()) for file in sorted(raw.iterdir(), reverse=True)]
    assert dataset.info["sources"] == [
        {"file": file.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for file, content in contents
    ]


def test_a_broken_line_is_numbered_across_blocks(
    tmp_path: Path, write_raw: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write_raw(random_log(1, 300), random_log(2, 20))
    lines = (raw / TRAIN).read_bytes().splitlines()
    lines[230] = lines[230][:-1]
    (raw / TRAIN).write_bytes(b"\n".join(lines))
    monkeypatch.setattr(otto_files, "BLOCK_BYTES", 4000)
    with pytest.raises(InputError, match="line 231: not valid JSON"):
        prepare_otto(raw, tmp_path / "d")


def test_steps_count_what_came_and_what_went(
    tmp_path: Path, write_raw: Callable[..., Path]
) -> None:
    train: list[Session] = [
        [(10, START, "clicks"), (11, START + 1, "carts"), (20, START + 2, "clicks")],
        [(30, START + 3, "clicks")],  # short, but its item is in the catalogue
        [(40, START + 4, "orders")],
        [(20, START + 5, "clicks"), (10, START + 6, "clicks")],
    ]
    test: list[Session] = [
        [(10, START + 9, "clicks"), (99, START + 10, "clicks"), (20, START + 11, "clicks")],
        [(30, START + 9, "clicks"), (99, START + 10, "clicks")],
    ]
    dataset = prepare_otto(write_raw(train, test), tmp_path / "d", val_days=0)
    counts = [(s["step"], s["sessions"], s["events"], s["items"]) for s in dataset.info["filters"]]
    assert counts == [
        ("read", 4, 7, 5),
        ("clicks", 3, 5, 3),
        ("short sessions", 2, 4, 2),
        ("late events", 2, 4, None),
        ("validation sample", 2, 4, None),
    ]
    test_counts = [
        (s["step"], s["sessions"], s["events"], s["items"]) for s in dataset.info["test_filters"]
    ]
    assert test_counts == [
        ("read", 2, 5, 4),
        ("clicks", 2, 5, 4),
        ("unknown items", 2, 3, 3),
        ("short sessions", 1, 2, 2),
    ]
    assert dataset.item_ids.tolist() == [10, 20, 30]
    assert dataset.split_info("test")["unseen_events"] == 2
    assert dataset.split_info("test")["lost_predictions"] == 3 - 1
    assert dataset.info["published_counts"] == {
        "train sessions": 4,
        "train events": 5,
        "test sessions": 2,
        "test events": 5,
        "items": 3,
    }


@pytest.mark.parametrize(
    ("train", "test", "sentence"),
    [
        (b"", b"", "is empty"),
        (b"\n\n", b"", "no session with 2 clicks among its 0"),
        (published_line(0, [(1, START, "clicks")]).encode(), b"", "no session with 2 clicks"),
        (
            published_line(0, [(1, START, "clicks"), (2, START, "clicks")]).encode(),
            published_line(0, [(3, START, "clicks"), (4, START, "clicks")]).encode(),
            "belong together",
        ),
        (
            published_line(0, [(1, START, "clicks"), (2, START, "clicks")]).encode(),
            published_line(0, [(1, START, "clicks"), (2, START, "clicks")]).encode(),
            "smaller --val-days",
        ),
    ],
)
def test_data_that_leaves_nothing(tmp_path: Path, train: bytes, test: bytes, sentence: str) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / TRAIN).write_bytes(train)
    (raw / TEST).write_bytes(test)
    with pytest.raises(InputError, match=sentence):
        prepare_otto(raw, tmp_path / "d")
    assert list((tmp_path / "d").iterdir()) == []


def test_text_without_line_ends_is_refused(
    tmp_path: Path, write_raw: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write_raw(random_log(1, 20), random_log(2, 20))
    (raw / TRAIN).write_bytes(b"x" * 5000)
    monkeypatch.setattr(otto_files, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(otto_files, "MAX_LINE_BYTES", 2000)
    with pytest.raises(InputError, match="no line end"):
        prepare_otto(raw, tmp_path / "d")


def test_truncated_gzip_leaves_nothing(tmp_path: Path, write_raw: Callable[..., Path]) -> None:
    raw = write_raw(random_log(1, 300), random_log(2, 20), compress=".gz")
    file = raw / f"{TRAIN}.gz"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"jsonl\.gz is a truncated or corrupt gzip"):
        prepare_otto(raw, tmp_path / "d")
    assert list((tmp_path / "d").iterdir()) == []


def test_force_replaces_and_its_lack_refuses(
    tmp_path: Path, write_raw: Callable[..., Path]
) -> None:
    raw = write_raw(random_log(1, 100), random_log(2, 20))
    first = prepare_otto(raw, tmp_path / "d")
    with pytest.raises(InputError, match="--force"):
        prepare_otto(raw, tmp_path / "d")
    again = prepare_otto(raw, tmp_path / "d", force=True)
    for split in ("train", "val", "test"):
        assert again.split_info(split) == first.split_info(split)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_real_sample(tmp_path: Path) -> None:
    """20 real sessions: 862 events, 800 clicks, 52 carts, 10 orders, 510 articles."""
    sample = SHARED / "otto_sample"
    raw = tmp_path / "raw"
    raw.mkdir()
    recsys = (sample / "recsys-dataset_test_resources_train.jsonl.gz").read_bytes()
    tron = (sample / "tron_test_resources_unfiltered_sessions.jsonl.gz").read_bytes()
    (raw / f"{TRAIN}.gz").write_bytes(recsys)
    (raw / f"{TEST}.gz").write_bytes(recsys + tron)  # alone, the five have no item of the others
    dataset = prepare_otto(raw, tmp_path / "d", val_days=2)
    read, clicks, *_ = dataset.info["filters"]
    assert (read["sessions"], read["events"], read["items"]) == (20, 862, 510)
    assert (clicks["sessions"], clicks["events"], clicks["dropped_events"]) == (20, 800, 62)
    test_read = dataset.info["test_filters"][0]
    assert (test_read["sessions"], test_read["events"]) == (25, 862 + 118)

    def plain(file: Path) -> list[Session]:
        with gzip.open(file) as lines:
            return [
                [(e["aid"], e["ts"], e["type"]) for e in json.loads(x)["events"]] for x in lines
            ]

    assert_follows(dataset, plain(raw / f"{TRAIN}.gz"), plain(raw / f"{TEST}.gz"), 2, 100_000)


def test_a_wrong_latest_time_is_named_where_it_leaves_validation_empty(tmp_path: Path) -> None:
    log = random_log(1, 300)
    log[7] = [(1, START, "clicks"), (4, 9_999_999_999_999, "clicks")]
    for file in (TRAIN, TEST):
        lines = [published_line(number, events) for number, events in enumerate(log)]
        (tmp_path / file).write_text("\n".join(lines[:200] if file == TRAIN else lines[200:]))
    problem = rf"{TRAIN}: the latest time, 2286-11-20 17:46, is 264 years .* 0 of \d+ wo"
    with pytest.raises(InputError, match=problem):
        prepare_otto(tmp_path, tmp_path)
    prepare_otto(tmp_path, tmp_path, val_days=0)


@pytest.mark.parametrize("encoding", ["utf-16", "bz2"])
def test_other_encodings(tmp_path: Path, write_raw: Callable[..., Path], encoding: str) -> None:
    raw = write_raw(random_log(1, 300), random_log(2, 20))
    text = (raw / TRAIN).read_bytes()
    (raw / TRAIN).write_bytes(
        bz2.compress(text) if encoding == "bz2" else text.decode().encode(encoding)
    )
    with pytest.raises(InputError, match=rf"{TRAIN} is (UTF-16 text|compressed by bzip2)"):
        prepare_otto(raw, tmp_path / "d", skip_bad_lines=True)


def test_test_may_not_be_a_copy_of_train(tmp_path: Path) -> None:
    lines = [published_line(number, events) for number, events in enumerate(random_log(1, 300))]
    for file in (TRAIN, TEST):
        (tmp_path / file).write_text("\n".join(lines))
    with pytest.raises(InputError, match=f"{TRAIN} and .*{TEST} hold the same sessions"):
        prepare_otto(tmp_path, tmp_path)
    assert not (tmp_path / "otto").exists()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"session":1,"events":[{"aid":5,"ts":1', "not valid JSON"),
        (
            b'{"session":1,"events":[{"aid":05,"ts":1659304800025,"type":"clicks"}]}',
            "not valid JSON",
        ),
        (b'{"session":1}', '"events"'),
        (b"[]", '"events"'),
        (b'{"session":1,"events":[3]}', "found 3"),
        (b'{"session":1,"events":[{"aid":"5","ts":1659304800025,"type":"clicks"}]}', 'found "5"'),
        (b'{"session":1,"events":[{"aid":-5,"ts":1659304800025,"type":"clicks"}]}', "found -5"),
        (b'{"session":1,"events":[{"aid":100000000,"ts":1659304800025,"type":"clicks"}]}', '"aid"'),
        (b'{"session":1,"events":[{"aid":5,"ts":1.5,"type":"clicks"}]}', "found 1.5"),
        (b'{"session":1,"events":[{"aid":5,"type":"clicks"}]}', "found nothing"),
        (b'{"session":1,"events":[{"aid":5,"ts":1659304800025,"type":"views"}]}', 'found "views"'),
        (b'{"session":1,"events":[{"aid":5,"ts":1659304800025,"type":["clicks"]}]}', '"type"'),
        (
            b'{"session":1,"events":[{"aid":5,"aid":6,"ts":1659304800025,"type":"clicks"}]}',
            "the key 'aid' occurs more than once",
        ),
        (b'{"events":[],"events":[]}', "the key 'events' occurs more than once"),
        (b"\xff\xfe", "not valid JSON"),
        ('{"session":1,"events":[]}'.encode("utf-16-le"), "not valid JSON"),
        (b'{"session":1,"events":[{"aid":5,"ts":1659304800,"type":"clicks"}]}', "of 13 digits"),
        (b'{"session":1,"events":[{"aid":5,"ts":16593048000250,"type":"clicks"}]}', "13 digits"),
    ],
)
def test_a_broken_line_is_named(
    tmp_path: Path, line: bytes, problem: str, write_raw: Callable[..., Path]
) -> None:
    good = [[(a, START + a * DAY, "clicks"), (a + 1, START + a * DAY, "clicks")] for a in range(9)]
    raw = write_raw(good, good)
    lines = (raw / TRAIN).read_bytes().splitlines()
    (raw / TRAIN).write_bytes(b"\n".join([*lines[:4], line, *lines[4:]]))
    with pytest.raises(InputError) as error:
        prepare_otto(raw, tmp_path / "data")
    assert f"{raw / TRAIN}, line 5: " in str(error.value)
    assert problem in str(error.value)
    assert list((tmp_path / "data").iterdir()) == []

    dataset = prepare_otto(raw, tmp_path / "data", skip_bad_lines=True)
    assert dataset.info["bad_lines"]["count"] == 1
    assert f"{TRAIN}, line 5: " in dataset.info["bad_lines"]["first"]
    assert dataset.num_items == 10
