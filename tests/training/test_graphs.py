"""Recording and replaying of steps, with recorders that need no GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import pack_sessions
from helpers.fixed_shapes import ITEMS, LANES, build, settings, some_sessions, take
from helpers.recorders import CPU, TapeRecorder

from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import Batch, training_batch
from tron_cli.data.dataset import Sessions
from tron_cli.models.base import Model
from tron_cli.training import start
from tron_cli.training.feed import build_feed
from tron_cli.training.graphs import CUDARecorder, GraphedSteps
from tron_cli.training.optim import set_rate


class FakeRecorder:
    """Records by remembering; `events` says what happened."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.events: list[str] = []

    def run(self, work: Callable[[], object]) -> None:
        self.events.append("run")
        work()

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        self.events.append("record")
        if self.fails:
            # As torch does, which ends the recording of an operation that failed.
            try:
                raise RuntimeError("operation not permitted\nwhen stream is capturing")
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")

        def replay() -> None:
            self.events.append("replay")
            work()

        return replay


def sized_sessions() -> Sessions:
    """Sessions 0 to 7 have 16 inputs each, sessions 8 to 15 have 32."""
    rng = np.random.default_rng(0)
    return pack_sessions(
        [rng.integers(1, ITEMS + 1, 17).tolist() for _ in range(8)]
        + [rng.integers(1, ITEMS + 1, 33).tolist() for _ in range(8)]
    )


BATCHES = [range(8), range(8, 16), range(8), range(8), range(8, 16), range(3), range(8, 16)]


def run_steps(
    config: ExperimentConfig, recorder: FakeRecorder | TapeRecorder | None
) -> tuple[list[float], Model]:
    model, optimizer = build(config, torch.float32)
    optimizer.leaves_out_rows = False
    sessions = sized_sessions()
    steps = GraphedSteps(
        lambda batch: take(model, optimizer, batch, config),
        CPU,
        batch_size=8,
        recorder=recorder,
    )
    losses = []
    for number, chosen in enumerate(BATCHES):
        torch.manual_seed(number)
        set_rate(optimizer, 0.01 / (number + 1))
        batch = training_batch(sessions, np.array(chosen), config.sequence_length, padded=True)
        losses.append(float(steps(batch.in_one_piece(pinned=False))))
    return losses, model


@pytest.fixture
def config() -> ExperimentConfig:
    return settings(sequence_length=40, optimizer="row_adam")


def check_same(one: tuple[list[float], Model], two: tuple[list[float], Model]) -> None:
    assert one[0] == two[0]
    for weights, others in zip(one[1].parameters(), two[1].parameters(), strict=True):
        assert torch.equal(weights, others)


def test_steps_are_recorded_once_for_each_size_and_replayed(config: ExperimentConfig) -> None:
    recorder = FakeRecorder()
    check_same(run_steps(config, recorder), run_steps(config, None))
    assert recorder.events == [
        "run",  # 128 events
        "run",  # 256 events
        "record", "replay",  # 128 again
        "replay",
        "record", "replay",  # 256 again
        # three sessions only: neither
        "replay",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "row_adam", "dropout_rate": 0.3, "reject_in_batch_items": False},
        {"optimizer": "adam", "clip_norm": 0.1, "output_bias": True},
        {"optimizer": "adagrad", "loss": "bpr-max", "reuse_item_embeddings": False},
    ],
    ids=["row_adam", "adam", "adagrad"],
)
def test_a_replay_of_the_operations_alone_is_the_step(
    gpu_branches: None, changes: dict[str, Any]
) -> None:
    """The learning rate, the seed and the batch of each step reach a replay; all else stands."""
    config = settings(sequence_length=40, **changes)
    recorder = TapeRecorder()
    check_same(run_steps(config, recorder), run_steps(config, None))
    assert recorder.replays == 4


def run_lanes(config: ExperimentConfig, recorder: TapeRecorder | None) -> tuple[list[float], Model]:
    model, optimizer = build(config, torch.float32)
    optimizer.leaves_out_rows = False
    feed = build_feed(config, some_sessions(), model, padded=True)
    steps = GraphedSteps(
        lambda batch: take(model, optimizer, batch, config), CPU, batch_size=8, recorder=recorder
    )
    losses = []
    for step in range(30):
        torch.manual_seed(step)
        set_rate(optimizer, 0.01 / (step + 1))
        losses.append(float(steps(feed.batch(step).in_one_piece(pinned=False))))
    return losses, model


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adagrad", "loss": "bpr-max", "output_bias": True},
        {"optimizer": "row_adam", "num_blocks": 2, "dropout_rate": 0.3},
    ],
    ids=["bpr-max", "two layers"],
)
def test_lanes_go_on_from_the_states_that_a_replay_left(
    gpu_branches: None, changes: dict[str, Any]
) -> None:
    """A replay reads the carried states where the one before wrote them."""
    config = settings(**LANES, **changes)
    recorder = TapeRecorder()
    recorded, eager = run_lanes(config, recorder), run_lanes(config, None)
    check_same(recorded, eager)
    assert recorder.replays == 29
    for one, other in zip(recorded[1].buffers(), eager[1].buffers(), strict=True):
        assert one.any()
        assert torch.equal(one, other)


def test_training_goes_on_where_nothing_can_be_recorded(
    config: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = FakeRecorder(fails=True)
    with caplog.at_level(logging.WARNING, "tron"):
        found = run_steps(config, recorder)
    check_same(found, run_steps(config, None))
    assert recorder.events == ["run", "run", "record"]
    assert [record.getMessage() for record in caplog.records] == [
        "training goes on without CUDA graphs: operation not permitted"
    ]


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of a recorder to torch.cuda; `recording` is the pool being recorded, if any."""
    asked: list[tuple[Any, ...]] = []

    class Generator:
        def initial_seed(self) -> int:
            return 7

        def manual_seed(self, seed: int) -> Generator:
            asked.append(("seed", seed))
            return self

        def graphsafe_get_state(self) -> str:
            return "fresh"

        def graphsafe_set_state(self, state: str) -> None:
            asked.append(("state", state))

    def ends(device: int, pool: str) -> None:
        asked.append(("end", device, pool))
        if ("invalidated",) not in asked:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    stream = SimpleNamespace(device=torch.device("cuda", 1))
    for name, value in {
        "Stream": lambda device: stream,
        "stream": lambda stream: nullcontext(),
        "graph_pool_handle": lambda: "pool",
        "CUDAGraph": lambda: SimpleNamespace(replay="replay"),
        "default_generators": (None, Generator()),
        "graph": lambda graph, **options: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "Generator", lambda device: Generator())
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ends)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *of: asked.append(("release", *of)))
    return asked


@pytest.mark.parametrize("invalidated", [True, False])
def test_a_recording_that_failed_leaves_the_allocator_and_the_generator_as_they_were(
    fake_cuda: list[tuple[Any, ...]], invalidated: bool
) -> None:
    """Else torch keeps the memory of the recording, and frees no other where it runs out.

    One that ran out of memory, which does not invalidate it, was ended by torch.
    """

    def work() -> None:
        if invalidated:
            fake_cuda.append(("invalidated",))
        raise RuntimeError("operation not permitted")

    recorder = CUDARecorder(torch.device("cuda"))
    assert recorder.record(lambda: None) == "replay"
    assert fake_cuda == []
    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.record(work)
    begun = [("invalidated",), ("end", 1, "pool"), ("release", 1, "pool")]
    ended = [("end", 1, "pool")]
    assert fake_cuda == (begun if invalidated else ended) + [("seed", 7), ("state", "fresh")]


def test_a_failing_step_is_no_failing_recording() -> None:
    def step(batch: Batch) -> torch.Tensor:
        raise RuntimeError("out of memory")

    steps = GraphedSteps(step, CPU, batch_size=8, recorder=FakeRecorder())
    batch = training_batch(sized_sessions(), np.arange(8), 40, padded=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        steps(batch.in_one_piece(pinned=False))


def test_what_is_recorded_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "CUDARecorder", lambda device: "a recorder")
    cuda = torch.device("cuda")

    def recorder(
        device: torch.device = cuda,
        dtype: torch.dtype = torch.bfloat16,
        records: bool = True,
        **changes: Any,
    ) -> Any:
        return start._recorder(settings(**changes), device, dtype, records=records)

    assert recorder() == recorder(dtype=torch.float32) == "a recorder"
    assert recorder(cuda_graphs=False) is None
    assert recorder(device=CPU) is None
    assert recorder(dtype=torch.float16) is None
    assert recorder(records=False) is None  # a profiler, or a model of other shapes in every step
