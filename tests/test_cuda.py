"""Behaviour on CUDA devices: half precision, gradient scaling, replayed graphs, the Triton path of
ranks, and the optimizers compared with those of the CPU.

`python -m benchmarks.cuda` runs these tests too, on a machine without the other test packages.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import pack_sessions, tiny_settings, write_dataset

from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import Batch, prepared_ahead, training_batch
from tron_cli.data.dataset import Sessions
from tron_cli.evaluation.predict import predict
from tron_cli.evaluation.ranking import Catalogue
from tron_cli.models.base import build_model
from tron_cli.models.sasrec import SASRec
from tron_cli.ops import rank_kernel
from tron_cli.sampling.negatives import Distribution
from tron_cli.training import loop as training
from tron_cli.training.feed import build_feed
from tron_cli.training.graphs import CUDARecorder, GraphedSteps
from tron_cli.training.optim import build_optimizer, catch_up_all, set_rate
from tron_cli.training.step import seed_generators, training_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")
ITEMS = 40


def cyclic_sessions(count: int = 400) -> Sessions:
    """Next is item + 1, and after the last item the first."""
    rng = np.random.default_rng(0)
    drawn = zip(rng.integers(ITEMS, size=count), rng.integers(3, 9, size=count), strict=True)
    return pack_sessions([[(a + k) % ITEMS + 1 for k in range(n)] for a, n in drawn])


def settings(**changes: Any) -> ExperimentConfig:
    chosen = {"embedding_dim": 32, "train_batch_size": 32, "optimizer": "row_adam", **changes}
    return ExperimentConfig(**tiny_settings(**chosen))


def run(
    config: ExperimentConfig, dtype: torch.dtype, *, graphs: bool, steps: int = 250
) -> tuple[SASRec, torch.optim.Optimizer, torch.Tensor, GraphedSteps]:
    """Steps on cyclic sessions as the training loop takes them; losses float32 [steps]."""
    torch.manual_seed(0)
    sessions = cyclic_sessions()
    model = build_model(config, ITEMS).to(CUDA).train()
    optimizer = build_optimizer(config.optimizer, model.parameters(), config.lr)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)

    feed = build_feed(config, sessions, model, padded=model.fixed_shapes)

    def prepare(step: int) -> Batch:
        return feed.batch(step).in_one_piece(pinned=True)

    take_step = GraphedSteps(
        lambda batch: training_step(
            model, optimizer, scaler, batch, config, Distribution(ITEMS), dtype
        ),
        CUDA,
        batch_size=config.train_batch_size,
        recorder=CUDARecorder(CUDA) if graphs else None,
    )
    losses = torch.zeros(steps, device=CUDA)
    with ThreadPoolExecutor(1) as thread:
        for step, batch in enumerate(prepared_ahead(prepare, range(steps), thread)):
            seed_generators(config.seed, step=step + 1)
            set_rate(optimizer, config.lr / (1 + step % 3))
            losses[step] = take_step(batch)
    return model, optimizer, losses.cpu(), take_step


def check_learned(model: SASRec) -> None:
    found = predict(model, cyclic_sessions(60), protocol="every-step")
    assert (found.rank_E == 1).mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("optimizer", ["adam", "row_adam"])
def test_every_precision_learns_what_comes_next(dtype: torch.dtype, optimizer: str) -> None:
    """fp16 with a scaler, and bf16, as `tron train` runs them there."""
    model, _, losses, _ = run(settings(optimizer=optimizer), dtype, graphs=False)
    assert losses.isfinite().all()
    check_learned(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adam", "clip_norm": 1.0, "output_bias": True},
        {"optimizer": "adagrad", "reuse_item_embeddings": False, "lr": 0.05},
        {"loss": "bce", "sampling_style": "eventwise", "topk_sampling": False,
         "num_uniform_negatives": 4, "reject_uniform_session_items": True},
        {"loss": "bpr-max", "sampling_style": "sessionwise"},
        {"model": "gru4rec", "session_parallel": True, "output_bias": True},
        {"model": "gru4rec", "session_parallel": True, "optimizer": "adagrad", "lr": 0.05,
         "loss": "bpr-max"},
        {"model": "gru4rec", "session_parallel": True, "num_blocks": 2},
    ],
    ids=["tron", "dense", "adagrad", "eventwise", "sessionwise", "lanes", "lanes, bpr-max",
         "lanes, two layers"],
)  # fmt: skip
def test_replayed_steps_are_the_steps(
    caplog: pytest.LogCaptureFixture, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    """Losses are equal with dropout: the random numbers of a replay are those of its seed."""
    config = settings(dropout_rate=0.1, **changes)
    with caplog.at_level(logging.WARNING, "tron"):
        model, _, losses, replayed = run(config, dtype, graphs=True, steps=60)
    assert not caplog.records, caplog.text
    assert any(size.replay is not None for size in replayed._sizes.values())
    others, _, expected, _ = run(config, dtype, graphs=False, steps=60)
    # Sums on a GPU have no fixed order. Another rate or other random numbers change losses by 0.1.
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
    if dtype == torch.float32:
        for (name, weights), other in zip(
            model.named_parameters(), others.parameters(), strict=True
        ):
            if name.endswith("query_key_value.bias"):
                # That of the keys cancels in the softmax: Adam takes steps along its rounding.
                weights, other = (bias.view(3, -1)[[0, 2]] for bias in (weights, other))
            torch.testing.assert_close(weights, other, rtol=1e-2, atol=5e-3)


def test_replays_draw_other_numbers_for_another_seed_and_the_same_for_the_same() -> None:
    """The recorded step returns nothing but its random numbers."""
    drawn = GraphedSteps(
        lambda batch: torch.rand(9, device=CUDA).sum() + torch.randint(9, (50,), device=CUDA).sum(),
        CUDA,
        batch_size=8,
        recorder=CUDARecorder(CUDA),
    )  # fmt: skip
    batch = training_batch(cyclic_sessions(8), np.arange(8), 6, padded=True)
    found = []
    for seed in (1, 2, 1, 3, 2, 1):  # taken, recorded, and replayed from then on
        torch.manual_seed(seed)
        found.append(float(drawn(batch.in_one_piece(pinned=True))))
    assert found[0] == found[2] == found[5]
    assert found[1] == found[4]
    assert len(set(found)) == 3


def test_a_step_that_cannot_be_recorded_is_taken_as_usual(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def waits(batch: Batch) -> torch.Tensor:
        drawn = torch.rand(100, device=CUDA).sum()
        return drawn * (2.0 if drawn.item() > 0 else 1.0)

    batch = training_batch(cyclic_sessions(8), np.arange(8), 6, padded=True)
    steps = GraphedSteps(waits, CUDA, batch_size=8, recorder=CUDARecorder(CUDA))
    found = []
    with caplog.at_level(logging.WARNING, "tron"):
        for seed in (1, 1, 2, 1):
            torch.manual_seed(seed)
            found.append(float(steps(batch.in_one_piece(pinned=True))))
    assert len(caplog.records) == 1
    assert "without CUDA graphs" in caplog.text
    assert found[0] == found[1] == found[3] != found[2]
    # And training, recorded, still works after that.
    check_learned(run(settings(), torch.float32, graphs=True)[0])


@pytest.mark.parametrize("session_parallel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gru_has_the_precision_that_was_asked_for(
    dtype: torch.dtype, session_parallel: bool
) -> None:
    """States in bf16 are those of float32, within the rounding of TF32."""
    config = settings(model="gru4rec", session_parallel=session_parallel, train_batch_size=8)
    torch.manual_seed(0)
    model = build_model(config, ITEMS).to(CUDA).eval()
    sessions = cyclic_sessions(60)
    feed = build_feed(config, sessions, model, padded=False)
    batch = feed.batch(3).to(CUDA)
    seen = []
    model.gru.register_forward_hook(lambda _, __, outputs: seen.append(outputs[1].dtype))
    expected = model(batch)
    if session_parallel:
        model.carried_LBD.zero_()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        found = model(batch)
    half = dtype == torch.float16
    assert seen == [torch.float32, torch.float16 if half else torch.float32]
    torch.testing.assert_close(found.float(), expected, rtol=5e-3, atol=5e-3)


def test_the_training_loop_gives_the_same_with_and_without_graphs(tmp_path: Path) -> None:
    pytest.importorskip("ir_measures.measures")
    rows = [list(map(int, row)) for row in map(cyclic_sessions(200).__getitem__, range(200))]
    dataset = write_dataset(tmp_path, train=rows, val=rows[:50], num_items=ITEMS)
    figures = []
    for cuda_graphs in (True, False):
        config = settings(
            cuda_graphs=cuda_graphs, max_epochs=10, dropout_rate=0.0, precision="float32"
        )
        best = training.train(config, dataset, tmp_path / str(cuda_graphs), device=CUDA)
        figures.append(float(best.stem.rpartition("=")[2]))
    assert figures[0] == pytest.approx(figures[1], abs=0.02)
    assert min(figures) > 0.9


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_all_of_a_run_is_on_the_card_that_was_named(tmp_path: Path) -> None:
    """Graphs, pinned batches and the kernel of ranks included."""
    pytest.importorskip("ir_measures.measures")
    rows = [list(map(int, row)) for row in map(cyclic_sessions(200).__getitem__, range(200))]
    dataset = write_dataset(tmp_path, train=rows, val=rows[:50], num_items=ITEMS)
    cli = pytest.importorskip("tron_cli.ops.device")
    before = torch.cuda.memory_allocated(0)
    try:
        device = cli.chosen_device("cuda:1")
        best = training.train(settings(max_epochs=10), dataset, tmp_path / "run", device=device)
    finally:
        torch.cuda.set_device(0)
    assert float(best.stem.rpartition("=")[2]) > 0.9
    assert torch.cuda.memory_allocated(0) == before


@pytest.mark.skipif(
    not (torch.cuda.is_available() and rank_kernel.usable(CUDA)), reason="needs Triton on CUDA"
)
@pytest.mark.parametrize("kind", ["random", "ties", "close"])
def test_ranks_of_the_kernel_are_those_of_its_oracles(kind: str) -> None:
    """The chunked path, and scores in float64 where these are exact."""
    rng = np.random.default_rng(1)
    items, events, dim = 5000, 700, 40
    table = rng.standard_normal((items + 1, dim))
    hidden = rng.standard_normal((events, dim))
    if kind == "ties":
        table, hidden = rng.integers(-2, 3, table.shape), rng.integers(-2, 3, hidden.shape)
    elif kind == "close":
        table = table[:1] + 1e-6 * table
    table_VD = torch.tensor(table, dtype=torch.float32, device=CUDA)
    hidden_ED = torch.tensor(hidden, dtype=torch.float32, device=CUDA)
    target_E = torch.tensor(rng.integers(1, items + 1, events), device=CUDA)
    fast, slow = Catalogue(table_VD), Catalogue(table_VD)
    assert fast._kernel is not None
    slow._kernel = None
    ranks = fast.ranks(hidden_ED, target_E)
    assert torch.equal(ranks, slow.ranks(hidden_ED, target_E))
    if kind != "close":  # where float64 does not tell all scores apart
        score_EI = hidden_ED.double() @ table_VD[1:].double().T
        own_E1 = score_EI.gather(1, target_E[:, None] - 1)
        assert torch.equal(ranks, (score_EI >= own_E1).sum(dim=1))


@pytest.mark.parametrize("name", ["adam", "row_adam", "adagrad"])
def test_optimizers_step_as_on_the_cpu(name: str) -> None:
    """Some rows per step, with rows of zeros among them and row 0 in place of more rows."""
    rng = np.random.default_rng(2)
    start = torch.tensor(rng.standard_normal((50, 6)), dtype=torch.float32)
    weights = [torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone().to(CUDA))]
    optimizers = [build_optimizer(name, [one], lr=0.01) for one in weights]
    for step in range(30):
        rows = torch.tensor([0, *sorted(rng.choice(np.arange(1, 50), 12, False)), 0, 0])
        values = torch.tensor(rng.standard_normal((15, 6)), dtype=torch.float32)
        values[[0, 3, 13, 14]] = 0
        for one, optimizer in zip(weights, optimizers, strict=True):
            gradient = torch.sparse_coo_tensor(
                rows[None], values, start.shape, check_invariants=True
            )
            gradient = gradient.to(one.device)
            one.grad = gradient.to_dense() if name == "adam" else gradient
            set_rate(optimizer, 0.01 / (1 + step % 2))
            optimizer.step()
    for optimizer in optimizers:
        catch_up_all(optimizer)  # they differ in which rows they wake before that
    torch.testing.assert_close(weights[1].cpu(), weights[0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(weights[0], start)
    assert torch.equal(weights[1][0].cpu(), start[0])
