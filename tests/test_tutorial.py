"""docs/tutorial.md: every command runs as it stands, in order, on a log like the page's."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)

# torch is imported once.
ONE_PROCESS = """
import json, subprocess, sys
from tron_cli.cli import _run
for program, *words in json.loads(sys.argv[1]):
    code = _run(words, False) if program == "tron" else subprocess.call([program, *words])
    assert code == 0, words
"""


def write_log(file: Path) -> None:
    """500 visits of 20 days with the page's columns; the next item is the one after."""
    random = np.random.default_rng(7)
    rows = [BLOCKS[0][1].splitlines()[0]]
    for visit in range(500):
        start = datetime(2025, 3, 1) + timedelta(days=float(random.random() * 20))
        first, length = int(random.integers(30)), int(random.integers(2, 9))
        rows += [
            f"v{visit},SKU-{(first + place) % 30},{(start + timedelta(seconds=place)).isoformat()}"
            for place in range(length)
        ]
    file.write_text("\n".join(rows) + "\n")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """`tron` on the PATH is this checkout's."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "tron"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tron_cli "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


def page_line(start: str) -> str:
    """Return the one line of the page's blocks that begins so."""
    (line,) = [line for _, block in BLOCKS for line in block.splitlines() if line.startswith(start)]
    return line


@contextmanager
def served(folder: Path, environment: dict[str, str]) -> Iterator[int]:
    """Run the page's `tron serve`, on a free port, until the block ends; yield the port."""
    words = shlex.split(page_line("tron serve").replace("--reload-every 60", "--reload-every 0.2"))
    with subprocess.Popen(
        [sys.executable, "-m", "tron_cli", *words[1:], "--port", "0"],
        cwd=folder, env=environment, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            found = re.fullmatch(r"serving .* on http://127\.0\.0\.1:(\d+)\n", line)
            assert found, line + process.stderr.read()
            yield int(found[1])
        finally:
            process.terminate()
            process.stderr.read()
        assert process.wait(30) == 0


@pytest.mark.slow
def test_every_command_of_the_tutorial_runs(tmp_path: Path, environment: dict[str, str]) -> None:
    """With one epoch instead of twenty, and a server that looks for a new model more often."""
    for module in ("uvicorn", "prometheus_client"):  # of the extra [serve]
        pytest.importorskip(module)
    shop = tmp_path / "shop"
    shop.mkdir()
    write_log(shop / "events.csv")

    commands = [
        shlex.split(line.replace("max_epochs=20", "max_epochs=1"))
        for language, block in BLOCKS
        if language != "sh"
        for line in block.splitlines()
        if line.startswith(("tron ", "ln ")) and not line.startswith("tron serve")
    ]
    assert len(commands) >= 10
    done = subprocess.run(
        [sys.executable, "-c", ONE_PROCESS, json.dumps(commands)],
        cwd=shop, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "difference from tron" in done.stdout
    rows = list(csv.DictReader((shop / "recommendations.csv").open()))
    assert list(rows[0]) == ["session", "rank", "item", "score"]
    assert len({row["session"] for row in rows}) == 500
    assert (shop / "runs" / "current").resolve() == shop / "runs" / "store-final"

    with served(shop, environment) as port:
        asked = page_line("curl ").replace("localhost:8000", f"127.0.0.1:{port}")
        answer = subprocess.run(shlex.split(asked), capture_output=True, text=True)
        assert len(json.loads(answer.stdout)["items"]) == 5, answer.stderr
        check_nights(shop, environment, f"http://127.0.0.1:{port}/metrics")


def check_nights(shop: Path, environment: dict[str, str], metrics: str) -> None:
    """Run the script of every night, and again on damaged logs."""
    (script,) = [block for language, block in BLOCKS if language == "sh"]
    (shop / "retrain.sh").write_text(script.replace("max_epochs=20", "max_epochs=1"))
    line = page_line("15 3 ")
    assert re.fullmatch(r"(\S+ ){5}PATH=\S+ sh /srv/shop/retrain.sh >> \S+ 2>&1", line)
    (shop / "recommendations.csv").unlink()
    nightly = ["sh", str(shop / "retrain.sh")]
    done = subprocess.run(nightly, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    current = (shop / "runs" / "current").resolve()
    assert current.name.endswith("-final")
    assert current.name != "store-final"
    assert (shop / "recommendations.csv").is_file()
    deadline = time.monotonic() + 30
    while 'tron_reloads_total{outcome="done"} 1' not in urlopen(metrics).read().decode():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # Without a column, and with more bad lines than good ones.
    for log in ("session,item\nv1,SKU-1\n", "session,item,time\n" + "v1,SKU-1\n" * 9):
        (shop / "events.csv").write_text(log)
        done = subprocess.run(nightly, env=environment, capture_output=True, text=True)
        assert done.returncode == 2
        assert (shop / "runs" / "current").resolve() == current
