"""A disk that is full, and paths that are empty, as a person meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.tables import shop, write_csv

pytest.importorskip("resource", reason="limits the size of files")

# A file that outgrows the limit raises OSError, as it does on a full disk.
LIMITED = """
import resource, sys
from tron_cli.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
sys.exit(main())
"""


def otto_line(session: int) -> str:
    events = [
        {"aid": n, "ts": 1_661_724_000_000 + session * 9_000_000 + n, "type": "clicks"}
        for n in range(1, 9)
    ]
    return json.dumps({"session": session, "events": events}, separators=(",", ":")) + "\n"


@pytest.mark.parametrize("bytes_per_file", [200, 1500, 5000])
@pytest.mark.parametrize("source", ["table", "otto"])
def test_a_full_disk_is_reported_with_the_folder(
    tmp_path: Path, source: str, bytes_per_file: int
) -> None:
    raw, data_dir = tmp_path / "raw", tmp_path / "data"
    raw.mkdir()
    if source == "table":
        write_csv(raw / "a.csv", shop(np.random.default_rng(0), users=300, days=4))
        words = ["--input", raw / "a.csv", "--item-col", "item", "--time-col", "time"]
        words += ["--user-col", "user", "--name", "otto"]
    else:
        (raw / "otto-recsys-train.jsonl").write_text("".join(map(otto_line, range(200))))
        (raw / "otto-recsys-test.jsonl").write_text("".join(map(otto_line, range(200, 230))))
        words = ["--raw", raw]
    command = ["prepare", source, *words, "--data-dir", data_dir]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(bytes_per_file), *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"tron: cannot write {data_dir / 'otto'} (")
    assert last.endswith(f"; make room in {data_dir}, or name another folder with --data-dir")
    assert "Traceback" not in done.stderr
    assert list(data_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "option"),
    [
        *(("table", option) for option in ("--input", "--train", "--val", "--test", "--data-dir")),
        *(("sequences", option) for option in ("--train", "--val", "--test", "--data-dir")),
        *((source, "--raw") for source in ("otto", "yoochoose", "diginetica", "ml1m")),
    ],
)
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_path_is_not_the_current_folder(
    source: str, option: str, empty: str, command: Callable[..., tuple[int, str, str]]
) -> None:
    words = ["--train", "a", "--test", "b", "--name", "c"] if source == "sequences" else []
    if source == "table":
        words = ["--item-col", "i", "--time-col", "t", "--name", "c"]
    code, _, error = command("prepare", source, *words, option, empty)
    assert code == 2
    assert f"'{option}': it is empty: name a path, or . for the current folder" in error
