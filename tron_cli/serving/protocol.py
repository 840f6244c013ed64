"""HTTP/1.1 as uvicorn speaks it, with bounds on clients that are slow, many or endless."""

from __future__ import annotations

import asyncio
import re
from typing import Any, cast

import msgspec
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

RECEIVE_SECONDS = 10.0  # for a request to arrive, and for an answer to be sent
HALF_CLOSE_SECONDS = 0.2  # after a request, in which a client may end its side and be answered
MAX_HEAD = 1 << 16  # bytes
# Longer than proxies keep idle connections: one that is closed just when a proxy sends its next
# request loses it.
KEEP_ALIVE_SECONDS = 75
MAX_CONNECTIONS = 900  # beneath the usual limit of 1,024 open files
MAX_PIPELINED = 64  # requests of a connection that wait for its first
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)


class BoundedProtocol(HttpToolsProtocol):
    """A connection."""

    _deadline: asyncio.TimerHandle | None = None
    _write_deadline: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _received_at = 0.0
    _running: RequestResponseCycle | None = None
    _fault = "this is not a valid HTTP/1.1 request"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        if len(self.connections) > MAX_CONNECTIONS and not self._close_longest_idle():
            self._refuse(503, "the server has too many connections; try again in a second")
        else:
            self._arm()

    def _close_longest_idle(self) -> bool:
        """Close the connection whose last answer is the oldest; False if all are in use."""
        idle = [
            (connection.timeout_keep_alive_task.when(), connection.transport)
            for connection in cast("set[BoundedProtocol]", self.connections)
            if connection.timeout_keep_alive_task is not None
            and not connection.transport.is_closing()
        ]
        if not idle:
            return False
        min(idle, key=lambda each: each[0])[1].close()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._write_deadline is not None:
            self._write_deadline.cancel()
        super().connection_lost(exc)
        cycle = self._running
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            if abandon := cycle.scope["state"].pop("abandon", None):
                abandon()

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn returns None, for False
        """Return True to keep a connection whose client sends no more but waits for its answer.

        A client that gives up looks the same, but later: tools that end their side do so at once.
        """
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return False
        if self.loop.time() - self._received_at > HALF_CLOSE_SECONDS:
            return False
        cycle.keep_alive = False  # the latest request, so that earlier ones are answered before
        return True

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._received_at = self.loop.time()
        if b"pgrade" in data:
            # Java's client offers HTTP/2 that way, and the parser would take no body after it.
            data = _UPGRADE.sub(b"\r\nx-asked:", data)
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:  # in the middle of headers
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD:
                self._refuse(431, f"the headers of a request may have up to {MAX_HEAD} bytes")
            else:
                self._arm()
            return
        self._head_bytes = 0
        if self.cycle.more_body:
            self._arm()
        else:
            self._disarm()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.cycle is None or self.cycle.scope is not self.scope:  # else it follows the body
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            self._fault = (
                f"{MAX_PIPELINED} requests of this connection wait; read answers before you send "
                "more"
            )
            raise ValueError  # the parser reads no further, and send_400_response is called

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_deadline = self.loop.call_later(RECEIVE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_deadline is not None:
            self._write_deadline.cancel()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # a client that does not read its answer
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, self._fault)

    def _arm(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(RECEIVE_SECONDS, self._too_slow)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        self._refuse(408, f"the request did not arrive within {RECEIVE_SECONDS:.0f} seconds")

    def _refuse(self, status: int, sentence: str) -> None:
        """Answer, note and close, unless an answer is on its way."""
        if not (self.cycle is not None and self.cycle.response_started) or (
            self.cycle.response_complete
        ):
            body = msgspec.json.encode({"error": sentence})
            headers: dict[str, Any] = {
                "content-type": "application/json",
                "content-length": len(body),
                "connection": "close",
            }
            if status == 503:
                headers["retry-after"] = 1
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
            self.transport.write(STATUS_LINE[status] + head + b"\r\n" + body)
            scope: Any = {"method": None, "path": None}
            if self.cycle is not None and not self.cycle.response_complete:
                scope = self.cycle.scope
            if self._running is not None:
                self._running.scope["state"]["noted"] = True
            client = self.client[0] if self.client else None
            cast(Any, self.config.app).note(client, scope["method"], scope["path"], status)
        self.transport.close()
