"""Shards of a log: the dataset of the whole log from workers of any engine, or a sentence."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from helpers.tables import DAY, MINUTE, START, shop

import tron_cli
from tron_cli.errors import InputError

COLUMNS: dict[str, Any] = {"user_col": "user", "item_col": "item", "time_col": "time"}


def log(seed: int, users: int = 150) -> list[str]:
    """Return lines of a CSV file with many ties of time, quotes and bad lines."""
    rng = np.random.default_rng(seed)
    rows = shop(rng, users=users, days=12)
    lines = [f'"{user}",{item},{at // MINUTE * MINUTE},{kind}' for user, item, at, kind in rows]
    for at in rng.integers(len(lines), size=9).tolist():
        lines[at] = str(rng.choice(["broken", "u1,,5,view", "u1,i3,yesterday,view"]))
    return lines


def write_parts(folder: Path, lines: list[str], cuts: list[int]) -> list[Path]:
    """Write runs of the lines as CSV files."""
    folder.mkdir()
    bounds = [0, *cuts, len(lines)]
    files = []
    for number, (low, high) in enumerate(pairwise(bounds)):
        files.append(folder / f"part-{number}.csv")
        files[-1].write_text("\n".join(["user,item,time,kind", *lines[low:high]]) + "\n")
    return files


def contents(dataset: tron_cli.Dataset) -> dict[str, bytes]:
    """Return all files of a dataset, dataset.json without its sources."""
    found = {
        str(path.relative_to(dataset.path)): path.read_bytes()
        for path in sorted(dataset.path.rglob("*"))
        if path.is_file()
    }
    info = json.loads(found["dataset.json"])
    del info["sources"], info["name"], info["options"]["input"]
    return found | {"dataset.json": json.dumps(info).encode()}


@pytest.mark.parametrize(
    ("options", "rules"),
    [
        ({}, {"session_gap": "20m"}),
        (
            {"event_col": "kind", "keep_events": "view"},
            {"split": "leave-one-out", "min_item_count": 2},
        ),
    ],
)
def test_two_workers_write_the_dataset_of_the_whole_log(
    tmp_path: Path, options: dict[str, Any], rules: dict[str, Any]
) -> None:
    lines = log(3)
    parts = write_parts(tmp_path / "parts", lines, [len(lines) // 5, len(lines) // 2])
    (whole,) = write_parts(tmp_path / "log", lines, [])
    reading = {**COLUMNS, **options, "skip_bad_lines": True}
    expected = tron_cli.prepare(
        "table", name="whole", data_dir=tmp_path, input=whole, **reading, **rules
    )
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as workers:
        tasks = [
            workers.submit(
                tron_cli.write_shard, part, tmp_path / "shards", number, count=3, **reading
            )
            for number, part in enumerate(parts)
        ]
        for task in tasks:
            task.result()
    joined = tron_cli.join_shards(tmp_path / "shards", name="joined", data_dir=tmp_path, **rules)
    found, wanted = contents(joined), contents(expected)
    assert found.keys() == wanted.keys()
    for name, content in wanted.items():
        assert found[name] == content, name
    assert joined.info["bad_lines"]["count"] == expected.info["bad_lines"]["count"] > 3


def frame(*events: tuple[Any, Any, int]) -> pl.DataFrame:
    return pl.DataFrame(
        events, schema=["user", "item", "time"], orient="row", infer_schema_length=None
    )


def visits(first: int, last: int, prefix: str = "") -> pl.DataFrame:
    """Return visits of three events each, two hours apart."""
    return frame(
        *(
            (f"u{visit}", f"{prefix}{(visit + step) % 7}", START + visit * DAY // 12 + step)
            for visit in range(first, last)
            for step in range(3)
        )
    )


def write(folder: Path, number: int, events: Any, count: int = 3, **options: Any) -> Path:
    options = {**COLUMNS, "time_unit": "ms", **options}
    return tron_cli.write_shard(events, folder / "shards", number, count=count, **options)


def join(folder: Path, **options: Any) -> tron_cli.Dataset:
    return tron_cli.join_shards(folder / "shards", name="shop", data_dir=folder, **options)


def test_sessions_that_several_shards_share_are_whole_and_empty_shards_count(
    tmp_path: Path,
) -> None:
    events = visits(0, 60)
    scattered = [events.gather_every(2), events.clear(), events.gather_every(2, 1)]
    for number, part in enumerate(scattered):
        write(tmp_path, number, part)
    expected = tron_cli.prepare(
        "table", name="whole", data_dir=tmp_path, input=pl.concat(scattered),
        time_unit="ms", **COLUMNS,
    )  # fmt: skip
    joined = join(tmp_path)
    assert contents(joined) == contents(expected)
    assert joined.info["splits"]["train"]["mean_length"] == 3


def test_a_shard_that_is_written_again_replaces_the_first(tmp_path: Path) -> None:
    for number, part in enumerate([visits(0, 20), visits(20, 40), visits(40, 60)]):
        write(tmp_path, number, part)
        if number == 1:
            write(tmp_path, number, part)
    assert join(tmp_path).info["filters"][0]["events"] == 180


def test_a_worker_that_is_killed_leaves_no_shard(tmp_path: Path) -> None:
    """Killed while it writes, then written again."""
    write(tmp_path, 0, visits(0, 40), count=2)
    worker = multiprocessing.get_context("spawn").Process(
        target=_killed_while_writing, args=(tmp_path,)
    )
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "shards").glob(".*.partial"))) == 1
    with pytest.raises(InputError, match=r"lacks 1 of 2 shards \(number 1\): write it again"):
        join(tmp_path)
    write(tmp_path, 1, visits(40, 60), count=2)
    assert join(tmp_path).info["filters"][0]["events"] == 180


def _killed_while_writing(folder: Path) -> None:
    from pyarrow.parquet import ParquetWriter

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    ParquetWriter.add_key_value_metadata = die
    write(folder, 1, visits(40, 60), count=2)


def test_shards_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="shards is not a folder of shards"):
        join(tmp_path)
    (tmp_path / "shards").mkdir()
    with pytest.raises(InputError, match="holds no shard"):
        join(tmp_path)
    write(tmp_path, 0, visits(0, 30), count=2)
    write(tmp_path, 1, visits(30, 60), count=2, null_tokens="none")
    with pytest.raises(InputError, match=r"was written with null_tokens .* same options"):
        join(tmp_path)
    write(tmp_path, 1, visits(30, 60).with_columns(pl.col("item").cast(int)), count=2)
    with pytest.raises(InputError, match=r"item holds integers, but text in .*00000-of-00002"):
        join(tmp_path)
    third = write(tmp_path, 0, visits(30, 60), count=3)
    with pytest.raises(InputError, match="are of different numbers of shards"):
        join(tmp_path)
    third.unlink()
    (tmp_path / "shards" / "_SUCCESS").touch()
    with pytest.raises(InputError, match="_SUCCESS is not a shard"):
        join(tmp_path)


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 0, visits(0, 30), count=2)
    second = write(tmp_path, 1, visits(30, 60), count=2)
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"not a readable shard .*; write it again"):
        join(tmp_path)
    visits(30, 60).write_parquet(second)
    with pytest.raises(InputError, match=r"not a readable shard .*; write it again"):
        join(tmp_path)
    flipped = bytearray(content)
    flipped[len(content) // 8] ^= 255
    second.write_bytes(flipped)
    with pytest.raises(InputError, match=r"00001-of-00002"):
        join(tmp_path)


def test_units_of_times_that_were_guessed_differently_are_refused(tmp_path: Path) -> None:
    seconds = visits(0, 30).with_columns(pl.col("time") // 1000)
    write(tmp_path, 0, seconds, count=2, time_unit="auto")
    write(tmp_path, 1, visits(30, 60), count=2, time_unit="auto")
    with pytest.raises(InputError, match=r"were read as s and those of .* as ms: name their unit"):
        join(tmp_path)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="number must be from 0 to 1, got 2"):
        write(tmp_path, 2, visits(0, 3), count=2)
    with pytest.raises(InputError, match="expected session_col, user_col or both"):
        write(tmp_path, 0, visits(0, 3), user_col=None)
    with pytest.raises(InputError, match="no column 'sku': its columns are"):
        write(tmp_path, 0, visits(0, 3), item_col="sku")
    with pytest.raises(InputError, match="item_col is given to write_shard"):
        join(tmp_path, item_col="item")
    assert not list((tmp_path / "shards").glob("*"))
    write(tmp_path, 0, visits(0, 3).clear(), count=1)
    with pytest.raises(InputError, match="holds no readable event"):
        join(tmp_path)


def test_the_example_of_the_page_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    code = page.split("## Logs that exceed one machine")[1].split("```python\n")[1].split("```")[0]
    assert "ProcessPoolExecutor()" in code
    (tmp_path / "example.py").write_text(
        code.replace("ProcessPoolExecutor()", "ProcessPoolExecutor(2)")
    )
    (tmp_path / "logs").mkdir()
    events = visits(0, 60).rename({"user": "visit", "item": "sku", "time": "ts"})
    for number, part in enumerate(events.iter_slices(50)):
        part.write_csv(tmp_path / "logs" / f"{number}.csv")
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.stdout == "7\n", done.stderr
