"""A load of requests that arrive on a schedule, whatever the server does.

    python -m benchmarks.open_arrivals PORT --items N --rate R --seconds S [--uniform] [--k K]

Each request has an intended time, and its latency counts from there: a server that stalls is not
spared the requests that a waiting client would have held back. Requests are prebuilt bytes on raw
sockets that stay open; a request for which none is free opens another. Prints a JSON object. Runs
in a process of its own and imports no torch.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.generated import LENGTHS, generate_sessions

HOST = "127.0.0.1"
_DISTINCT = 4096  # requests
_CONNECTIONS = 800
_PATIENCE = 10.0  # seconds after the last intended time
_HEAD = "POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "


class _Connection(asyncio.Protocol):
    """One request at a time; `answered(status)` is called when its answer is complete."""

    def __init__(self) -> None:
        self._buffer = b""
        self._end = 0
        self.answered: Callable[[int], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self, request: bytes, answered: Callable[[int], None]) -> None:
        self.answered = answered
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        if not self._end:
            head = self._buffer.find(b"\r\n\r\n")
            if head < 0:
                return
            place = self._buffer.index(b"content-length: ") + 16
            length = int(self._buffer[place : self._buffer.index(b"\r\n", place)])
            self._end = head + 4 + length
        if len(self._buffer) >= self._end:
            status = int(self._buffer[9:12])
            self._buffer, self._end = b"", 0
            self._finish(status)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(0)

    def _finish(self, status: int) -> None:
        answered, self.answered = self.answered, None
        if answered is not None:
            answered(status)

    @property
    def is_open(self) -> bool:
        return not self._transport.is_closing()


def requests(num_items: int, k: int, seed: int) -> list[bytes]:
    """Return distinct requests with sessions of OTTO's lengths; item i has the id i."""
    sessions = generate_sessions(LENGTHS["OTTO"], num_items, _DISTINCT, seed=seed)
    made = []
    for number in range(_DISTINCT):
        body = json.dumps({"items": sessions[number][-50:].tolist(), "k": k})
        made.append(f"{_HEAD}{len(body)}\r\n\r\n{body}".encode())
    return made


async def load(port: int, sent: list[bytes], intended: np.ndarray) -> dict[str, Any]:
    """Send requests at the intended times, seconds from now; return latencies and failures."""
    loop = asyncio.get_running_loop()
    free: list[_Connection] = []
    statuses: Counter[str] = Counter()
    latency = np.full(len(intended), np.nan)
    late = np.zeros(len(intended))
    opened = 0
    start = time.perf_counter() + 0.05
    last = start

    def send(number: int, connection: _Connection) -> None:
        late[number] = time.perf_counter() - start - intended[number]

        def answered(status: int) -> None:
            nonlocal last
            last = time.perf_counter()
            statuses[str(status)] += 1
            if status == 200:
                latency[number] = last - start - intended[number]
            if connection.is_open:
                free.append(connection)

        connection.send(sent[number % len(sent)], answered)

    async def open_and_send(number: int) -> None:
        try:
            _, connection = await loop.create_connection(_Connection, HOST, port)
        except OSError:
            statuses["refused"] += 1
        else:
            send(number, connection)

    opening: set[asyncio.Task[None]] = set()
    for number, moment in enumerate(intended.tolist()):
        while (wait := start + moment - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        while free and not free[-1].is_open:
            free.pop()
        if free:
            send(number, free.pop())
        elif opened < _CONNECTIONS:
            opened += 1
            task = loop.create_task(open_and_send(number))
            opening.add(task)
            task.add_done_callback(opening.discard)
        else:
            statuses["no connection"] += 1
        if number % 16 == 15:
            await asyncio.sleep(0)  # answers are read also while the schedule is late
    end = time.perf_counter() + _PATIENCE
    while statuses.total() < len(intended) and time.perf_counter() < end:
        await asyncio.sleep(0.01)
    good = latency[np.isfinite(latency)] * 1000
    usage = resource.getrusage(resource.RUSAGE_SELF)
    failures = dict(statuses)
    succeeded = failures.pop("200", 0)
    unanswered = len(intended) - statuses.total()
    return {
        "sent": len(intended),
        "failed": len(intended) - succeeded,
        "failures": {**failures, **({"unanswered": unanswered} if unanswered else {})},
        "achieved_rate": succeeded / (last - start),
        **{
            f"{name}_ms": float(np.percentile(good, share)) if len(good) else None
            for name, share in (("p50", 50), ("p90", 90), ("p99", 99), ("max", 100))
        },
        "sent_late_p99_ms": float(np.percentile(late, 99)) * 1000,
        "connections": opened,
        "generator_cpu_s": usage.ru_utime + usage.ru_stime,
    }


def arrivals(rate: float, seconds: float, uniform: bool, seed: int) -> np.ndarray:
    """Return intended times within `seconds`: equally spaced, or those of a Poisson process."""
    if uniform:
        return np.arange(int(rate * seconds)) / rate
    random = np.random.default_rng(seed)
    count = random.poisson(rate * seconds)
    return np.sort(random.random(count) * seconds)


def main(words: list[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("port", type=int)
    parser.add_argument("--items", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--uniform", action="store_true")
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(words)
    sent = requests(options.items, options.k, options.seed)
    intended = arrivals(options.rate, options.seconds, options.uniform, options.seed)
    gc.collect()
    gc.freeze()
    print(json.dumps(asyncio.run(load(options.port, sent, intended))))


if __name__ == "__main__":
    main()
