"""Servers in threads of the test, models without a network, and requests."""

from __future__ import annotations

import http.client
import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tron_cli.errors import InputError
from tron_cli.serving.recommender import Recommendation
from tron_cli.serving.reload import ServedModel
from tron_cli.serving.server import Application, Server, bound_socket
from tron_cli.serving.settings import ServerSettings

HOST = "127.0.0.1"


@dataclass
class FakeRecommender:
    """Ranks items by a formula of history and item; keeps the interface of Recommender.

    Ids are 10, 20, ... seconds: what a call takes. calls: the number of histories of each call.
    gate: calls wait until it is set.
    """

    num_items: int = 50
    seconds: float = 0.0
    name: str = "fake-step=5.pt"
    step: int = 5
    calls: list[int] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()
        self.item_ids = np.arange(1, self.num_items + 1) * 10
        self.checkpoint = SimpleNamespace(path=Path("/models") / self.name, step=self.step)

    def score(self, history: Sequence[int | str], item: int) -> float:
        events = sum(zlib.crc32(str(event).encode()) for event in history)
        return ((item * 7919 + events * 31) % 1009) / 7

    def recommend(
        self,
        histories: Sequence[Sequence[int | str]],
        *,
        k: int = 20,
        filter_rated: bool | None = None,
        exclude: Sequence[int | str] = (),
        candidates: Sequence[int | str] | None = None,
    ) -> list[Recommendation]:
        self.calls.append(len(histories))
        self.gate.wait(10)
        time.sleep(self.seconds)
        assert 1 <= k <= self.num_items
        ids = self.item_ids.tolist()
        known = {str(item): item for item in ids}
        chosen = known if candidates is None else {*map(str, candidates)}
        if unknown := set(chosen) - set(known):
            path = self.checkpoint.path
            raise InputError(f"candidates: {len(unknown)} are not in the catalogue of {path}")
        ranked = [known[item] for item in chosen]
        found = []
        for history in histories:
            if "broken" in history:
                raise ZeroDivisionError("secret")
            if "refused" in history:
                raise InputError("this history is refused")
            barred = {str(item) for item in [*exclude, *(history if filter_rated else ())]}
            scores = {item: self.score(history, item) for item in ranked if str(item) not in barred}
            best = sorted(scores, key=lambda item: (-scores[item], item))[:k]
            found.append(Recommendation(best, [scores[item] for item in best]))
        return found

    def similar(self, item: int | str, *, k: int = 10) -> Recommendation:
        if str(item) not in map(str, self.item_ids.tolist()):
            raise InputError(f"there is no item {item!r}")
        return self.recommend([[item]], k=k, exclude=[item])[0]


@dataclass(frozen=True)
class RunningServer:
    port: int
    server: Server
    application: Application
    thread: threading.Thread
    loop: Any

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """Return the status and the parsed answer; body: bytes, or an object to send as JSON."""
        status, answer, _ = ask(self.port, "POST", path, body, headers)
        return status, answer

    def get(self, path: str) -> tuple[int, Any]:
        status, answer, _ = ask(self.port, "GET", path)
        return status, answer

    def reload(self) -> None:
        self.loop.call_soon_threadsafe(self.server.reload)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.server.stop)


def ask(
    port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, Any, dict[str, str]]:
    """Send one request on a connection of its own; return status, answer, headers."""
    connection = http.client.HTTPConnection(HOST, port, timeout=20)
    try:
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method, path, sent, {**kind, **(headers or {})})
        answer = connection.getresponse()
        content = answer.read()
        if answer.getheader("content-type") == "application/json" and content:
            content = json.loads(content, parse_constant=_refuse_constant)
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, content, found
    finally:
        connection.close()


def _refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@contextmanager
def running_server(
    load: Callable[[Path], Any] | FakeRecommender, path: Path = Path("fake.pt"), **settings: Any
) -> Iterator[RunningServer]:
    """Run a server in a thread on a free port, and stop it."""
    settings = {"access_log": False, "timeout": 20.0, **settings}
    loader = (lambda path: load) if isinstance(load, FakeRecommender) else load
    model = ServedModel(path, loader)  # type: ignore[arg-type]
    application = Application(model, ServerSettings(**settings))
    server = Server(application)
    with bound_socket(HOST, 0) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        loop = server.servers[0].get_loop()
        running = RunningServer(port, server, application, thread, loop)
        try:
            yield running
        finally:
            if thread.is_alive():
                running.stop()
            thread.join(20)
            assert not thread.is_alive()


@contextmanager
def held(
    model: FakeRecommender, server: RunningServer, clients: ThreadPoolExecutor
) -> Iterator[None]:
    """Keep the compute thread busy with a request of its own, so that all others wait."""
    before = len(model.calls)
    model.gate.clear()
    first = clients.submit(server.post, "/recommend", {"items": [10]})
    wait_for(lambda: len(model.calls) > before)
    try:
        yield
    finally:
        model.gate.set()
    assert first.result()[0] == 200


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until the condition holds; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)
