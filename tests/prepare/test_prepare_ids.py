"""Original ids of sessions and users, read back from the dataset row by row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from helpers.datasets import pack_sessions, write_dataset

from tron_cli.data.dataset import SPLITS, Dataset, DatasetWriter, Sessions
from tron_cli.errors import InputError
from tron_cli.prepare.sources.diginetica import prepare_diginetica
from tron_cli.prepare.sources.ml1m import prepare_ml1m
from tron_cli.prepare.sources.otto import prepare_otto
from tron_cli.prepare.sources.sequences import prepare_sequences
from tron_cli.prepare.sources.table import TableColumns, prepare_table
from tron_cli.prepare.sources.yoochoose import prepare_yoochoose

MINUTE, DAY = 60_000, 86_400_000
START = 1_396_310_400_000  # 2014-04-01 in ms

Row = tuple[str, str, int, int]  # user, session, item, time


def log(seed: int = 3, users: int = 40, days: int = 8) -> list[Row]:
    """Users with visits of one to five events on some days, in no order."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for user in range(users):
        for visit in range(int(rng.integers(1, 4))):
            at = START + int(rng.integers(0, days * DAY)) // 1000 * 1000
            for _ in range(int(rng.integers(1, 6))):
                item = 100 + int(rng.integers(0, 6))
                rows.append((f"ü{user}", f"{user}-{visit}", item, at))
                at += int(rng.integers(1, 5)) * MINUTE
    return [rows[at] for at in rng.permutation(len(rows))]


def by_id(dataset: Dataset, split: str, ids: Any) -> dict[Any, list[tuple[int, int]]]:
    """(item, time) of each session of a split, by its id."""
    sessions = dataset.split(split)
    assert len(ids) == len(sessions)
    assert sessions.times is not None or not len(sessions)
    events = zip(
        dataset.item_ids[sessions.items - 1].tolist(),
        np.array(sessions.times).tolist(),
        strict=True,
    )
    flat = list(events)
    names = ids[np.arange(len(sessions))].tolist()
    assert len(set(names)) == len(names)
    return {
        name: flat[sessions.offsets[row] : sessions.offsets[row + 1]]
        for row, name in enumerate(names)
    }


def write_table(path: Path, rows: list[Row], session: Any = str) -> Path:
    lines = ["user,session,item,time"]
    lines += [f"{user},{session(visit)},{item},{at}" for user, visit, item, at in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def as_number(visit: str) -> int:
    return int(visit.replace("-", "0"))


@pytest.mark.parametrize(("spell", "dtype"), [(str, object), (as_number, np.int64)])
def test_session_ids_of_a_table_are_those_of_the_source(
    tmp_path: Path, spell: Any, dtype: Any
) -> None:
    rows = log()
    dataset = prepare_table(
        write_table(tmp_path / "log.csv", rows, spell),
        TableColumns("item", "time", session="session"),
        tmp_path,
        "shop",
        val_days=2,
        min_item_count=1,
    )
    kept = 0
    for split in SPLITS:
        ids = dataset.session_ids(split)
        assert ids is not None
        assert dataset.user_ids(split) is None
        assert ids[np.array([0])].dtype == dtype
        for name, events in by_id(dataset, split, ids).items():
            source = [(item, at) for _, visit, item, at in rows if spell(visit) == name]
            assert set(events) <= set(source)
            kept += 1
        backwards = np.arange(len(ids))[::-1]
        assert ids[backwards].tolist() == ids[np.arange(len(ids))].tolist()[::-1]
    assert kept > 30


def test_sessions_cut_from_a_user_s_log_have_the_user_s_id_and_none_of_their_own(
    tmp_path: Path,
) -> None:
    rows = log()
    file = tmp_path / "log.parquet"
    pl.DataFrame(rows, schema=["user", "session", "item", "time"], orient="row").write_parquet(file)
    columns = TableColumns("item", "time", user="user")
    cut = prepare_table(file, columns, tmp_path, "cut", min_item_count=1)
    whole = prepare_table(file, columns, tmp_path, "whole", leave_one_out=True, min_item_count=1)
    for dataset in (cut, whole):
        for split in SPLITS:
            assert dataset.session_ids(split) is None
            users = dataset.user_ids(split)
            sessions = dataset.split(split)
            assert users is not None
            assert len(users) == len(sessions)
            assert sessions.times is not None
            for row, name in enumerate(users[np.arange(len(users))]):
                source = {(item, at) for user, _, item, at in rows if user == name}
                span = slice(sessions.offsets[row], sessions.offsets[row + 1])
                items = dataset.item_ids[sessions.items[span] - 1].tolist()
                assert set(zip(items, sessions.times[span].tolist(), strict=True)) <= source
    names = whole.user_ids("test")
    assert names is not None
    assert len(set(names[np.arange(len(names))])) == len(names)


def test_session_ids_of_yoochoose_and_diginetica(tmp_path: Path) -> None:
    rows = [(user, as_number(visit), item, at) for user, visit, item, at in log(users=200, days=30)]
    yoochoose, diginetica = tmp_path / "clicks.dat", tmp_path / "views.csv"
    moments = [str(np.datetime64(at, "ms")) for *_, at in rows]
    yoochoose.write_text(
        "".join(
            f"{visit},{moment}Z,{item},S\n"
            for (_, visit, item, _), moment in zip(rows, moments, strict=True)
        )
    )
    diginetica.write_text(
        "sessionId;userId;itemId;timeframe;eventdate\n"
        + "".join(
            f"{visit};NA;{item};{at % DAY};{moment[:10]}\n"
            for (_, visit, item, at), moment in zip(rows, moments, strict=True)
        )
    )
    for dataset in (
        prepare_yoochoose(yoochoose, tmp_path),
        prepare_diginetica(diginetica, tmp_path, val_days=0),
    ):
        for split in ("train", "test"):
            ids = dataset.session_ids(split)
            assert ids is not None
            assert dataset.user_ids(split) is None
            for name, events in by_id(dataset, split, ids).items():
                assert set(events) <= {(item, at) for _, v, item, at in rows if v == name}


def test_session_ids_of_otto_are_its_session_numbers(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    lines: dict[str, dict[int, list[tuple[int, int]]]] = {"train": {}, "test": {}}
    for part, numbers in (("train", range(7, 207)), ("test", range(12_899_779, 12_899_829))):
        for number in numbers:
            at = START + int(rng.integers(0, 6 * DAY))
            lines[part][number] = [(int(rng.integers(0, 9)), at + n) for n in range(number % 5)]
    raw = tmp_path / "raw"
    raw.mkdir()
    for part, sessions in lines.items():
        with (raw / f"otto-recsys-{part}.jsonl").open("w") as file:
            for number, events in sessions.items():
                clicks = [{"aid": aid, "ts": ts, "type": "clicks"} for aid, ts in events]
                # Every third line is not as published, and is read as any JSON.
                pretty = {"indent": None, "separators": (" ,", " : ") if number % 3 else (",", ":")}
                file.write(json.dumps({"session": number, "events": clicks}, **pretty) + "\n")  # type: ignore[arg-type]
    dataset = prepare_otto(raw, tmp_path, max_val_sessions=20)
    for split in SPLITS:
        ids = dataset.session_ids(split)
        assert ids is not None
        assert dataset.user_ids(split) is None
        part = lines["test" if split == "test" else "train"]
        found = by_id(dataset, split, ids)
        assert found
        for name, events in found.items():
            assert events == part[name][: len(events)]


def test_otto_s_lines_without_a_number_have_the_id_minus_one(tmp_path: Path) -> None:
    event = '{"aid":1,"ts":%d,"type":"clicks"}'
    pair = f"[{event % START},{event % (START + 1)}]"
    late = f"[{event % (START + 9 * DAY)},{event % (START + 9 * DAY + 1)}]"
    heads = ("", '"session":"x",', '"session":5,')
    (tmp_path / "otto-recsys-train.jsonl").write_text(
        "".join(f'{{{head}"events":{pair}}}\n' for head in heads)
    )
    (tmp_path / "otto-recsys-test.jsonl").write_text(f'{{"session":8,"events":{late}}}\n')
    dataset = prepare_otto(tmp_path, tmp_path, val_days=0)
    ids = dataset.session_ids("train")
    assert ids is not None
    assert ids[np.arange(3)].tolist() == [-1, -1, 5]


def test_session_ids_of_sequences_are_the_line_numbers(tmp_path: Path) -> None:
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    train.write_text("1 2\n\n3\n" + "".join(f"{n % 7 + 1} {n % 5 + 1}\n" for n in range(40)))
    test.write_text("9\n1 2\n3 99\n2 3\n")
    dataset = prepare_sequences(train, test, tmp_path, "lines")
    found = {split: dataset.session_ids(split) for split in SPLITS}
    lines = {
        name: ids[np.arange(len(ids))].tolist() for name, ids in found.items() if ids is not None
    }
    assert lines["train"] + lines["val"] == [1, *range(4, 44)]
    assert len(lines["val"]) == 2
    assert lines["test"] == [2, 4]
    assert dataset.user_ids("train") is None


def test_ml1m_keeps_its_users(tmp_path: Path) -> None:
    raw = tmp_path / "ml-1m.txt"
    raw.write_text("".join(f"{user} {item}\n" for user in (9, 4, 600, 5) for item in (1, 2, 3, 2)))
    dataset = prepare_ml1m(raw, tmp_path)
    users = dataset.user_ids("test")
    assert users is not None
    assert users[np.arange(4)].tolist() == [9, 4, 600, 5]
    assert dataset.session_ids("test") is None


def test_text_ids_may_hold_anything_and_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    names = ["", "a\nb", "ünï", "x" * 1000, "7"]
    packed = pack_sessions([[1, 2]] * 5)
    with DatasetWriter(tmp_path / "text") as writer:
        writer.write_items(np.arange(3))
        for split in SPLITS:
            half = [
                Sessions(packed.items[:4], packed.offsets[:3], None, np.array(names[:2], object)),
                Sessions(packed.items[4:], packed.offsets[:4], None, np.array(names[2:], object)),
            ]
            writer.write_split(split, half if split != "val" else [])
        dataset = writer.finish(name="text", protocol="every-step")
    ids = dataset.session_ids("train")
    assert ids is not None
    assert len(ids) == 5
    rows = np.array([4, 1, 1, 0, 3, 2])
    assert ids[rows].tolist() == [names[row] for row in rows]
    assert ids[np.zeros(0, np.int64)].tolist() == []
    assert dataset.session_ids("val") is None


def test_datasets_without_ids_still_open(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, train=[[1, 2]], test=[[2, 1]])
    assert dataset.session_ids("train") is None
    assert dataset.user_ids("test") is None


def test_ids_that_do_not_fit_the_split_are_damage(tmp_path: Path) -> None:
    raw = tmp_path / "ml-1m.txt"
    raw.write_text("".join(f"{user} {item}\n" for user in (9, 4) for item in (1, 2, 3, 2)))
    dataset = prepare_ml1m(raw, tmp_path)
    shutil.copy(dataset.path / "item_ids.npy", dataset.path / "test" / "user_ids.npy")
    with pytest.raises(InputError, match=r"user_ids.npy of the test split .* damaged"):
        dataset.user_ids("test")
