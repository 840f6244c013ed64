"""`tron serve` as a process: answers of real checkpoints, signals, kills, ports."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.checkpoints import random_checkpoint
from helpers.datasets import random_sessions, write_dataset
from helpers.servers import ask, running_server

from tron_cli.data.dataset import Dataset
from tron_cli.serving.recommender import Recommendation, Recommender

Command = Callable[..., tuple[int, str, str]]
NUM_ITEMS = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    rng = np.random.default_rng(5)
    return write_dataset(
        tmp_path_factory.mktemp("data"),
        train=random_sessions(rng, 60, NUM_ITEMS),
        test=random_sessions(rng, 40, NUM_ITEMS),
        item_ids=np.array([f"SKU {number}" for number in range(NUM_ITEMS)], dtype=object),
    )


@pytest.fixture(scope="module")
def checkpoint(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("run") / "model-step=5.pt"
    random_checkpoint(data, file, with_ties=True)
    return file


@contextmanager
def tron_serve(path: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run `tron serve` on a free port until the block ends; yield the process and its port."""
    command = [sys.executable, "-m", "tron_cli", "serve", str(path), "--port", "0", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            found = re.fullmatch(r"serving .* on http://127\.0\.0\.1:(\d+)\n", line)
            assert found, line + process.stderr.read()
            yield process, int(found[1])
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("model", "filter_rated"),
    [("sasrec", False), ("sasrec", True), ("gru4rec", None), ("bert4rec", None), ("markov", True)],
)
def test_answers_are_those_of_the_recommender(
    data: Dataset, tmp_path: Path, model: str, filter_rated: bool | None
) -> None:
    """Several histories in one request, and each alone, excluding items as the model does.

    Scores may differ in their last digits where other histories were computed beside.
    """
    file = tmp_path / "model.pt"
    random_checkpoint(data, file, with_ties=True, model=model)
    recommender = Recommender.load(file)
    histories = [data.item_ids[session - 1].tolist() for session in data.split("test")]
    options: dict[str, Any] = {"k": 25, "filter_rated": filter_rated}

    def check(answer: dict[str, Any], expected: Recommendation) -> None:
        assert answer["items"] == expected.items
        assert answer["scores"] == pytest.approx(expected.scores, rel=1e-5, abs=1e-7)

    expected = recommender.recommend(histories, **options)
    with running_server(Recommender.load, file) as server:
        _, together = server.post("/recommend", {"histories": histories, **options})
        for answer, found in zip(together["recommendations"], expected, strict=True):
            check(answer, found)
        for history, found in zip(histories[:10], expected, strict=False):
            check(server.post("/recommend", {"items": history, **options})[1], found)
            gone = [*found.items[1:20:3], "unknown"]
            (rest,) = recommender.recommend([history], exclude=gone, **options)
            asked = {"items": history, "exclude": gone, **options}
            check(server.post("/recommend", asked)[1], rest)


def test_similar_and_what_the_model_refuses(checkpoint: Path) -> None:
    similar = Recommender.load(checkpoint).similar("SKU 7", k=5)
    with running_server(Recommender.load, checkpoint) as server:
        status, answer = server.post("/similar", {"item": "SKU 7", "k": 5})
        assert (status, answer) == (200, {"items": similar.items, "scores": similar.scores})
        for path, body in (
            ("/similar", {"item": "nothing"}),
            ("/recommend", {"items": [], "candidates": ["nothing"]}),
        ):
            status, answer = server.post(path, body)
            assert status == 422
            assert "nothing" in answer["error"]
            assert str(checkpoint.parent) not in answer["error"]
        long = {"items": ["SKU 7"] * 9_000 + ["?"] * 1_000}
        assert server.post("/recommend", long)[0] == 200
        assert len(server.post("/recommend", {"items": []})[1]["items"]) == 20
        for item in (10**18, 10**19, -(10**300)):
            assert server.post("/recommend", {"items": [item]})[0] == 200


def test_reload_stop_and_kill(checkpoint: Path, data: Dataset, tmp_path: Path) -> None:
    """SIGHUP loads the new best checkpoint of a run folder, a damaged one does no harm."""
    shutil.copy(checkpoint, tmp_path / "a.pt")
    body = {"items": ["SKU 7"], "k": 3}
    with tron_serve(tmp_path, "--no-access-log") as (process, port):
        first = ask(port, "POST", "/recommend", body)
        assert first[0] == 200
        content = bytearray(checkpoint.read_bytes())
        content[len(content) // 2] ^= 255
        (tmp_path / "b.pt").write_bytes(content)
        (tmp_path / "a.pt").unlink()
        process.send_signal(signal.SIGHUP)
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("not reloaded, a.pt is still served: ")
        assert "b.pt is damaged" in line
        assert ask(port, "POST", "/recommend", body)[:2] == first[:2]
        random_checkpoint(data, tmp_path / "b.pt", embedding_dim=16)
        process.send_signal(signal.SIGHUP)
        assert process.stderr.readline().startswith("reloaded: b.pt, step 5, 60 items")
        assert ask(port, "GET", "/ready")[1]["checkpoint"] == "b.pt"
        assert ask(port, "POST", "/recommend", body)[1] != first[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert "stopping" in process.stderr.read()


def test_killed_and_started_again_on_the_same_port(checkpoint: Path, command: Command) -> None:
    """It listens to this machine alone, unless asked for more."""
    with tron_serve(checkpoint) as (process, port):
        with socket.socket() as other:
            other.bind(("127.0.0.2", port))  # would be in use if the server listened everywhere
        code, out, err = command("serve", checkpoint, "--port", port)
        assert (code, out) == (2, "")
        assert err == (
            f"tron: cannot listen on 127.0.0.1:{port} (Address already in use); pass another "
            "--host or --port\n"
        )
        assert ask(port, "GET", "/health")[0] == 200
        process.kill()
        process.wait(10)
    words = [sys.executable, "-m", "tron_cli", "serve", str(checkpoint), "--port", str(port)]
    everywhere = [*words, "--host", "0.0.0.0"]
    with subprocess.Popen(everywhere, stderr=subprocess.PIPE, text=True) as again:
        assert again.stderr is not None
        try:
            assert f"on http://0.0.0.0:{port}\n" in again.stderr.readline()
            assert "reachable from other machines" in again.stderr.readline()
            assert ask(port, "GET", "/ready")[0] == 200
            again.send_signal(signal.SIGINT)
            assert again.wait(10) == 0
        finally:
            again.kill()


def test_without_its_packages_a_sentence_says_what_to_install(checkpoint: Path) -> None:
    script = """
import sys
from tron_cli.cli import _run
for missing in ("uvicorn", "httptools", "msgspec", "prometheus_client"):
    for name in [*sys.modules]:
        if name.startswith(("tron_cli.serving", "uvicorn", missing)):
            del sys.modules[name]
    sys.modules[missing] = None
    assert _run(["serve", sys.argv[1]], False) == 2
    del sys.modules[missing]
"""
    command = [sys.executable, "-c", script, str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [
        f"tron: tron serve needs {missing}; install it with pip install 'tron-recsys[serve]'"
        for missing in ("uvicorn", "httptools", "msgspec", "prometheus_client")
    ]


def test_what_cannot_be_served(command: Command, tmp_path: Path) -> None:
    code, _, err = command("serve", tmp_path / "no.pt", "--port", 0)
    assert (code, err.count("\n")) == (2, 1)
    assert "no checkpoint at" in err
    (tmp_path / "no.pt").write_bytes(os.urandom(99))
    code, _, err = command("serve", tmp_path / "no.pt", "--port", 0)
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = command("serve", tmp_path / "no.pt", "--max-histories", 9, "--max-waiting", 8)
    assert code == 2
    assert "--max-waiting" in err
