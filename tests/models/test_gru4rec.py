"""GRU4Rec against torch.nn.GRUCell stepped by hand through each session."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import pack_sessions, random_sessions, tiny_settings, write_dataset
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence

import tron_cli.training.step as module
from tron_cli.checkpoint import load_checkpoint
from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import Batch, pack, training_batch
from tron_cli.data.lanes import Lanes
from tron_cli.errors import InputError
from tron_cli.models.gru4rec import GRU4Rec
from tron_cli.training.loop import train

CPU = torch.device("cpu")
ITEMS, DIM = 30, 8


def build(**changes: Any) -> GRU4Rec:
    settings = {
        "num_items": ITEMS,
        "sequence_length": 6,
        "embedding_dim": DIM,
        "num_blocks": 2,
        "dropout_rate": 0.0,
        "reuse_item_embeddings": True,
        "output_bias": False,
        "session_parallel": False,
        "train_batch_size": 4,
        **changes,
    }
    torch.manual_seed(5)
    model = GRU4Rec(**settings).double()
    with torch.no_grad():
        model.item_embedding.weight.mul_(5)  # so that states differ well
    return model


class ByHand:
    """Copy the weights to cells, one per layer, and to a table of their own."""

    def __init__(self, model: GRU4Rec) -> None:
        self.table = model.item_embedding.weight.detach().clone().requires_grad_()
        self.cells = []
        for layer in range(model.gru.num_layers):
            cell = nn.GRUCell(DIM, DIM).double()
            with torch.no_grad():
                for name, parameter in cell.named_parameters():
                    parameter.copy_(getattr(model.gru, f"{name}_l{layer}"))
            self.cells.append(cell)

    def states(self, items: list[int], *, truncated: bool = False) -> torch.Tensor:
        """[T, D]: the last layer's state after each event, from zero."""
        states = [torch.zeros(DIM, dtype=torch.float64) for _ in self.cells]
        found = []
        for item in items:
            x = self.table[item, :DIM]
            for layer, cell in enumerate(self.cells):
                before = states[layer].detach() if truncated else states[layer]
                x = states[layer] = cell(x, before)
            found.append(x)
        return torch.stack(found)

    def check_gradients(self, model: GRU4Rec) -> None:
        for layer, cell in enumerate(self.cells):
            for name, parameter in cell.named_parameters():
                torch.testing.assert_close(
                    getattr(model.gru, f"{name}_l{layer}").grad, parameter.grad
                )
        torch.testing.assert_close(model.item_embedding.weight.grad, self.table.grad)


def packed(sessions: list[list[int]]) -> tuple[Batch, list[list[int]]]:
    """Sessions as one batch, and them in its order."""
    data = pack_sessions(sessions)
    order = np.argsort(data.lengths, kind="stable")
    batch = pack(data.items, data.offsets[order], data.lengths[order], with_targets=False)
    return batch, [sessions[number] for number in order]


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_whole_sessions_are_cells_stepped_by_hand(num_blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sessions = random_sessions(rng, 13, ITEMS, longest=int(rng.integers(1, 20)), shortest=1)
    batch, ordered = packed(sessions)
    model = build(num_blocks=num_blocks)
    by_hand = ByHand(model)
    hidden_ND = model(batch)
    expected = torch.cat([by_hand.states(row) for row in ordered])
    torch.testing.assert_close(hidden_ND, expected)
    weight_ND = torch.from_numpy(rng.normal(size=hidden_ND.shape))
    (hidden_ND * weight_ND).sum().backward()
    (expected * weight_ND).sum().backward()
    by_hand.check_gradients(model)


def test_a_row_of_one_event_and_one_row_alone() -> None:
    model = build()
    for sessions in ([[3]], [[3, 4, 5]], [[1], [2]], [[7, 7], [7, 7]]):
        batch, ordered = packed(sessions)
        expected = torch.cat([ByHand(model).states(row) for row in ordered])
        torch.testing.assert_close(model(batch), expected)


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_lanes_carry_the_state_through_a_session_and_begin_the_next_from_zero(
    num_blocks: int,
) -> None:
    rng = np.random.default_rng(8)
    sessions = random_sessions(rng, 15, ITEMS)
    lanes = Lanes(pack_sessions(sessions), lanes=4, sequence_length=6, style="no_shuffling", seed=0)
    model = build(num_blocks=num_blocks, session_parallel=True)
    by_hand = ByHand(model)
    history: list[list[int]] = [[], [], [], []]
    for step in range(40):
        batch = lanes.batch(step)
        expected = []
        for lane, (item, place) in enumerate(zip(batch.inputs_N, batch.places_N, strict=True)):
            history[lane] = ([] if place == 0 else history[lane]) + [int(item)]
            assert len(history[lane]) == place + 1
            expected.append(by_hand.states(history[lane], truncated=True)[-1])
        hidden_ND = model(batch)
        torch.testing.assert_close(hidden_ND, torch.stack(expected))
        # The gradient of a step ends at the state that the step before has left.
        weight_ND = torch.from_numpy(rng.normal(size=hidden_ND.shape))
        model.zero_grad()
        (hidden_ND * weight_ND).sum().backward()
        if step % 10 == 9:
            fresh = ByHand(model)
            every = [fresh.states(row, truncated=True)[-1] for row in history]
            (torch.stack(every) * weight_ND).sum().backward()
            fresh.check_gradients(model)


def test_rows_in_any_order_find_the_state_of_their_lane() -> None:
    rng = np.random.default_rng(9)
    data = pack_sessions(random_sessions(rng, 9, ITEMS, shortest=5))
    lanes = Lanes(data, lanes=4, sequence_length=6, style="no_shuffling", seed=0)
    model, other = (build(session_parallel=True) for _ in range(2))
    order = torch.tensor([2, 0, 3, 1])
    for step in range(4):
        batch = lanes.batch(step)
        assert batch.lanes_B is not None
        shuffled = dataclasses.replace(
            batch, inputs_N=batch.inputs_N[order], places_N=batch.places_N[order],
            lanes_B=batch.lanes_B[order],
        )  # fmt: skip
        torch.testing.assert_close(other(shuffled), model(batch)[order])
    torch.testing.assert_close(other.carried_LBD, model.carried_LBD)


def test_evaluation_neither_uses_nor_changes_the_carried_states() -> None:
    rng = np.random.default_rng(10)
    sessions = random_sessions(rng, 9, ITEMS)
    lanes = Lanes(pack_sessions(sessions), lanes=4, sequence_length=6, style="no_shuffling", seed=0)
    model, other = (build(session_parallel=True) for _ in range(2))
    batch, _ = packed(sessions)
    for step in range(6):
        assert torch.equal(model(lanes.batch(step)), other(lanes.batch(step)))
        torch.testing.assert_close(model.eval()(batch), build()(batch))
        model.train()
    assert torch.equal(model.carried_LBD, other.carried_LBD)
    assert bool(model.carried_LBD.any())


def test_carried_states_are_saved_with_the_weights() -> None:
    rng = np.random.default_rng(11)
    data = pack_sessions(random_sessions(rng, 9, ITEMS))

    def fresh() -> Lanes:
        return Lanes(data, lanes=4, sequence_length=6, style="no_shuffling", seed=0)

    model, resumed, lanes = build(session_parallel=True), build(session_parallel=True), fresh()
    for step in range(5):
        model(lanes.batch(step))
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(resumed(fresh().batch(5)), model(lanes.batch(5)))
    assert not any("carried" in name for name in build().state_dict())


def test_later_events_change_no_earlier_state() -> None:
    """So one pass over a session predicts each of its events as serving would."""
    rng = np.random.default_rng(12)
    model = build().float().eval()
    assert model.one_row_serves_all
    sessions = random_sessions(rng, 8, ITEMS, longest=15, shortest=3)
    for row in sessions:
        whole = model(packed([row])[0])
        for length in range(1, len(row)):
            shorter = model(packed([row[:length]])[0])
            torch.testing.assert_close(whole[:length], shorter, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("session_parallel", [False, True])
@pytest.mark.parametrize("reuse_item_embeddings", [False, True])
def test_looked_up_rows_give_the_states_of_the_whole_table(
    session_parallel: bool, reuse_item_embeddings: bool
) -> None:
    rng = np.random.default_rng(13)
    data = pack_sessions(random_sessions(rng, 12, ITEMS))
    settings = {
        "session_parallel": session_parallel,
        "reuse_item_embeddings": reuse_item_embeddings,
        "output_bias": True,
    }
    model, other = build(**settings), build(**settings)
    if session_parallel:
        batch = Lanes(data, lanes=4, sequence_length=6, style="no_shuffling", seed=0).batch(3)
    else:
        batch = training_batch(data, np.arange(12), 6)
    ids_U, place_N = batch.inputs_N.unique(return_inverse=True)
    rows_UD = other.item_embedding.weight[ids_U]
    found = other(dataclasses.replace(batch, inputs_N=place_N), rows_UD)
    expected = model(batch)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(other.item_embedding.weight.grad, model.item_embedding.weight.grad)


@pytest.mark.parametrize("reuse_item_embeddings", [False, True])
def test_the_bias_of_an_item_is_a_column_that_the_recurrence_does_not_see(
    reuse_item_embeddings: bool,
) -> None:
    model = build(output_bias=True, reuse_item_embeddings=reuse_item_embeddings)
    assert model.item_table.shape == (ITEMS + 1, DIM + 1)
    assert (model.item_table is model.item_embedding.weight) == reuse_item_embeddings
    batch, _ = packed([[1, 2, 3], [4, 5]])
    hidden_ND = model(batch).detach()
    scores = hidden_ND @ model.item_table.T
    with torch.no_grad():
        model.item_table[:, DIM] += torch.arange(ITEMS + 1)
    torch.testing.assert_close(model(batch), hidden_ND)
    torch.testing.assert_close(
        model(batch) @ model.item_table.T,
        scores + torch.arange(ITEMS + 1),
    )


def test_dropout_is_on_inputs_and_outputs_and_not_on_what_is_carried() -> None:
    rng = np.random.default_rng(14)
    data = pack_sessions(random_sessions(rng, 300, ITEMS))
    lanes = Lanes(data, lanes=200, sequence_length=6, style="no_shuffling", seed=0)
    model = build(
        num_blocks=1, dropout_rate=0.25, session_parallel=True, train_batch_size=200
    ).train()
    batch = lanes.batch(0)
    rows_BD = model.item_embedding.weight[batch.inputs_N].detach().requires_grad_()
    hidden_BD = model(dataclasses.replace(batch, inputs_N=torch.arange(200)), rows_BD)
    kept = hidden_BD != 0
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.04)
    carried_BD = model.carried_LBD[0]
    assert bool((carried_BD != 0).all())
    torch.testing.assert_close(hidden_BD[kept], carried_BD[kept] / 0.75)
    hidden_BD.sum().backward()
    assert rows_BD.grad is not None
    assert (rows_BD.grad != 0).double().mean().item() == pytest.approx(0.75, abs=0.04)
    assert torch.equal(model.eval()(packed([[1, 2]])[0]), model(packed([[1, 2]])[0]))


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_dropout_between_layers(num_blocks: int) -> None:
    """With dropout on inputs and outputs off, a second layer still sees other inputs each time."""
    model = build(num_blocks=num_blocks, dropout_rate=0.5).train()
    model.dropout.p = 0.0
    batch, _ = packed([[1, 2, 3], [4, 5]])
    assert torch.equal(model(batch), model(batch)) == (num_blocks == 1)


def test_tables_begin_as_in_tron() -> None:
    """Uniform within 1 / sqrt(rows + columns): Xavier's with a gain of 1 / sqrt(6)."""
    model = build(num_items=4999, embedding_dim=40, reuse_item_embeddings=False, output_bias=True)
    with torch.no_grad():
        model.item_embedding.weight.div_(5)  # as it was drawn
    for rows, width in ((model.item_embedding.weight, 40), (model.item_table, 41)):
        table = rows.detach()
        bound = 1 / math.sqrt(5000 + width)
        assert table.shape == (5000, width)
        assert float(table.abs().max()) == pytest.approx(bound, rel=1e-3)
        assert float(table.std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.gru.parameters()])
    assert float(weights.abs().max()) == pytest.approx(1 / math.sqrt(40), rel=1e-3)


def test_dropout_between_layers_of_a_step_of_lanes_is_torch_s_own() -> None:
    """cuDNN's waits for the device after every seed, so that no step could be recorded."""
    rng = np.random.default_rng(16)
    data = pack_sessions(random_sessions(rng, 9, ITEMS))
    model = build(session_parallel=True, num_blocks=3, dropout_rate=0.4)
    by_hand = ByHand(model)
    states = [torch.zeros(4, DIM, dtype=torch.float64) for _ in by_hand.cells]
    lanes = Lanes(data, lanes=4, sequence_length=6, style="no_shuffling", seed=0)
    for step in range(5):
        batch = lanes.batch(step)
        torch.manual_seed(step)
        found = model(batch)
        torch.manual_seed(step)
        x = by_hand.table[batch.inputs_N]
        for layer, cell in enumerate(by_hand.cells):
            x = states[layer] = cell(
                model.dropout(x), states[layer].detach() * (batch.places_N > 0)[:, None]
            )
        torch.testing.assert_close(found, model.dropout(x))


def test_bf16_autocast_is_near_float32() -> None:
    rng = np.random.default_rng(15)
    data = pack_sessions(random_sessions(rng, 9, ITEMS))
    model, other = (build(session_parallel=True).float() for _ in range(2))
    lanes = Lanes(data, lanes=4, sequence_length=6, style="no_shuffling", seed=0)
    for batch in (training_batch(data, np.arange(9), 6), lanes.batch(2)):
        expected = model(batch)
        with torch.autocast("cpu", torch.bfloat16):
            found = other(batch)
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.02)


@pytest.fixture
def cuda_autocast() -> Iterator[Callable[[torch.dtype | None], None]]:
    """Autocast of CUDA tensors, which torch.autocast refuses where there is no device."""
    before = torch.get_autocast_dtype("cuda")

    def choose(dtype: torch.dtype | None) -> None:
        torch.set_autocast_enabled("cuda", dtype is not None)
        if dtype is not None:
            torch.set_autocast_dtype("cuda", dtype)

    yield choose
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", before)


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("packed_rows", [False, True])
@pytest.mark.parametrize("asked", [None, torch.bfloat16, torch.float16], ids=str)
def test_the_recurrence_is_float16_on_cuda_only_where_that_was_asked_for(
    cuda_autocast: Callable[[torch.dtype | None], None],
    asked: torch.dtype | None,
    packed_rows: bool,
) -> None:
    """cuDNN's autocast is float16 whatever is asked for, and bf16 comes without a scaler.

    Fake tensors stand for those of a device: they have one, and no values.
    """
    seen = []

    class Watched(nn.GRU):
        def forward(self, x: Any, *state: torch.Tensor) -> Any:
            within = torch.is_autocast_enabled("cuda")
            seen.append([x.data.dtype, *(each.dtype for each in state)])
            seen.append(torch.get_autocast_dtype("cuda") if within else None)
            return x, state

    model = build(num_blocks=1).float()
    model.gru = Watched(DIM, DIM)
    with FakeTensorMode():
        # Dropout, say, may have computed the inputs in autocast's precision.
        x_ND = torch.empty(5, DIM, device="cuda", dtype=asked)
        state_1BD = torch.empty(1, 5, DIM, device="cuda")
        cuda_autocast(asked)
        if packed_rows:
            model._recurrence(PackedSequence(x_ND, torch.tensor([3, 2])))
        else:
            model._recurrence(x_ND.unsqueeze(0), state_1BD)
    if asked == torch.float16:
        assert seen[1] == torch.float16
    else:
        assert set(seen[0]) == {torch.float32}
        assert seen[1] is None


class KilledError(Exception):
    pass


@pytest.mark.parametrize("session_parallel", [False, True])
@pytest.mark.parametrize("killed_at", [6, 11])
def test_a_run_that_was_killed_and_resumed_ends_the_same(
    session_parallel: bool, killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(16)
    sessions = random_sessions(rng, 60, ITEMS)
    data = write_dataset(tmp_path, train=sessions[:45], val=sessions[45:], num_items=ITEMS)
    settings = tiny_settings(
        model="gru4rec", session_parallel=session_parallel, loss="bpr-max", optimizer="adagrad",
        output_bias=True, final_activation=True, dropout_rate=0.2, save_every=4, max_epochs=2,
    )  # fmt: skip
    config = ExperimentConfig(**settings)
    train(config, data, tmp_path / "whole", device=CPU)

    original, steps = module.training_loss, itertools.count(1)

    def dies(*arguments: Any, **options: Any) -> torch.Tensor:
        if next(steps) == killed_at:
            raise KilledError
        return original(*arguments, **options)

    monkeypatch.setattr(module, "training_loss", dies)
    with pytest.raises(KilledError):
        train(config, data, tmp_path / "killed", device=CPU)
    monkeypatch.undo()
    saved = load_checkpoint(tmp_path / "killed" / "last.pt")
    assert 0 < saved.step < killed_at
    train(config, data, tmp_path / "killed", device=CPU, resume=True)

    found, whole = (load_checkpoint(tmp_path / run / "last.pt") for run in ("killed", "whole"))
    assert found.step == whole.step
    assert found.weights.keys() == whole.weights.keys()
    assert ("carried_LBD" in whole.weights) == session_parallel
    for name, weight in whole.weights.items():
        assert torch.equal(found.weights[name], weight), name
    assert found.metrics == whole.metrics


@pytest.mark.parametrize("session_parallel", [False, True])
def test_it_learns_what_follows_in_a_cycle(session_parallel: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(17)
    starts = rng.integers(0, 12, 60)
    lengths = rng.integers(3, 8, 60)
    sessions = [
        ((start + np.arange(length)) % 12 + 1).tolist()
        for start, length in zip(starts, lengths, strict=True)
    ]
    data = write_dataset(tmp_path, train=sessions[:50], val=sessions[50:], num_items=12)
    settings = tiny_settings(
        model="gru4rec", session_parallel=session_parallel, topk_sampling=False,
        reject_in_batch_items=False, max_epochs=12, dropout_rate=0.0, metrics=("R@1",),
        val_metric="R@1", lr=0.03,
    )  # fmt: skip
    best = train(ExperimentConfig(**settings), data, tmp_path / "run", device=CPU)
    assert load_checkpoint(best).metrics["R@1"] == 1.0


def test_lanes_are_refused_for_a_model_without_a_state() -> None:
    with pytest.raises(InputError, match=r"session_parallel=True .* model=sasrec"):
        ExperimentConfig(**tiny_settings(session_parallel=True))
