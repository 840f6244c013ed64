"""Steps of fixed shapes, which a GPU can replay, against the steps that they stand for; the
bookkeeping of replays with a recorder that needs no GPU; batches prepared ahead.

Nothing here needs CUDA. What does is in test_cuda.py.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import pack_sessions, random_sessions, tiny_settings
from helpers.recorders import CPU, TapeRecorder
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from benchmarks import cuda
from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import Batch, prepared_ahead, training_batch
from tron_cli.data.dataset import Sessions
from tron_cli.models.base import Model, build_model
from tron_cli.ops import rank_kernel
from tron_cli.sampling.negatives import Distribution, Negatives, sample_negatives
from tron_cli.training import start
from tron_cli.training import step as training_steps
from tron_cli.training.feed import build_feed
from tron_cli.training.graphs import CUDARecorder, GraphedSteps
from tron_cli.training.optim import build_optimizer, set_rate
from tron_cli.training.step import training_step

ITEMS = 300


def settings(**changes: Any) -> ExperimentConfig:
    return ExperimentConfig(**tiny_settings(**{"dropout_rate": 0.0, **changes}))


def some_sessions(count: int = 40, seed: int = 3, **lengths: int) -> Sessions:
    return pack_sessions(random_sessions(np.random.default_rng(seed), count, ITEMS, **lengths))


def draw(batch: Batch, config: ExperimentConfig, num_items: int = ITEMS) -> Negatives:
    return sample_negatives(
        batch,
        start._distribution(config, some_sessions(), num_items, CPU),
        num_uniform=config.num_uniform_negatives,
        num_batch=config.num_batch_negatives,
        sampling_style=config.sampling_style,
        reject_uniform_session_items=config.reject_uniform_session_items,
        reject_in_batch_items=config.reject_in_batch_items,
    )


def padded_negatives(negatives: Negatives, events: int, padding: int) -> Negatives:
    """Those of events also for padding, which takes those of the first event."""

    def pad(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None or len(values) != events:
            return values
        return torch.cat([values, values[:1].repeat(padding, *[1] * (values.dim() - 1))])

    uniform = pad(negatives.uniform)
    assert uniform is not None
    return dataclasses.replace(
        negatives,
        uniform=uniform,
        uniform_keep=pad(negatives.uniform_keep),
        uniform_log_expected=pad(negatives.uniform_log_expected),
    )


def build(
    config: ExperimentConfig, dtype: torch.dtype = torch.float64
) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = build_model(config, ITEMS).to(dtype)
    return model, build_optimizer(config.optimizer, model.parameters(), config.lr)


def take(
    model: Model,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: ExperimentConfig,
    distribution: Distribution = Distribution(ITEMS),
) -> torch.Tensor:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return training_step(model, optimizer, scaler, batch, config, distribution, torch.float32)


# --- batches --------------------------------------------------------------------------------------


def test_a_padded_batch_holds_the_same_events_and_padding_of_item_zero() -> None:
    sessions = some_sessions()
    chosen = np.array([4, 0, 7, 7, 30])
    plain = training_batch(sessions, chosen, 6)
    padded = training_batch(sessions, chosen, 6, padded=True)
    events = len(plain.inputs_N)
    assert len(padded.inputs_N) == 128
    for name in ("inputs_N", "targets_N", "rows_N", "places_N"):
        values = getattr(padded, name)
        assert values[:events].tolist() == getattr(plain, name).tolist()
        assert values[events:].tolist() == [0] * (128 - events)
    assert padded.lengths_B.tolist() == plain.lengths_B.tolist()
    (group,) = padded.groups
    assert group.gather_RW.shape == (5, 6)
    assert group.keep is not None
    # Each event is found again at its place of the rows, and padding at the first.
    gathered = padded.inputs_N[group.gather_RW].flatten()[group.keep]
    assert gathered[:events].tolist() == padded.inputs_N[:events].tolist()
    assert group.keep[events:].tolist() == [0] * (128 - events)


def test_events_are_rounded_up_to_a_multiple_of_128() -> None:
    sessions = pack_sessions([[1] * 5] * 64)  # four inputs each
    assert len(training_batch(sessions, np.arange(32), 9, padded=True).inputs_N) == 128
    assert len(training_batch(sessions, np.arange(33), 9, padded=True).inputs_N) == 256


@pytest.mark.parametrize("padded", [False, True])
def test_one_piece_of_memory_holds_the_whole_batch(padded: bool) -> None:
    batch = training_batch(some_sessions(), np.arange(9), 6, padded=padded)
    whole = batch.in_one_piece(pinned=False)
    assert whole.memory is not None
    start = whole.memory.data_ptr()
    stop = start + whole.memory.nbytes
    pairs = [(getattr(batch, name), getattr(whole, name)) for name in (
        "inputs_N", "targets_N", "lengths_B", "rows_N", "places_N")]  # fmt: skip
    for group, other in zip(batch.groups, whole.groups, strict=True):
        assert (group.start, group.end) == (other.start, other.end)
        assert (group.keep is None) == (other.keep is None)
        pairs += [(group.gather_RW, other.gather_RW)]
        pairs += [] if group.keep is None else [(group.keep, other.keep)]
    for one, two in pairs:
        assert one.shape == two.shape
        assert one.tolist() == two.tolist()
        assert start <= two.data_ptr() < stop
    assert whole.padded is padded


CATALOGUE = {"num_uniform_negatives": 0, "num_batch_negatives": 0, "topk_sampling": False}


# --- steps of fixed shapes ------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "row_adam", "adagrad"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "bpr-max", "bpr_penalty": 0.5, "clip_norm": 0.1, "positions": "start"},
        {"loss": "bce", "sampling_style": "eventwise", "topk_sampling": False,
         "reuse_item_embeddings": False, "reject_uniform_session_items": True},
        {"sampling_style": "sessionwise", "output_bias": True, "num_heads": 2,
         "mask_collisions": False, "num_batch_negatives": 0},
        {"num_uniform_negatives": 400},  # more ids than the table has rows
        {"num_uniform_negatives": 0, "num_batch_negatives": 30, "topk_sampling_k": 9},
        {"logq_correction": True, "topk_sampling": False, "sampling_style": "eventwise",
         "negative_sampler": "mixed"},
        CATALOGUE | {"loss": "ce", "reuse_item_embeddings": False, "output_bias": True},
        {"model": "gsasrec", "loss": "gbce", "sampling_style": "eventwise", "topk_sampling": False,
         "num_batch_negatives": 0},
        {"key_padding_mask": False, "block": "post-norm", "loss": "bpr"},
    ],
    ids=["tron", "bpr-max", "eventwise", "sessionwise", "many", "in-batch", "logq", "ce", "gsasrec",
         "attended padding"],
)  # fmt: skip
def test_a_padded_step_is_the_step(
    monkeypatch: pytest.MonkeyPatch, optimizer: str, changes: dict[str, Any]
) -> None:
    """The same loss and, after three steps, the same weights, with the same negatives."""
    config = settings(optimizer=optimizer, **changes)
    plain, padded = build(config), build(config)
    padded[1].leaves_out_rows = False
    sessions = some_sessions()
    given: list[Negatives] = []
    monkeypatch.setattr(training_steps, "sample_negatives", lambda *a, **k: given.pop())
    for step in range(3):
        chosen = np.arange(step, step + 8)
        batch = training_batch(sessions, chosen, config.sequence_length)
        events = len(batch.inputs_N)
        torch.manual_seed(step)
        negatives = draw(batch, config)
        other = training_batch(sessions, chosen, config.sequence_length, padded=True)
        assert events % 128
        given.append(negatives)
        loss = take(*plain, batch, config)
        given.append(padded_negatives(negatives, events, len(other.inputs_N) - events))
        padded_loss = take(*padded, other, config)
        torch.testing.assert_close(padded_loss, loss, rtol=1e-12, atol=0)
    theirs = dict(plain[0].named_parameters())
    for name, weights in padded[0].named_parameters():
        # Adagrad makes moves of gradients that are zero but for rounding (those of key biases).
        torch.testing.assert_close(weights, theirs[name], rtol=0, atol=1e-7)
    states = (each[1].state.values() for each in (padded, plain))
    for one, two in zip(*states, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["row_adam", "adagrad"])
def test_rows_that_sleep_are_written_back_as_they_were(optimizer: str) -> None:
    """Row 0 several times and row 5 once, all without a gradient."""
    weights = torch.nn.Parameter(torch.arange(12.0).view(6, 2).double())
    stepper = build_optimizer(optimizer, [weights], lr=0.5)
    stepper.leaves_out_rows = False
    state = stepper.state[weights]
    for name in {"mean", "square"} & state.keys():
        state[name] += 0.25
    before = [weights.detach().clone(), *(values.clone() for values in state.values())]
    rows = torch.tensor([[2, 5, 0, 0, 0]])
    gradient = torch.zeros(5, 2, dtype=torch.float64)
    gradient[0, 1] = 1e-3
    weights.grad = torch.sparse_coo_tensor(rows, gradient, weights.shape, check_invariants=True)
    stepper.step()
    sleeping = [0, 1, 3, 4, 5]
    for now, then in zip([weights, *state.values()], before, strict=True):
        assert now[sleeping].tolist() == then[sleeping].tolist()
    assert weights[2, 1] < before[0][2, 1]


@pytest.mark.parametrize("style", ["batchwise", "sessionwise", "eventwise"])
def test_padding_is_no_negative_and_rejects_nothing(style: str) -> None:
    config = settings(sampling_style=style, reject_uniform_session_items=True,
                      num_uniform_negatives=2000, num_batch_negatives=60)  # fmt: skip
    num_items = 12
    sessions = pack_sessions([[1, 2, 3, 4], [5, 6, 7], [8, 9, 8, 9, 10]])
    batch = training_batch(sessions, np.arange(3), 6, padded=True)
    torch.manual_seed(0)
    negatives = draw(batch, config, num_items)
    rows = {0: {5, 6}, 1: {1, 2, 3}, 2: {8, 9}}
    every = set(range(1, num_items + 1))
    assert negatives.uniform_keep is None or negatives.uniform_keep.all()
    if style == "batchwise":
        assert set(negatives.uniform.tolist()) == every - set().union(*rows.values())
    elif style == "sessionwise":
        for row, rejected in rows.items():
            assert set(negatives.uniform[row].tolist()) == every - rejected
    else:
        for event, row in enumerate(batch.rows_N.tolist()[:9]):
            assert set(negatives.uniform[event].tolist()) == every - rows[row]
    # All occurrences of the other sessions, each once, and nothing else is kept.
    assert negatives.in_batch_keep_BM is not None
    occurrences = {0: [5, 6], 1: [1, 2, 3], 2: [8, 9, 8, 9]}
    for row in range(3):
        kept = negatives.in_batch_BM[row][negatives.in_batch_keep_BM[row]]
        others = [item for other in occurrences if other != row for item in occurrences[other]]
        assert sorted(batch.inputs_N[kept].tolist()) == sorted(others)


# --- nothing waits for the device -----------------------------------------------------------------

LANES = {"model": "gru4rec", "session_parallel": True}

CHANGES_OF_SHAPES = [
    {"optimizer": "row_adam"},
    {"optimizer": "adam", "clip_norm": 1.0},
    {"optimizer": "adagrad", "reuse_item_embeddings": False, "loss": "bpr-max"},
    {"optimizer": "row_adam", "sampling_style": "eventwise", "reject_uniform_session_items": True,
     "loss": "bce", "topk_sampling": False},
    {"optimizer": "row_adam", "sampling_style": "sessionwise", "reject_in_batch_items": False},
    {"optimizer": "row_adam", "negative_sampler": "popularity"},
    {"optimizer": "row_adam", "negative_sampler": "mixed", "sampling_style": "sessionwise",
     "reject_uniform_session_items": True, "loss": "bpr-max", "final_activation": True},
    {"optimizer": "adam", "negative_sampler": "popularity", "sampling_style": "eventwise",
     "reject_uniform_session_items": True, "loss": "bpr"},
    {"optimizer": "row_adam", "negative_sampler": "mixed", "logq_correction": True,
     "topk_sampling": False, "reject_in_batch_items": False},
    {"optimizer": "row_adam", "negative_sampler": "popularity", "logq_correction": True,
     "topk_sampling": False, "sampling_style": "eventwise"},
    CATALOGUE | {"optimizer": "adam", "loss": "ce"},
    CATALOGUE | {"optimizer": "row_adam", "loss": "ce", "reuse_item_embeddings": False},
    CATALOGUE | {"optimizer": "row_adam", "loss": "sce", "output_bias": True},
    CATALOGUE | {"optimizer": "adagrad", "loss": "sce", "sce_mix": True, "sce_bucket_items": 20,
                 "reuse_item_embeddings": False},
    {"optimizer": "row_adam", "model": "gsasrec", "loss": "gbce", "sampling_style": "eventwise",
     "topk_sampling": False, "num_batch_negatives": 0},
    {"optimizer": "row_adam", "model": "gsasrec", "key_padding_mask": False, "num_heads": 2},
    {"optimizer": "row_adam", "key_padding_mask": False, "positions": "none"},
    {"optimizer": "adam", "block": "post-norm", "activation": "gelu", "initialization": "normal",
     "key_padding_mask": False},
    {"optimizer": "adam", "block": "ligr", "activation": "swiglu", "feed_forward_dim": 12},
    LANES | {"optimizer": "adagrad", "loss": "bpr-max", "output_bias": True},
    LANES | {"optimizer": "row_adam", "num_blocks": 2, "dropout_rate": 0.1,
             "reuse_item_embeddings": False},
    LANES | CATALOGUE | {"optimizer": "adam", "loss": "ce"},
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES_OF_SHAPES, ids=str)
def test_no_shape_of_a_step_depends_on_data(gpu_branches: None, changes: dict[str, Any]) -> None:
    """Fake tensors have shapes and no values: an operation that needs a value raises."""
    config = settings(**changes)
    model, optimizer = build(config)
    assert model.fixed_shapes
    optimizer.leaves_out_rows = False
    distribution = start._distribution(config, some_sessions(), ITEMS, CPU)
    batch = build_feed(config, some_sessions(), model, padded=True).batch(0)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        as_fake = {tensor: fake.from_tensor(tensor) for tensor in batch._tensors()}
        fake_batch = batch._over(torch.cat([as_fake[t].flatten() for t in batch._tensors()]))
        take(model, optimizer, fake_batch, config, distribution)


def test_the_check_of_shapes_finds_a_step_that_waits(gpu_branches: None) -> None:
    """As those of the CPU do: their lookups ask how many ids are distinct."""
    config = settings(optimizer="row_adam")
    model, optimizer = build(config)
    batch = training_batch(some_sessions(), np.arange(8), config.sequence_length)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        memory = fake.from_tensor(batch.in_one_piece(pinned=False).memory)
        with pytest.raises(DynamicOutputShapeException):
            take(model, optimizer, batch._over(memory), config)


# --- bookkeeping ----------------------------------------------------------------------------------


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


# --- batches prepared ahead -----------------------------------------------------------------------


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


# --- the benchmark that needs CUDA ----------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_the_cuda_benchmark_says_that_there_is_no_cuda_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cuda.main(["--output", str(tmp_path / "cuda.json")])
    assert end.value.code == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "cuda.json").exists()


def test_every_part_of_the_cuda_benchmark_runs(tmp_path: Path) -> None:
    """On the CPU and tiny, so that the one run on a GPU is not lost to a slip."""
    config = settings(sequence_length=20, train_batch_size=16)
    report = cuda.Report(tmp_path / "cuda.json", 5, {"machine": "none"})
    cuda.measure_all(
        report, config, CPU, num_items=ITEMS, num_sessions=200, steps=8, evaluated_sessions=70
    )
    written = json.loads((tmp_path / "cuda.json").read_text())
    parts = {name: part for name, part in written.items() if isinstance(part, dict)}
    assert not [name for name, part in parts.items() if "error" in part]
    for graphs in ("graphs", "eager"):
        found = written[f"{graphs}, float32, row_adam"]
        assert found["step_ms"] > 0
        hours = 12_900_000 / 16 * found["step_ms"] / 1e3 / 3600
        assert found["epochs_an_hour"] == pytest.approx(1 / hours)
    assert written["evaluation"]["ranks_differ"] == 0
    ratio = written["summary"]["bf16: times as fast as the reference in float32"]
    assert ratio == pytest.approx(
        written["reference"]["step_float32_ms"] / written["graphs, bf16, row_adam"]["step_ms"]
    )
    assert written["summary"]["float32: largest difference of 4 losses"] == 0.0


def test_a_variant_is_measured_without_the_memory_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and moments of OTTO's size, which would stay until the garbage is collected."""
    made: list[Any] = []

    class Watched(cuda.Steps):
        def __init__(self, *of: Any, **more: Any) -> None:
            assert [steps() for steps in made] == [None] * len(made)
            made.append(weakref.ref(self))
            super().__init__(*of, **more)

    monkeypatch.setattr(cuda, "Steps", Watched)
    config = settings(sequence_length=20, train_batch_size=16)
    report = cuda.Report(tmp_path / "cuda.json", 5, {})
    cuda.measure_all(
        report, config, CPU, num_items=ITEMS, num_sessions=60, steps=2, evaluated_sessions=20
    )
    assert len(made) == len(cuda.VARIANTS)
    parts = json.loads((tmp_path / "cuda.json").read_text())
    assert not [name for name, part in parts.items() if "error" in part]


def test_ranks_that_the_kernel_did_not_compute_are_not_reported_as_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where Triton fails, the chunks do it."""

    class Fails:
        def __init__(self, table: torch.Tensor) -> None: ...

        def pair_scores(self, *of: Any) -> Any:
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(rank_kernel, "_has_failed", False)
    monkeypatch.setattr(rank_kernel, "CoarseTable", Fails)
    monkeypatch.setattr(rank_kernel, "usable", lambda device: not rank_kernel._has_failed)
    model = build(settings())[0].float()
    found = cuda.measure_evaluation(model, some_sessions(), CPU, batch_size=8)
    assert found["kernel_usable"] is False
    assert found["ranks_differ"] == 0


def test_a_part_that_fails_is_reported_and_none_begins_when_time_is_over(tmp_path: Path) -> None:
    def fails() -> dict[str, Any]:
        raise ValueError("no")

    report = cuda.Report(tmp_path / "cuda.json", 5, {})
    assert report.part("one", fails)["error"] == "ValueError: no"
    assert report.part("two", lambda: {"figure": 3})["figure"] == 3
    over = cuda.Report(tmp_path / "over.json", 0, {})
    assert over.part("one", lambda: {"figure": 3})["error"] == "no time was left"
    written = json.loads((tmp_path / "cuda.json").read_text())
    assert written["one"]["error"] == "ValueError: no"
    assert written["two"]["figure"] == 3
