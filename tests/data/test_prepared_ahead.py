"""Batches prepared during the previous step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tron_cli.data.batches import prepared_ahead


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_batches_come_in_order_and_the_next_is_prepared_meanwhile(
    thread: ThreadPoolExecutor,
) -> None:
    prepared = {step: threading.Event() for step in range(3, 8)}

    def prepare(step: int) -> Any:
        prepared[step].set()
        return (step, threading.current_thread() is threading.main_thread())

    batches = prepared_ahead(prepare, range(3, 8), thread)
    for step in range(3, 8):
        assert next(batches) == (step, False)
        if step < 7:
            assert prepared[step + 1].wait(10)  # without asking for it
            assert step + 2 not in prepared or not prepared[step + 2].is_set()
    assert list(batches) == []
    assert list(prepared_ahead(prepare, range(0), thread)) == []


def test_what_preparing_raises_is_raised_in_its_turn(thread: ThreadPoolExecutor) -> None:
    def prepare(step: int) -> Any:
        if step == 2:
            raise OSError("the disk is gone")
        return step

    batches = prepared_ahead(prepare, range(5), thread)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
