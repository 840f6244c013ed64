"""Parts of a step on threads of their own.

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

Part = TypeVar("Part")
Result = TypeVar("Result")


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
