"""Parts of a step, each few enough rows for the cache and on a thread of its own.

torch spreads an operator over its threads and waits for all of them before the next one begins;
what it or NumPy does on one thread keeps the others waiting. Parts that need nothing of each other
are better spread whole, each on one thread from its first operator to its last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

# Scores, or elements of gathered rows, held at once.
_ELEMENTS_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 28}
# Parts of so many rows, or a multiple: matrix products like round numbers.
_ROWS = 64

Part = TypeVar("Part")
Result = TypeVar("Result")


def parts_of_rows(num_rows: int, width: int, device: torch.device) -> list[slice]:
    """Return 0..num_rows in parts that hold as many elements, at `width` a row, as fit a cache."""
    step = max(1, _ELEMENTS_AT_ONCE[device.type] // max(1, width))
    if step > _ROWS:
        step -= step % _ROWS
    return [slice(low, low + step) for low in range(0, num_rows, step)]


def on_threads(
    work: Callable[[Part], Result], parts: Sequence[Part], device: torch.device
) -> list[Result]:
    """Return work(part) of each part, in order, without gradients; what it raises is raised.

    On the CPU as many threads work as torch has, the caller among them, each of them with one
    thread of torch: so the results are the same bits with any number. Elsewhere the parts follow
    each other.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(parts) == 1:
        with torch.no_grad():
            return [work(part) for part in parts]
    # What is left of them, from which each thread takes the next.
    queue = iter(list(enumerate(parts)))
    results: dict[int, Result] = {}

    @torch.no_grad()
    def take() -> None:
        for place, part in queue:
            results[place] = work(part)

    others = [_pool(threads - 1).submit(take) for _ in range(threads - 1)]
    torch.set_num_threads(1)
    try:
        take()
    finally:
        # A thread of the pool that begins tells torch that threads to come shall have one as well.
        wait(others)
        torch.set_num_threads(threads)
    for other in others:
        other.result()
    return [results[place] for place in range(len(parts))]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads for which torch has one thread each."""
    return ThreadPoolExecutor(threads, "part", initializer=torch.set_num_threads, initargs=(1,))
