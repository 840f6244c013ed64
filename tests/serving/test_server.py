"""The server: answers, refusals, batches, limits; with a model that is a formula."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from helpers.servers import (
    HOST,
    FakeRecommender,
    RunningServer,
    ask,
    held,
    running_server,
    wait_for,
)

from tron_cli.errors import InputError
from tron_cli.serving.server import bound_socket
from tron_cli.serving.settings import ServerSettings


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(FakeRecommender(), max_k=40, max_history=30, max_body=4000) as running:
        yield running


def wait_until_nobody_is_connected(server: RunningServer) -> None:
    """Wait for the server to notice that earlier clients have gone."""
    end = time.monotonic() + 10
    while server.server.server_state.connections and time.monotonic() < end:
        time.sleep(0.01)
    assert not server.server.server_state.connections


def raw(port: int, data: bytes, seconds: float = 5) -> bytes:
    """Send bytes as they are; return all that comes back until the server closes."""
    with socket.create_connection((HOST, port), timeout=seconds) as connection:
        connection.sendall(data)
        found = b""
        while chunk := connection.recv(1 << 16):
            found += chunk
    return found


def test_one_history_and_several(server: RunningServer) -> None:
    model = FakeRecommender()
    one, other = model.recommend([[10, 20], [30]], k=3)
    shown = {"items": one.items, "scores": one.scores}
    assert server.post("/recommend", {"items": [10, 20], "k": 3}) == (200, shown)
    status, answer = server.post("/recommend", {"histories": [[10, 20], [30]], "k": 3})
    assert status == 200
    assert answer == {
        "recommendations": [shown, {"items": other.items, "scores": other.scores}],
    }
    assert server.post("/recommend", {"histories": []}) == (200, {"recommendations": []})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": 1},
        {"k": 40},
        {"filter_rated": True},
        {"filter_rated": None},
        {"exclude": [20, "30", 999, "020"], "k": 2},
        {"exclude": list(range(10, 500, 10))},
        {"exclude": list(range(300)), "k": 40},
        {"candidates": [10, "20", 50]},
        {"candidates": []},
        {"candidates": [10, 20, 50], "exclude": [20], "filter_rated": True, "k": 2},
    ],
)
def test_options_are_those_of_the_model(server: RunningServer, options: dict[str, Any]) -> None:
    """Excluded items are taken out by the server where they are few, by the model else."""
    status, answer = server.post("/recommend", {"items": [10, 20], **options})
    (expected,) = FakeRecommender().recommend([[10, 20]], **options)
    assert status == 200
    assert answer == {"items": expected.items, "scores": expected.scores}


def test_similar(server: RunningServer) -> None:
    expected = FakeRecommender().similar(20, k=4)
    status, answer = server.post("/similar", {"item": "20", "k": 4})
    assert (status, answer["items"]) == (200, expected.items)
    status, answer = server.post("/similar", {"item": "nothing"})
    assert (status, answer) == (422, {"error": "there is no item 'nothing'"})


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "not valid JSON: it is empty"),
        (b"{", 400, "not valid JSON"),
        (b"\xff\xfe", 400, "not valid JSON"),
        (b'{"items": ["\xff"]}', 400, "not valid JSON"),
        (b'{"items": [NaN]}', 400, "not valid JSON"),
        (b'{"items": [1e400]}', 400, "form"),
        (b'{"items": [true]}', 400, r"got `bool` - at `\$.items\[0\]`"),
        (b'{"items": [1.5]}', 400, "got `float`"),
        (b'{"items": null}', 400, "got `null`"),
        (b"[" * 3000, 400, "got `array`"),
        (b'{"items":' + b"[" * 3000, 400, "got `array`"),
        (b'{"items": [], "colour": 1}', 400, "unknown field `colour`"),
        (b"{}", 400, "either items .* or histories"),
        (b'{"items": [], "histories": []}', 400, "either items .* or histories"),
        (b'{"items": [], "k": 0}', 400, "k must be from 1 to 40 .*limit of this server.*, got 0"),
        (b'{"items": [], "k": 41}', 400, "got 41"),
        (b'{"items": [], "k": -1000000000000000000000}', 400, "got -1000"),
        (b'{"items": [], "k": true}', 400, "got `bool`"),
        (b'{"items": [' + b"1," * 30 + b"1]}", 400, "may have up to 30 events, got 31"),
        (b'{"histories": [' + b"[]," * 64 + b"[]]}", 400, "may have up to 64 histories, got 65"),
        (b'{"items": [], "candidates": [5]}', 422, "not in the catalogue of fake-step=5.pt"),
        (b" " * 5000, 413, "may have up to 4000 bytes"),
        (b" " * 50_000, 413, "may have up to 4000 bytes"),
    ],
)
def test_bad_bodies_get_a_sentence(
    server: RunningServer, body: bytes, status: int, words: str
) -> None:
    found, answer = server.post("/recommend", body)
    assert found == status
    assert answer.keys() == {"error"}
    assert len(answer["error"]) <= 500
    assert re.search(words, answer["error"])
    assert server.get("/health") == (200, {"status": "ok"})


def test_huge_integers_are_unknown_items(server: RunningServer) -> None:
    for digits in (19, 20, 400, 3900):
        body = b'{"item": %s}' % (b"9" * digits)
        status, answer = server.post("/similar", body)
        assert (status, answer["error"][:16]) == (422, "there is no item")


def test_of_duplicate_keys_the_last_counts(server: RunningServer) -> None:
    expected = server.post("/recommend", {"items": [10], "k": 2})
    assert server.post("/recommend", b'{"k": 9, "items": [30], "items": [10], "k": 2}') == expected


def test_wrong_methods_paths_and_content_types(server: RunningServer) -> None:
    status, answer, headers = ask(server.port, "GET", "/recommend")
    assert (status, headers["allow"]) == (405, "POST")
    assert "answers POST, got GET" in answer["error"]
    status, _, headers = ask(server.port, "DELETE", "/health")
    assert (status, headers["allow"]) == (405, "GET, HEAD")
    status, answer, _ = ask(server.port, "GET", "/nothing")
    assert (status, answer) == (
        404,
        {"error": "there is no /nothing; GET /docs lists the paths"},
    )
    for headers in (
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Encoding": "gzip"},
    ):
        status, answer = server.post("/recommend", {"items": []}, **headers)
        assert status == 415
        assert "'Content-Type: application/json'" in answer["error"]
    kind = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert server.post("/recommend", {"items": []}, **kind)[0] == 200
    assert ask(server.port, "HEAD", "/health")[:2] == (200, b"")


def test_a_model_that_fails_tells_the_client_nothing(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    assert server.post("/recommend", {"items": ["broken"]}) == (500, {"error": "the server failed"})
    assert "ZeroDivisionError: secret" in caplog.text
    assert server.get("/health")[0] == 200


def test_chunked_bodies_are_counted(server: RunningServer) -> None:
    head = (
        b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    body = b'{"items": [10], "k": 1}'
    small = b"%x\r\n%s\r\n" * 2 % (5, body[:5], len(body) - 5, body[5:]) + b"0\r\n\r\n"
    assert raw(server.port, head + small).startswith(b"HTTP/1.1 200 OK")
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    assert raw(server.port, head + chunk + b"0\r\n\r\n").startswith(b"HTTP/1.1 413")
    assert raw(server.port, head + chunk * 5).startswith(b"HTTP/1.1 413")  # and no end


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_clients_that_offer_another_protocol_are_answered_in_this_one(
    server: RunningServer, protocol: bytes
) -> None:
    """Java's client offers HTTP/2 with its first request."""
    body = b'{"items": [10], "k": 1}'
    head = (
        b"POST /recommend HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\n\r\n"
    )
    with socket.create_connection((HOST, server.port), timeout=5) as connection:
        for _ in range(2):
            connection.sendall(head % (len(body), protocol) + body)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # the start of TLS
        (b"GET /health HTTP/1.1\r\nX: " + b"x" * 70_000, 431),
    ],
)
def test_what_is_no_http_gets_a_sentence(server: RunningServer, data: bytes, status: int) -> None:
    head, _, body = raw(server.port, data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status)
    assert json.loads(body).keys() == {"error"}


def test_slow_clients_are_refused(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its headers are complete, and before its body is."""
    monkeypatch.setattr("tron_cli.serving.protocol.RECEIVE_SECONDS", 0.2)
    head = b"POST /recommend HTTP/1.1\r\nContent-Type: application/json\r\n"
    for sent in (b"", head, head + b"Content-Length: 20\r\n\r\n{"):
        clock = time.perf_counter()
        answer = raw(server.port, sent)
        assert answer.startswith(b"HTTP/1.1 408")
        assert 0.15 < time.perf_counter() - clock < 3
    assert server.get("/health")[0] == 200


def test_more_connections_than_allowed_are_refused(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_until_nobody_is_connected(server)
    monkeypatch.setattr("tron_cli.serving.protocol.MAX_CONNECTIONS", 3)
    open_ones = [socket.create_connection((HOST, server.port)) for _ in range(3)]
    time.sleep(0.1)
    assert raw(server.port, b"").startswith(b"HTTP/1.1 503")
    for connection in open_ones:
        connection.close()
    time.sleep(0.1)
    assert server.get("/health")[0] == 200


def test_the_connection_that_is_idle_longest_gives_way(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_until_nobody_is_connected(server)
    monkeypatch.setattr("tron_cli.serving.protocol.MAX_CONNECTIONS", 3)
    idle = [http.client.HTTPConnection(HOST, server.port, timeout=10) for _ in range(3)]
    for connection in idle:
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        time.sleep(0.01)  # the server's clock counts milliseconds
    assert server.get("/health")[0] == 200  # with a connection of its own
    for connection in idle[1:]:
        connection.request("GET", "/health")
        assert connection.getresponse().read()
    assert idle[0].sock.recv(1) == b""  # closed by the server
    for connection in idle:
        connection.close()


def test_idle_connections_outlive_those_of_proxies(server: RunningServer) -> None:
    """nginx keeps its own for 60 s; the one that waits longer must be the server."""
    wait_until_nobody_is_connected(server)
    connection = http.client.HTTPConnection(HOST, server.port, timeout=10)
    connection.request("GET", "/health")
    assert connection.getresponse().read()
    (kept,) = server.server.server_state.connections
    left = kept.timeout_keep_alive_task.when() - kept.loop.time()
    assert 60 < left < 76  # 75, and what clock and rounding add
    connection.close()


def test_what_arrives_while_the_model_computes_is_computed_together() -> None:
    """Each client gets its own answer, with its own options."""
    model, lone = FakeRecommender(num_items=200), FakeRecommender(num_items=200)
    bodies: list[dict[str, Any]] = [
        {
            "items": [10 * n],
            "k": 1 + n % 50,
            **({"exclude": [50, 10 * n, 70]} if n % 3 == 0 else {}),
            **({"filter_rated": True} if n % 5 == 0 else {}),
            **({"candidates": [10, 40, 90, 500]} if n % 7 == 0 else {}),
        }
        for n in range(60)
    ]
    with running_server(model) as server, ThreadPoolExecutor(61) as clients:
        with held(model, server, clients):
            model.calls.clear()
            answers = [clients.submit(server.post, "/recommend", body) for body in bodies]
            wait_for(lambda: server.application.batcher.waiting == len(bodies))
        for body, answer in zip(bodies, answers, strict=True):
            items = body.pop("items")
            (expected,) = lone.recommend([items], **body)
            assert answer.result() == (
                200,
                {"items": expected.items, "scores": expected.scores},
            )
    assert max(model.calls) > 20
    assert len(model.calls) <= 5  # one for each kind


def test_a_bad_history_does_not_fail_those_beside_it() -> None:
    model = FakeRecommender()
    with running_server(model) as server, ThreadPoolExecutor(9) as clients:
        with held(model, server, clients):
            histories = [[10], ["refused"], [20], [30]]
            answers = [clients.submit(server.post, "/recommend", {"items": h}) for h in histories]
            wait_for(lambda: server.application.batcher.waiting == 4)
        assert [answer.result()[0] for answer in answers] == [200, 422, 200, 200]


def test_a_burst_is_refused_where_the_queue_ends() -> None:
    model = FakeRecommender()
    with (
        running_server(model, max_waiting=8, max_histories=8) as server,
        ThreadPoolExecutor(40) as clients,
    ):
        model.gate.clear()
        answers = [
            clients.submit(ask, server.port, "POST", "/recommend", {"items": [10]})
            for _ in range(40)
        ]
        wait_for(lambda: sum(answer.done() for answer in answers) >= 40 - 8 - 8)
        assert server.application.batcher.waiting <= 8
        model.gate.set()
        found = [answer.result() for answer in answers]
    refused = [answer for answer in found if answer[0] == 503]
    assert {answer[0] for answer in found} == {200, 503}
    assert len(refused) >= 40 - 16
    for _, answer, headers in refused:
        assert answer == {"error": "too many requests wait; try again in a second"}
        assert headers["retry-after"] == "1"


def test_what_waits_too_long_is_refused_and_never_computed() -> None:
    model = FakeRecommender()
    with running_server(model, timeout=0.2) as server, ThreadPoolExecutor(5) as clients:
        model.calls.clear()
        model.gate.clear()
        answers = [
            clients.submit(ask, server.port, "POST", "/recommend", {"items": [10]})
            for _ in range(5)
        ]
        found = [answer.result() for answer in answers]
        model.gate.set()
        time.sleep(0.05)
        assert server.post("/recommend", {"items": [10]})[0] == 200
    for status, answer, headers in found:
        assert (status, headers["retry-after"]) == (503, "1")
        assert answer["error"].startswith("no answer within 0.2 seconds")
    assert sum(model.calls) < 5


def test_health_ready_and_metrics(server: RunningServer) -> None:
    server.post("/recommend", {"items": [10]})
    assert server.get("/ready") == (
        200,
        {"ready": True, "checkpoint": "fake-step=5.pt", "step": 5, "items": 50},
    )
    page = server.get("/metrics")[1].decode()
    for line in (
        'tron_checkpoint_step{name="fake-step=5.pt"} 5.0',
        "tron_items 50.0",
        "tron_waiting_histories 0.0",
        'tron_requests_total{path="/recommend",status="200"}',
        'tron_request_seconds_bucket{le="0.05",path="/recommend"}',
        "tron_batch_histories_count",
        "process_resident_memory_bytes",
    ):
        assert line in page
    server.get("/" + "x" * 50)
    page = server.get("/metrics")[1].decode()
    assert "xxx" not in page
    assert 'tron_requests_total{path="other",status="404"}' in page


def test_the_page_needs_no_other_host(server: RunningServer) -> None:
    page = server.get("/docs")[1].decode()
    assert "POST /recommend" in page
    assert "Number of items to return." in page
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page


def test_the_access_log_is_a_json_object_per_line(capfd: pytest.CaptureFixture[str]) -> None:
    with running_server(FakeRecommender(), access_log=True) as server:
        server.post("/recommend", {"histories": [[10], [20]], "k": 3})
        server.get("/no\udcffsuch".encode("utf-8", "replace").decode())
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    first, second = map(json.loads, lines)
    assert first.pop("time").startswith("20")
    assert 0 < first.pop("ms") < 5000
    assert first == {
        "client": HOST, "method": "POST", "path": "/recommend", "status": 200,
        "histories": 2, "k": 3,
    }  # fmt: skip
    assert second["status"] == 404


def test_a_port_in_use_is_a_sentence(server: RunningServer) -> None:
    with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{server.port}.*--port"):
        bound_socket(HOST, server.port)
    with pytest.raises(InputError, match=r"cannot listen on no\.such\.host\.invalid:80"):
        bound_socket("no.such.host.invalid", 80)


def test_limits_that_contradict_each_other() -> None:
    with pytest.raises(InputError, match="--max-histories 9 exceeds --max-waiting 8"):
        ServerSettings(max_histories=9, max_waiting=8)
