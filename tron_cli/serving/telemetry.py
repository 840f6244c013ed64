"""Prometheus metrics and access log of the server."""

from __future__ import annotations

import contextlib
import io
import os
import queue
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timezone

import msgspec
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_HISTORIES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_LINES_WAITING = 10_000  # of the log
_encode = msgspec.json.Encoder().encode


class Metrics:
    """Prometheus metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tron_requests", "Answered requests.", ["path", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "tron_request_seconds", "Time from the headers of a request to its answer.", ["path"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._batch_histories = Histogram(
            "tron_batch_histories", "Histories and items computed together.",
            buckets=_HISTORIES, registry=self.registry,
        )  # fmt: skip
        self._batch_seconds = Histogram(
            "tron_batch_seconds", "Time to compute a batch.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.waiting = Gauge(
            "tron_waiting_histories", "Histories that wait for a batch.", registry=self.registry
        )
        self.reloads = Counter(
            "tron_reloads", "Replacements of the model.", ["outcome"], registry=self.registry
        )
        self._checkpoint = Gauge(
            "tron_checkpoint_step", "Training step of the checkpoint that is served.", ["name"],
            registry=self.registry,
        )  # fmt: skip
        self._items = Gauge("tron_items", "Items of the catalogue.", registry=self.registry)
        ProcessCollector(registry=self.registry)

    def of_model(self, name: str, step: int, num_items: int) -> None:
        """Note which checkpoint is served."""
        self._checkpoint.clear()
        self._checkpoint.labels(name).set(step)
        self._items.set(num_items)

    def of_batch(self, histories: int, seconds: float) -> None:
        self._batch_histories.observe(histories)
        self._batch_seconds.observe(seconds)

    def page(self) -> bytes:
        return generate_latest(self.registry)


def log_access(**facts: object) -> None:
    """Write a line of the access log to stderr, a JSON object."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    sys.stderr.write(_encode({"time": now, **facts}).decode() + "\n")


class _BackgroundStderr(io.TextIOBase):
    """A stream that a thread writes to stderr, so that a slow reader of the log delays nothing.

    If the reader is too slow, texts are dropped, and their number is logged once it reads again.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._texts: queue.Queue[str | None] = queue.Queue(_LINES_WAITING)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write_on, name="stderr", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        try:
            self._texts.put_nowait(text)
        except queue.Full:
            self._dropped += 1
        return len(text)

    def finish(self, seconds: float = 1.0) -> None:
        """Write the waiting texts, for this long at most."""
        with contextlib.suppress(queue.Full):
            self._texts.put_nowait(None)
            self._thread.join(seconds)

    def _write_on(self) -> None:
        while (text := self._texts.get()) is not None:
            dropped, self._dropped = self._dropped, 0
            if dropped:
                text += f"{dropped:,} lines of the log were dropped: nobody read them\n"
            rest = memoryview(text.encode(errors="backslashreplace"))
            with contextlib.suppress(OSError):  # the reader is gone
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]


@contextlib.contextmanager
def background_stderr() -> Iterator[None]:
    """Let a thread write to stderr until the block ends, so that a full pipe blocks nothing."""
    stream = _BackgroundStderr(sys.stderr.fileno())
    with contextlib.redirect_stderr(stream):
        try:
            yield
        finally:
            stream.finish()
