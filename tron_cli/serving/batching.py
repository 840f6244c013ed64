"""Micro-batching by arrival: requests that arrive while the model computes form the next batch.

One thread computes. Nothing waits for a batch to fill, so that a lone request is answered at once,
and under load batches grow until the model keeps up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tron_cli.errors import InputError
from tron_cli.serving.recommender import Recommendation, Recommender
from tron_cli.serving.requests import ItemId

_FEW_EXCLUDED = 256  # a request that excludes more is a model call of its own
Answer: TypeAlias = "list[Recommendation]"


class OverloadedError(Exception):
    """The queue is full."""


@dataclass(frozen=True)
class RecommendCall:
    """A request for recommendations; those of one `group` can be one call of the model."""

    histories: Sequence[Sequence[ItemId]]
    k: int
    filter_rated: bool | None = None
    exclude: tuple[ItemId, ...] = ()
    candidates: tuple[ItemId, ...] | None = None

    @property
    def size(self) -> int:
        return len(self.histories)

    @property
    def reach(self) -> int:
        """Length of the list that holds k items whichever are excluded."""
        return self.k if self._excludes_in_model else self.k + len(self.exclude)

    @property
    def _excludes_in_model(self) -> bool:
        return len(self.exclude) > _FEW_EXCLUDED

    @property
    def group(self) -> object:
        """Key of calls to join; of similar reach, so that long lists do not delay short ones."""
        in_model = self.exclude if self._excludes_in_model else ()
        return self.filter_rated, in_model, self.candidates, max(6, self.reach.bit_length())

    @classmethod
    def answers(cls, recommender: Recommender, calls: Sequence[RecommendCall]) -> list[Answer]:
        """Return the answers of calls of one group."""
        first = calls[0]
        found = recommender.recommend(
            [history for call in calls for history in call.histories],
            k=min(max(call.reach for call in calls), recommender.num_items),
            filter_rated=first.filter_rated,
            exclude=first.exclude if first._excludes_in_model else (),
            candidates=first.candidates,
        )
        answers, low = [], 0
        for call in calls:
            high = low + call.size
            answers.append([call._own_part(each, recommender) for each in found[low:high]])
            low = high
        return answers

    def _own_part(self, found: Recommendation, recommender: Recommender) -> Recommendation:
        """Return the first k items that are not excluded; exclusion does not change their order."""
        items: list[Any] = found.items
        if self.exclude and not self._excludes_in_model:
            excluded = {*map(str, self.exclude)}  # "5" and 5 are one item in every catalogue
            kept = [place for place, item in enumerate(items) if str(item) not in excluded]
            del kept[self.k :]
            return Recommendation([items[n] for n in kept], [found.scores[n] for n in kept])
        if len(items) <= self.k:
            return found
        return Recommendation(items[: self.k], found.scores[: self.k])


@dataclass(frozen=True)
class SimilarCall:
    """A request for similar items; equal ones are computed once."""

    item: ItemId
    k: int

    size = 1

    @property
    def group(self) -> object:
        return "similar", type(self.item), self.item, self.k

    @classmethod
    def answers(cls, recommender: Recommender, calls: Sequence[SimilarCall]) -> list[Answer]:
        first = calls[0]
        return [[recommender.similar(first.item, k=min(first.k, recommender.num_items))]] * len(
            calls
        )


Call = RecommendCall | SimilarCall


@dataclass(eq=False)
class _Job:
    call: Call
    answer: asyncio.Future[Answer]


@dataclass
class Batcher:
    """Batches of calls, computed in a thread of its own; used from one event loop.

    current: returns the model of the next batch. max_batch: histories computed together.
    max_waiting: histories that may wait. on_batch: called after each batch, in the event loop, with
    the number of its histories and the seconds that it took.
    """

    current: Callable[[], Recommender]
    max_batch: int
    max_waiting: int
    on_batch: Callable[[int, float], None]
    waiting: int = 0
    _jobs: deque[_Job] = field(default_factory=deque)
    _busy: bool = False
    _thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="compute")
    )

    async def submit(self, call: Call, timeout: float) -> Answer:
        """Return the answer of the model.

        Raises OverloadedError where too many wait, TimeoutError after `timeout` seconds (a call
        that still waits then is never computed), InputError for a call that the model refuses.
        """
        if self.waiting + call.size > self.max_waiting:
            raise OverloadedError
        loop = asyncio.get_running_loop()
        job = _Job(call, loop.create_future())
        self._jobs.append(job)
        self.waiting += call.size
        if not self._busy:
            self._busy = True
            loop.call_soon(self._start)  # together with other calls of this turn of the loop
        try:
            return await asyncio.wait_for(job.answer, timeout)
        except asyncio.TimeoutError as error:  # another class than TimeoutError before Python 3.11
            raise TimeoutError from error

    def close(self) -> None:
        """End the thread after its current batch."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        """Hand the next batch to the thread."""
        batch: list[_Job] = []
        size = 0
        while self._jobs and (not batch or size + self._jobs[0].call.size <= self.max_batch):
            job = self._jobs.popleft()
            self.waiting -= job.call.size
            if not job.answer.done():  # otherwise it has timed out
                batch.append(job)
                size += job.call.size
        self._busy = bool(batch)
        if batch:
            loop = asyncio.get_running_loop()
            computed = loop.run_in_executor(self._thread, self._compute, batch, loop)
            started = loop.time()
            computed.add_done_callback(lambda done: self._end(size, loop.time() - started))

    def _end(self, size: int, seconds: float) -> None:
        self.on_batch(size, seconds)
        self._start()

    def _compute(self, batch: list[_Job], loop: asyncio.AbstractEventLoop) -> None:
        """Compute a batch, in the thread, and answer each group as soon as it is done."""
        recommender = self.current()
        groups: dict[object, list[_Job]] = {}
        for job in batch:
            groups.setdefault(job.call.group, []).append(job)
        for jobs in groups.values():
            loop.call_soon_threadsafe(_settle, jobs, _outcomes(recommender, jobs))


def _outcomes(recommender: Recommender, jobs: list[_Job]) -> list[Answer | Exception]:
    """Return an answer or an exception for each job of a group."""
    calls: list[Any] = [job.call for job in jobs]
    try:
        return [*type(calls[0]).answers(recommender, calls)]
    except InputError as error:
        if len(jobs) == 1:
            return [error]
        # One by one, so that a bad request does not fail the others.
        return [_outcomes(recommender, [job])[0] for job in jobs]
    except Exception as error:
        return [error] * len(jobs)


def _settle(jobs: list[_Job], outcomes: list[Answer | Exception]) -> None:
    for job, outcome in zip(jobs, outcomes, strict=True):
        if job.answer.done():  # it has timed out
            continue
        if isinstance(outcome, Exception):
            job.answer.set_exception(outcome)
        else:
            job.answer.set_result(outcome)
