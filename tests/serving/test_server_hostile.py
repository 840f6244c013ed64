"""Clients that are careless or hostile, and a log that nobody reads."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers.servers import HOST, FakeRecommender, RunningServer, running_server, wait_for

from tron_cli.serving.server import serve
from tron_cli.serving.settings import ServerSettings
from tron_cli.serving.telemetry import _BackgroundStderr

BODY = b'{"items": [10], "k": 1}'
HEAD = b"POST /recommend HTTP/1.1\r\nContent-Type: application/json\r\n"
REQUEST = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


def exchange(port: int, data: bytes) -> bytes:
    """Send bytes; return what comes back until the server closes or is silent for a while."""
    with socket.create_connection((HOST, port), timeout=0.3) as connection:
        found = b""
        try:
            connection.sendall(data)
            while chunk := connection.recv(1 << 16):
                found += chunk
        except TimeoutError:
            pass
        return found


def counted(server: RunningServer, path: str) -> Counter[int]:
    """Return how many requests to a path had which status."""
    found: Counter[int] = Counter()
    for metric in server.application.metrics.registry.collect():
        for sample in metric.samples:
            if sample.name == "tron_requests_total" and sample.labels["path"] == path:
                found[int(sample.labels["status"])] += int(sample.value)
    return found


def test_what_never_reached_a_path_is_logged_and_counted(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tron_cli.serving.protocol.RECEIVE_SECONDS", 0.1)
    with running_server(FakeRecommender(), access_log=True) as server:
        exchange(server.port, b"nonsense\r\n\r\n")
        exchange(server.port, b"GET /health HTTP/1.1\r\nX: " + b"x" * 70_000)
        exchange(server.port, HEAD)
        exchange(server.port, HEAD + b"Content-Length: 20\r\n\r\n{")
        monkeypatch.setattr("tron_cli.serving.protocol.MAX_CONNECTIONS", 0)
        exchange(server.port, b"")
        assert counted(server, "other") == {400: 1, 431: 1, 408: 1, 503: 1}
        assert counted(server, "/recommend") == {408: 1}
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line[:1] == "{"]
    assert [(line["status"], line["method"], line["path"], line["client"]) for line in lines] == [
        (400, None, None, HOST),
        (431, None, None, HOST),
        (408, None, None, HOST),
        (408, "POST", "/recommend", HOST),
        (503, None, None, HOST),
    ]


@pytest.mark.parametrize("requests", [1, 3])
def test_who_ends_its_side_after_the_request_is_answered(requests: int) -> None:
    """Close the connection only after the answer, as `nc -N` expects."""
    model = FakeRecommender()
    with running_server(model) as server:
        model.gate.clear()
        with socket.create_connection((HOST, server.port), timeout=10) as client:
            client.sendall(REQUEST * requests)
            client.shutdown(socket.SHUT_WR)
            wait_for(lambda: len(model.calls) > 0)
            time.sleep(0.05)
            model.gate.set()
            found = b""
            while chunk := client.recv(1 << 16):  # until the server closes
                found += chunk
        assert found.count(b"HTTP/1.1 200") == requests


def test_who_is_gone_before_the_turn_comes_is_not_computed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tron_cli.serving.protocol.HALF_CLOSE_SECONDS", -1.0)
    model = FakeRecommender()
    with running_server(model, access_log=True) as server:
        model.calls.clear()
        model.gate.clear()
        clients = [socket.create_connection((HOST, server.port)) for _ in range(5)]
        clients[0].sendall(REQUEST)
        wait_for(lambda: len(model.calls) == 1)
        for client in clients[1:]:
            client.sendall(REQUEST)
        clients.append(socket.create_connection((HOST, server.port)))
        clients[5].sendall(REQUEST[:-3])  # its body is never complete
        wait_for(lambda: server.application.batcher.waiting == 4)
        for client in (*clients[1:4], clients[5]):
            client.close()
        wait_for(lambda: counted(server, "/recommend")[499] == 4)
        model.gate.set()
        for client in (clients[0], clients[4]):
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
            client.close()
        assert sum(model.calls) == 2
        assert server.post("/recommend", {"items": [10]})[0] == 200
    err = capfd.readouterr().err
    assert err.count('"status":499') == 4
    assert "Traceback" not in err


def test_requests_in_a_row_are_answered_in_their_order_up_to_a_number() -> None:
    """More of them are cheaper to send than to keep."""
    with running_server(FakeRecommender()) as server:
        found = exchange(server.port, REQUEST + b"GET /health HTTP/1.1\r\n\r\n" * 60 + REQUEST)
        answers = found.split(b"HTTP/1.1 ")[1:]
        assert [answer[:3] for answer in answers] == [b"200"] * 62
        assert b"scores" in answers[0]
        assert b"scores" in answers[-1]
        assert all(b"ok" in answer for answer in answers[1:-1])
        many = exchange(server.port, b"GET /health HTTP/1.1\r\n\r\n" * 5_000)
        assert b"64 requests of this connection wait" in many
        assert many.count(b"HTTP/1.1 ") < 200
        assert server.get("/health")[0] == 200


def test_what_follows_a_chunked_body_is_no_header() -> None:
    """It is not kept either: it could be endless."""
    chunks = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)
    with running_server(FakeRecommender()) as server:
        sent = HEAD + chunks + b"Content-Type: text/plain\r\n\r\n"
        assert exchange(server.port, sent).startswith(b"HTTP/1.1 200")
        sent = b"POST /recommend HTTP/1.1\r\n" + chunks + b"Content-Type: application/json\r\n\r\n"
        assert exchange(server.port, sent).startswith(b"HTTP/1.1 415")


@pytest.mark.parametrize(
    ("data", "answers"),
    [
        (HEAD + b"Expect: 100-continue\r\nContent-Length: 23\r\n\r\n" + BODY, [100, 200]),
        (HEAD + b"Expect: 100-continue\r\nContent-Length: 999999999\r\n\r\n", [413]),
        (HEAD + b"Content-Encoding: Identity\r\nContent-Length: 23\r\n\r\n" + BODY, [200]),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n17;a=b\r\n" + BODY + b"\r\n0\r\n\r\n", [200]),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n", [400]),
        (HEAD + b"Content-Length: 23\r\nTransfer-Encoding: chunked\r\n\r\n", [400]),
        (HEAD + b"Content-Length: 23\r\nContent-Length: 5\r\n\r\n" + BODY, [400]),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", [400]),
        (b"GET http://elsewhere/health HTTP/1.1\r\n\r\n", [200]),
        (b"GET /%68ealth?a=b HTTP/1.1\r\n\r\n", [200]),
        (b"OPTIONS * HTTP/1.1\r\n\r\n", [404]),
        (b"CONNECT a:80 HTTP/1.1\r\n\r\n", [400]),
        (b"GET /h\xc3\xa9 HTTP/1.1\r\n\r\n", [400]),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400]),
    ],
)
def test_rare_forms_of_requests(data: bytes, answers: list[int]) -> None:
    with running_server(FakeRecommender()) as server:
        found = exchange(server.port, data).split(b"HTTP/1.1 ")[1:]
        assert [int(answer[:3]) for answer in found if answer[:3].isdigit()] == answers


def test_a_log_that_nobody_reads_stops_nobody() -> None:
    """Lines that nobody reads are dropped and counted; a closed pipe does no harm."""
    reader, writer = os.pipe()
    stream = _BackgroundStderr(writer)
    clock = time.perf_counter()
    for number in range(30_000):
        stream.write(f"{number} {'x' * 100}\n")
    stream.finish(0.05)
    assert time.perf_counter() - clock < 5
    found = b""
    while b"last" not in found:
        stream.write("last\n")
        found += os.read(reader, 1 << 16)
    words = [line.split(maxsplit=1) for line in found.decode().splitlines()]
    dropped = [int(word[0].replace(",", "")) for word in words if "dropped" in word[-1]]
    numbers = [int(word[0]) for word in words if word[-1][0] == "x"]
    assert numbers == sorted({*numbers})
    assert numbers[:5] == [0, 1, 2, 3, 4]
    assert len(numbers) >= 10_000
    assert len(numbers) + sum(dropped) >= 30_000
    os.close(reader)
    for _ in range(3):
        stream.write("to nobody\n")
    stream.finish()
    os.close(writer)


def test_a_hangup_while_the_model_is_loaded_is_a_reload() -> None:
    """It would end a process that does not expect it."""
    loads: list[Path] = []

    def load(path: Path) -> FakeRecommender:
        loads.append(path)
        os.kill(os.getpid(), signal.SIGHUP if len(loads) == 1 else signal.SIGTERM)
        return FakeRecommender()

    before = signal.getsignal(signal.SIGHUP)
    serve(Path("fake.pt"), load, host=HOST, port=0, settings=ServerSettings(access_log=False))  # type: ignore[arg-type]
    assert len(loads) == 2
    assert signal.getsignal(signal.SIGHUP) == before


def test_many_hangups_are_one_more_reload() -> None:
    """A reload that begins after the last of them reads what the last one meant."""
    loads: list[Path] = []
    gate = threading.Event()
    gate.set()

    def load(path: Path) -> FakeRecommender:
        loads.append(path)
        assert gate.wait(10)
        return FakeRecommender()

    with running_server(load) as server:
        gate.clear()
        server.reload()
        wait_for(lambda: len(loads) == 2)
        for _ in range(100):
            server.reload()
        assert server.get("/health")[0] == 200
        gate.set()
        done = "tron_reloads_total", {"outcome": "done"}
        wait_for(lambda: server.application.metrics.registry.get_sample_value(*done) == 2)
        time.sleep(0.05)
        assert len(loads) == 3
