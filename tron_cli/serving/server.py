"""The HTTP server: an ASGI application on uvicorn.

A request costs about 0.2 ms besides the model: msgspec decodes and checks bodies, a dict finds the
handler of a path, and torch releases the interpreter's lock while it computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import uvicorn

from tron_cli.errors import InputError, RunError, sentence_of
from tron_cli.serving import openapi
from tron_cli.serving.batching import Batcher, Call, OverloadedError, RecommendCall, SimilarCall
from tron_cli.serving.protocol import KEEP_ALIVE_SECONDS, RECEIVE_SECONDS, BoundedProtocol
from tron_cli.serving.recommender import Recommendation, Recommender
from tron_cli.serving.reload import ServedModel
from tron_cli.serving.requests import (
    DEFAULT_K,
    DEFAULT_SIMILAR,
    Recommendations,
    Recommended,
    RecommendRequest,
    RefusedError,
    SimilarRequest,
    checked_histories,
    checked_k,
    parsed,
)
from tron_cli.serving.settings import ServerSettings
from tron_cli.serving.telemetry import Metrics, background_stderr, log_access

log = logging.getLogger("tron")

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_encode = msgspec.json.Encoder().encode
_JSON = b"application/json"
_SWITCH_SECONDS = 0.0005  # Python's 5 ms would delay answers while the compute thread works
_CLIENT_GONE = 499  # as in nginx's log
_DRAINED = 4  # how many times the limit of a body are read before the refusal is sent


@dataclass(frozen=True)
class _Answer:
    body: bytes
    status: int = 200
    kind: bytes = _JSON


class _DisconnectedError(Exception):
    """The client has disconnected."""


class Application:
    """The ASGI application: routes, limits, answers."""

    def __init__(self, model: ServedModel, settings: ServerSettings) -> None:
        self.model, self.settings = model, settings
        self.metrics = Metrics()
        self.batcher = Batcher(
            lambda: model.recommender,
            settings.max_batch,
            settings.max_waiting,
            self.metrics.of_batch,
        )
        self.metrics.waiting.set_function(lambda: self.batcher.waiting)
        self.stopping = False
        self._note_model()
        self._recommend_body = msgspec.json.Decoder(RecommendRequest)
        self._similar_body = msgspec.json.Decoder(SimilarRequest)
        self._posts = {"/recommend": self._recommend, "/similar": self._similar}
        self._gets = {
            "/health": lambda: _Answer(_encode({"status": "ok"})),
            "/ready": self._ready,
            "/metrics": lambda: _Answer(
                self.metrics.page(), kind=b"text/plain; version=0.0.4; charset=utf-8"
            ),
            "/openapi.json": lambda: _Answer(_encode(self._described())),
            "/docs": lambda: _Answer(
                openapi.page(self._described()).encode(), kind=b"text/html; charset=utf-8"
            ),
        }
        self._known = {*self._posts, *self._gets}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        started = time.perf_counter()
        facts: dict[str, Any] = {}
        headers: dict[str, str] = {}
        client = scope["client"][0] if scope["client"] else None
        state, task = scope["state"], asyncio.current_task()
        assert task is not None
        state["abandon"] = task.cancel
        try:
            answer = await self._answer(scope, receive, facts)
        except RefusedError as refusal:
            answer = _Answer(_encode({"error": refusal.sentence}), refusal.status)
            headers = refusal.headers
        except (_DisconnectedError, asyncio.CancelledError):
            if "noted" not in state:
                seconds = time.perf_counter() - started
                self.note(client, scope["method"], scope["path"], _CLIENT_GONE, seconds, **facts)
            return
        except Exception as error:
            log.error("a request failed", exc_info=error)
            said = sentence_of(error) if isinstance(error, RunError) else "the server failed"
            answer = _Answer(_encode({"error": said}), 500)
        state.pop("abandon", None)
        await _respond(send, answer, headers)
        seconds = time.perf_counter() - started
        self.note(client, scope["method"], scope["path"], answer.status, seconds, **facts)

    def note(
        self,
        client: str | None,
        method: str | None,
        path: str | None,
        status: int,
        seconds: float | None = None,
        **facts: Any,
    ) -> None:
        """Count a request and log it; method and path are None where none could be read."""
        label = path if path in self._known else "other"
        self.metrics.requests.labels(label, status).inc()
        if seconds is not None:
            self.metrics.request_seconds.labels(label).observe(seconds)
            facts["ms"] = round(seconds * 1000, 3)
        if self.settings.access_log:
            shown = None if path is None else path[:200]
            log_access(client=client, method=method, path=shown, status=status, **facts)

    async def _answer(self, scope: Scope, receive: Receive, facts: dict[str, Any]) -> _Answer:
        path, method, headers = scope["path"], scope["method"], dict(scope["headers"])
        body = await self._body(headers, receive)
        post, get = self._posts.get(path), self._gets.get(path)
        if post is None and get is None:
            raise RefusedError(404, f"there is no {path}; GET /docs lists the paths")
        if get is not None:
            if method not in ("GET", "HEAD"):
                raise RefusedError(405, f"{path} answers GET, got {method}", allow="GET, HEAD")
            return get()
        assert post is not None
        if method != "POST":
            raise RefusedError(405, f"{path} answers POST, got {method}", allow="POST")
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != _JSON or headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise RefusedError(
                415,
                "the body must be sent as plain JSON, with the header "
                "'Content-Type: application/json'",
            )
        return await post(body, facts)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """Return the whole body. Raises RefusedError where it is too large.

        The rest of such a body is read for a while, since few clients read an answer before.
        """
        limit = self.settings.max_body
        sentence = f"a body may have up to {limit} bytes; send less"
        too_large = RefusedError(413, sentence, connection="close")
        if int(headers.get(b"content-length", 0)) > limit * _DRAINED:
            raise too_large
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _DisconnectedError
            chunk = message.get("body", b"")
            size += len(chunk)
            if size <= limit:
                chunks.append(chunk)
            more = message.get("more_body", False)
            if size > limit and (not more or size > limit * _DRAINED):
                raise too_large
            if not more:
                return b"".join(chunks)

    async def _recommend(self, body: bytes, facts: dict[str, Any]) -> _Answer:
        request = parsed(self._recommend_body, body)
        histories = checked_histories(request, self.settings)
        num_items = self.model.recommender.num_items
        k = checked_k(request.k, DEFAULT_K, num_items, self.settings)
        facts.update(histories=len(histories), k=k)
        candidates = None if request.candidates is None else tuple(request.candidates)
        call = RecommendCall(histories, k, request.filter_rated, tuple(request.exclude), candidates)
        found = [_plain(each) for each in await self._computed(call)] if histories else []
        one = isinstance(request.histories, msgspec.UnsetType)
        return _Answer(_encode(found[0] if one else Recommendations(found)))

    async def _similar(self, body: bytes, facts: dict[str, Any]) -> _Answer:
        request = parsed(self._similar_body, body)
        num_items = self.model.recommender.num_items
        k = checked_k(request.k, DEFAULT_SIMILAR, num_items, self.settings)
        facts.update(k=k)
        (found,) = await self._computed(SimilarCall(request.item, k))
        return _Answer(_encode(_plain(found)))

    async def _computed(self, call: Call) -> list[Recommendation]:
        try:
            return await self.batcher.submit(call, self.settings.timeout)
        except InputError as error:
            path = self.model.recommender.checkpoint.path  # not to be shown to clients
            raise RefusedError(422, str(error).replace(str(path), path.name)) from error
        except OverloadedError as error:
            raise RefusedError(
                503, "too many requests wait; try again in a second", retry_after="1"
            ) from error
        except TimeoutError as error:
            raise RefusedError(
                503,
                f"no answer within {self.settings.timeout:g} seconds; try again later",
                retry_after="1",
            ) from error

    def _ready(self) -> _Answer:
        facts = {
            "ready": not self.stopping,
            "checkpoint": self.model.name,
            "step": self.model.step,
            "items": self.model.recommender.num_items,
        }
        return _Answer(_encode(facts), 503 if self.stopping else 200)

    def _described(self) -> dict[str, Any]:
        return openapi.description(self.model.recommender.num_items, self.settings)

    def reload(self) -> None:
        """Replace the model, in the calling thread."""
        done = self.model.reload()
        self.metrics.reloads.labels("done" if done else "failed").inc()
        self._note_model()

    def _note_model(self) -> None:
        items = self.model.recommender.num_items
        self.metrics.of_model(self.model.name, self.model.step, items)


class Server(uvicorn.Server):
    """Uvicorn server that exits with 0 on SIGTERM and SIGINT, and reloads on SIGHUP."""

    def __init__(self, application: Application, started: Callable[[], None] | None = None) -> None:
        """started: called once signals are handled and connections accepted."""
        settings = application.settings
        super().__init__(
            uvicorn.Config(
                application,
                http=BoundedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                # Longer than any request takes.
                timeout_graceful_shutdown=int(settings.timeout + RECEIVE_SECONDS) + 1,
            )
        )
        self.application = application
        self._started = started
        self._reloads = ThreadPoolExecutor(1, thread_name_prefix="reload")
        self._reload_waits = False
        self._watch: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `startup`: uvicorn would raise them again at the end."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop)
            if hasattr(signal, "SIGHUP"):
                loop.add_signal_handler(signal.SIGHUP, self.reload)
        if self.application.settings.reload_every:
            self._watch = asyncio.create_task(self._reload_on_change())
        await super().startup(sockets)
        if self._started is not None:
            self._started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("stopping: accepted requests are answered, new ones are refused")
        if self._watch is not None:
            self._watch.cancel()
        self._reloads.shutdown(wait=False, cancel_futures=True)
        await super().shutdown(sockets)
        self.application.batcher.close()

    def stop(self) -> None:
        """Begin to stop; on a second call, without waiting for answers."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self.application.stopping = True

    def reload(self) -> None:
        """Begin to replace the model, unless the server is stopping or a reload waits already."""
        if not self.should_exit and not self._reload_waits:
            self._reload_waits = True
            self._reloads.submit(self._reload)

    def _reload(self) -> None:
        self._reload_waits = False  # before the file is read: a later signal means a later file
        self.application.reload()

    async def _reload_on_change(self) -> None:
        loop = asyncio.get_running_loop()

        def reload_if_changed() -> None:
            if self.application.model.changed():
                self.application.reload()

        while True:
            await asyncio.sleep(self.application.settings.reload_every)
            await loop.run_in_executor(self._reloads, reload_if_changed)


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket, so that a port in use is reported before a model is loaded.

    Clients that connect before the server runs wait. Raises InputError.
    """
    if not host.strip():  # would be every address of the machine
        raise InputError("--host is empty; expected an address, such as 127.0.0.1")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"cannot listen on {host}:{port} ({getattr(error, 'strerror', None) or error}); pass "
            "another --host or --port"
        ) from error
    return listener


def serve(
    path: Path,
    load: Callable[[Path], Recommender],
    *,
    host: str,
    port: int,
    settings: ServerSettings,
) -> None:
    """Serve the checkpoint at `path` until SIGTERM or SIGINT. Raises InputError and RunError."""
    with bound_socket(host, port) as listener, _hangups() as hangups:
        model = ServedModel(path, load)
        server: Server

        def started() -> None:
            address = listener.getsockname()
            shown = f"[{address[0]}]" if ":" in address[0] else address[0]
            log.info("serving %s on http://%s:%d", model.described(), shown, address[1])
            if not _is_loopback(address[0]):
                log.warning(
                    "%s is reachable from other machines, and the server has no authentication",
                    shown,
                )
            if hangups:
                server.reload()

        server = Server(Application(model, settings), started)
        sys.setswitchinterval(_SWITCH_SECONDS)
        with background_stderr():
            server.run([listener])


@contextlib.contextmanager
def _hangups() -> Iterator[list[int]]:
    """Collect SIGHUPs, which by default end a process, until the server handles them."""
    found: list[int] = []
    if not hasattr(signal, "SIGHUP") or threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = signal.signal(signal.SIGHUP, lambda number, _: found.append(number))
    try:
        yield found
    finally:
        signal.signal(signal.SIGHUP, before)


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _plain(found: Recommendation) -> Recommended:
    return Recommended(found.items, found.scores)  # type: ignore[arg-type]


async def _respond(send: Send, answer: _Answer, headers: dict[str, str]) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": answer.status,
            "headers": [
                (b"content-type", answer.kind),
                (b"content-length", str(len(answer.body)).encode()),
                *((name.encode(), value.encode()) for name, value in headers.items()),
            ],
        }
    )
    await send({"type": "http.response.body", "body": answer.body})
