"""Preparation in parts on disk that is killed, out of disk, tampered with or given extreme logs."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from helpers.tables import DAY, START, shop, write_csv

import tron_cli
from tron_cli.errors import InputError, RunError
from tron_cli.prepare import event_spool, session_files
from tron_cli.prepare.event_spool import EventSpool

COLUMNS: dict[str, Any] = {"user_col": "user", "item_col": "item", "time_col": "time"}

KILLED = """
import os, signal, sys
import tron_cli
from tron_cli.data.dataset import DatasetWriter
from tron_cli.prepare.event_spool import EventSpool
from tron_cli.prepare import event_spool
from tron_cli.prepare.session_files import SessionFile, SortedSessions
event_spool.PART_EVENTS = 100
file, data, owner, method, left = sys.argv[1:]
owner, left = globals()[owner], int(left)
function = getattr(owner, method)
def fatal(*args, **options):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **options)
setattr(owner, method, fatal)
tron_cli.prepare("table", name="x", data_dir=data, train=file, test=file + ".test",
                 user_col="user", item_col="item", time_col="time")
"""
PHASES = [
    ("EventSpool", "_append", 2),  # while the second table is read
    ("SessionFile", "append", 4),  # while sessions are made of events
    ("SessionFile", "read", 3),  # while rare items are dropped
    ("SortedSessions", "add", 7),  # while sessions are sorted by start
    ("DatasetWriter", "write_split", 2),
]


def tables(folder: Path, users: int = 60) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    files = {"train": folder / "log.csv", "test": folder / "log.csv.test"}
    for file in files.values():
        write_csv(file, shop(rng, users=users, days=9))
    return files


def prepare(data_dir: Path, name: str = "x", **options: Any) -> tron_cli.Dataset:
    return tron_cli.prepare("table", name=name, data_dir=data_dir, **COLUMNS, **options)


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_kill_9_in_any_phase_leaves_nothing_that_the_next_run_does_not_remove(
    tmp_path: Path,
) -> None:
    files = tables(tmp_path)
    killed = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, files["train"], tmp_path / str(number), *map(str, phase)]
        )
        for number, phase in enumerate(PHASES)
    ]
    for number, process in enumerate(killed):
        data_dir = tmp_path / str(number)
        assert process.wait(120) == -signal.SIGKILL, PHASES[number]
        assert any((data_dir / ".x.partial" / "scratch").iterdir())
        assert not (data_dir / "x").exists()
    prepare(tmp_path / "0", "other", input=files["train"])
    prepare(tmp_path / "1", input=files["train"])
    assert [path.name for path in (tmp_path / "0").iterdir()] == ["other"]
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["x"]


@pytest.mark.parametrize("number", [1, 20, 50])
def test_a_disk_that_becomes_full_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    files = tables(tmp_path)
    monkeypatch.setattr(event_spool, "PART_EVENTS", 100)
    append, left = session_files.SessionFile.append, [number]

    def full(*args: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(*args)

    monkeypatch.setattr(session_files.SessionFile, "append", full)
    with pytest.raises(RunError, match=r"cannot write .*data.x \(No space left .* make room in"):
        prepare(tmp_path / "data", **files)
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("damage", ["cut", "gone"])
@pytest.mark.parametrize("of", ["events", "sessions"])
def test_temporary_files_that_change_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str, damage: str
) -> None:
    files = tables(tmp_path)
    monkeypatch.setattr(event_spool, "PART_EVENTS", 100)
    divide, read = EventSpool.divide, session_files.SessionFile.read

    def harm(pattern: str) -> None:
        for file in sorted((tmp_path / "x.data" / ".x.partial" / "scratch").glob(pattern))[:6]:
            file.write_bytes(file.read_bytes()[:-9]) if damage == "cut" else file.unlink()

    def divided(spool: EventSpool) -> None:
        divide(spool)
        harm("events/*")

    def reading(file: session_files.SessionFile, **options: Any) -> Any:
        harm("sessions-0-0.*")
        return read(file, **options)

    if of == "events":
        monkeypatch.setattr(EventSpool, "divide", divided)
    else:
        monkeypatch.setattr(session_files.SessionFile, "read", reading)
    with pytest.raises(RunError, match=r"temporary files .* were changed .* prepare again"):
        prepare(tmp_path / "x.data", **files)


def frame(sessions: np.ndarray, items: np.ndarray) -> pl.DataFrame:
    times = START + np.arange(len(items)) * (10 * DAY) // len(items)
    return pl.DataFrame({"user": sessions, "item": items, "time": times})


def test_data_frames_of_killed_runs_are_removed_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name, age in (("tron-frames-old", 90_000), ("tron-frames-live", 60)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "the data frame input").write_bytes(b"PAR1")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    events = frame(np.arange(600) // 3, np.arange(600) % 7)
    prepare(tmp_path / "data", input=events)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "tron-frames-live"]
    shards = tmp_path / "shards"
    shards.mkdir()
    for name, age in ((".shard-00000-of-00001.parquet.1.aa.partial", 90_000), (".x.partial", 60)):
        (shards / name).touch()
        os.utime(shards / name, (time.time() - age,) * 2)
    tron_cli.write_shard(events, shards, 0, count=1, **COLUMNS)
    assert sorted(path.name for path in shards.iterdir()) == [
        ".x.partial",
        "shard-00000-of-00001.parquet",
    ]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(RunError, match=r"cannot write data frames to .*missing .* TMPDIR"):
        prepare(tmp_path / "data", "y", input=events)


def test_a_million_sessions_of_one_event_and_one_of_a_million(tmp_path: Path) -> None:
    million = 10**6
    with pytest.raises(InputError, match="short sessions dropped 1,000,000"):
        prepare(tmp_path, input=frame(np.arange(million), np.arange(million) % 1000))
    sessions = np.where(np.arange(million + 900) % 1001 < 1000, -1, np.arange(million + 900) // 3)
    items = np.random.default_rng(0).integers(0, 1000, len(sessions))
    sessions[-300:] = 10**7 + np.arange(300) // 3
    data = prepare(tmp_path, input=frame(sessions, items), test_days=0.001, session_gap="100d",
                   val_days=0)  # fmt: skip
    train = data.split("train")
    longest = int(np.argmax(train.lengths))
    assert data.item_ids[train[longest] - 1].tolist() == items[sessions == -1].tolist()
