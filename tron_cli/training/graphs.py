"""Training steps as CUDA graphs: recorded once for each size of batch, then replayed.

A step launches some hundreds of kernels of a few microseconds each, fewer than Python needs to
launch one. A graph launches them all at once. What it replays reads and writes the same memory each
time, so batches are padded to few sizes (`Batch.padded`), nothing in a step may wait for the
device, and what changes from step to step (the batch, the learning rate, the seed of torch's
generator) is put in its place before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tron_cli.data.batches import Batch

log = logging.getLogger("tron")


class Recorder(Protocol):
    """Interface of what runs work on a device and records it."""

    def run(self, work: Callable[[], object]) -> None:
        """Do `work` on the stream of the recordings, so that these find everything prepared."""

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        """Record `work` without doing it, and return a function that does it each time.

        Raises RuntimeError where it cannot be recorded; random numbers are then those of the seed.
        """


class CUDARecorder:
    """CUDA graphs that share their memory; they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], object]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        device = self._stream.device
        numbers = torch.cuda.default_generators[device.index]
        seed = numbers.initial_seed()
        # thread_local: another thread pins the memory of the next batch meanwhile.
        recording = torch.cuda.graph(
            graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
        )
        try:
            # torch.cuda.graph stays on its stream when it fails; the outer context does not.
            with torch.cuda.stream(self._stream), recording:
                work()
        except RuntimeError:
            # After a failed capture torch offers no public way back, and steps are to go on without
            # graphs. Its allocator is still in the capture: it would keep the memory, and free
            # nothing else where memory runs out. If it is not, the first of these raises.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(device.index, self._memory)
                torch._C._cuda_releasePool(device.index, self._memory)
            # The state of a generator in a failed capture is of no use: it gets another one.
            fresh = torch.Generator(device).manual_seed(seed)
            numbers.graphsafe_set_state(fresh.graphsafe_get_state())
            raise
        return graph.replay


@dataclass
class _Size:
    """Batches of one size: where the graph finds its batch, and the graph, once recorded."""

    batch: Batch
    replay: Callable[[], object] | None = None


class GraphedSteps:
    """Training steps; those of whole batches are recorded and replayed.

    The first batch of a size takes its step as usual, the second is recorded. Batches of fewer
    sessions, such as the last of an epoch, always take their step as usual.

    step: takes a step on a batch that is on `device` and returns its loss, without gradients; it
    must not wait for the device, and do the same for all batches of a size. recorder: None to
    record nothing. After a recording has failed, nothing is recorded any more.
    """

    def __init__(
        self,
        step: Callable[[Batch], torch.Tensor],
        device: torch.device,
        *,
        batch_size: int,
        recorder: Recorder | None,
    ) -> None:
        self._step = step
        self._device = device
        self._batch_size = batch_size
        self._recorder = recorder
        self._sizes: dict[int, _Size] = {}
        self._loss = torch.zeros((), device=device)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Take a step, and return its loss, which the next call may overwrite.

        batch: padded and in one piece, where a recorder was given.
        """
        if self._recorder is None or len(batch.lengths_B) != self._batch_size:
            return self._step(batch.to(self._device))
        size = self._sizes.get(len(batch.inputs_N))
        if size is None:
            size = self._sizes[len(batch.inputs_N)] = _Size(batch.to(self._device))
            self._recorder.run(self._work(size.batch))
            return self._loss
        assert size.batch.memory is not None
        assert batch.memory is not None
        size.batch.memory.copy_(batch.memory, non_blocking=True)
        if size.replay is None:
            try:
                size.replay = self._recorder.record(self._work(size.batch))
            except RuntimeError as error:
                log.warning("training goes on without CUDA graphs: %s", _first_line(error))
                self._recorder = None
                self._sizes.clear()
                return self._step(size.batch)
        size.replay()
        return self._loss

    def _work(self, batch: Batch) -> Callable[[], Any]:
        return lambda: self._loss.copy_(self._step(batch))


def _first_line(error: BaseException) -> str:
    """Return the first line of the first error: that of the broken recording hides the reason."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0] or type(error).__name__
