"""Limits of the server."""

from __future__ import annotations

from dataclasses import dataclass

from tron_cli.errors import InputError


@dataclass(frozen=True)
class ServerSettings:
    """Limits of `tron serve`; each is described at its option. Raises InputError."""

    max_k: int = 1000
    max_history: int = 10_000  # events
    max_histories: int = 64  # per request
    max_body: int = 1 << 20  # bytes
    max_batch: int = 64  # histories
    max_waiting: int = 1024  # histories
    timeout: float = 5.0  # seconds
    reload_every: float = 0.0  # seconds; 0: only on SIGHUP
    access_log: bool = True

    def __post_init__(self) -> None:
        if self.max_histories > self.max_waiting:
            raise InputError(
                f"--max-histories {self.max_histories} exceeds --max-waiting {self.max_waiting}: "
                "such a request would never be accepted; raise --max-waiting"
            )
