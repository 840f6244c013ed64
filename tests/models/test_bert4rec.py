"""BERT4Rec: what cloze batches hide, what the network sees of it, and how it predicts.

The network is compared with torch's own transformer, its predictions with a loop that puts a mask
behind one history at a time.

Shapes: N packed events, P of them with a target, B rows, W their window, D width.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import pack_sessions, random_sessions, write_dataset
from helpers.networks import make_config
from helpers.runs import (
    check_same_run,
    die_in_step,
    in_process,
    interrupt_at,
    resume,
    start,
    start_or_resume,
    write_config,
)
from helpers.steps import position_loss
from torch import nn

from tron_cli.data import histories as events
from tron_cli.data.batches import Batch, cloze_batch, pack
from tron_cli.evaluation.predict import predict
from tron_cli.models.base import build_model
from tron_cli.models.bert4rec import BERT4Rec
from tron_cli.sampling.negatives import Distribution, Negatives, sample_negatives
from tron_cli.training.loop import InterruptedRunError
from tron_cli.training.step import training_loss

ITEMS, LENGTH = 40, 5
MASK = ITEMS + 1
CPU = torch.device("cpu")
STYLES = ("eventwise", "sessionwise", "batchwise")
BLOCKS: dict[str, dict[str, Any]] = {
    "pre-norm": {"feed_forward_dim": 12},
    "post-norm": {"activation": "gelu"},
}


def cloze(
    rows: Sequence[Sequence[int]],
    *,
    length: int = LENGTH,
    probability: float = 0.3,
    num_items: int = ITEMS,
    seed: int = 0,
) -> Batch:
    """All sessions, masked."""
    return cloze_batch(
        pack_sessions(rows),
        np.arange(len(rows)),
        length,
        num_items=num_items,
        mask_probability=probability,
        random=np.random.default_rng(seed),
    )


def make_model(positions: str = "end", block: str = "pre-norm", **changes: Any) -> BERT4Rec:
    """An untrained model with weights large enough that order and positions matter."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "num_items": ITEMS,
        "sequence_length": LENGTH,
        "embedding_dim": 8,
        "num_blocks": 2,
        "num_heads": 2,
        "dropout_rate": 0.5,
        "positions": positions,
        "reuse_item_embeddings": True,
        "output_bias": False,
        "block": block,
        **BLOCKS[block],
        **changes,
    }
    model = BERT4Rec(**settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        model.item_table[7] = model.item_table[3]  # ties
    return model.eval()


# ---- cloze batches --------------------------------------------------------------------------


def test_a_hidden_item_is_nowhere_in_what_the_network_sees(rng: np.random.Generator) -> None:
    """Sessions that differ in it alone give the same inputs and the same hidden states.

    And a target that is not hidden is seen in its own place only.
    """
    rows = random_sessions(rng, 60, ITEMS, longest=9)
    model = make_model()
    targets = hidden_ones = 0
    for seed in range(40):
        batch = cloze(rows, seed=seed)
        # A row of the batch and a place in it, of the last LENGTH + 1 events of a session.
        order = sorted(range(len(rows)), key=lambda row: min(len(rows[row]), LENGTH + 1))
        changed = [list(row) for row in rows]
        for event in batch.predicting_P.tolist():
            row = changed[order[batch.rows_N[event]]]
            place = int(batch.places_N[event]) + len(row) - min(len(row), LENGTH + 1)
            row[place] = row[place] % ITEMS + 1
        other = cloze(changed, seed=seed)
        assert torch.equal(other.predicting_P, batch.predicting_P)
        assert torch.equal(other.targets_N, batch.targets_N % ITEMS + 1)
        kept = batch.inputs_N[batch.predicting_P] != other.inputs_N[batch.predicting_P]
        seen = batch.predicting_P[kept]
        expected = batch.inputs_N.clone()
        expected[seen] = expected[seen] % ITEMS + 1
        assert torch.equal(other.inputs_N, expected)
        assert torch.equal(batch.inputs_N[seen], batch.targets_N[kept])

        # Now the hidden ones alone.
        for event in seen.tolist():
            row = changed[order[batch.rows_N[event]]]
            place = int(batch.places_N[event]) + len(row) - min(len(row), LENGTH + 1)
            row[place] = (row[place] - 2) % ITEMS + 1
        other = cloze(changed, seed=seed)
        assert torch.equal(other.inputs_N, batch.inputs_N)
        assert torch.equal(other.targets_N != batch.targets_N, ~kept)
        with torch.no_grad():
            assert torch.equal(model(other), model(batch))
        targets += len(kept)
        hidden_ones += int((~kept).sum())
    # Sessions without a target have one hidden, so that somewhat more than 90 % are.
    assert 0.9 < hidden_ones / targets < 0.95


@pytest.mark.parametrize("probability", [0.15, 0.6, 1.0])
def test_shares_of_what_targets_are_shown_as(probability: float) -> None:
    """Sessions are of 1s or of 2s, which only kept events tell apart."""
    num_items, sessions, length = 50, 2500, 40
    ones, twos = (
        cloze(
            np.full((sessions, length), item).tolist(),
            length=50,
            probability=probability,
            num_items=num_items,
        )
        for item in (1, 2)
    )
    total = sessions * length
    targets = len(ones.predicting_P)
    shown_P = ones.inputs_N[ones.predicting_P]
    is_kept_P = shown_P != twos.inputs_N[twos.predicting_P]
    is_mask_P = shown_P == num_items + 1
    random_items = shown_P[~is_kept_P & ~is_mask_P]
    for found, count, share in (
        (targets, total, probability),
        (int(is_mask_P.sum()), targets, 0.8),
        (len(random_items), targets, 0.1),
        (int(is_kept_P.sum()), targets, 0.1),
    ):
        assert abs(found - count * share) <= 5 * math.sqrt(count * share * (1 - share))
    # Items 1..I alike: Pearson's statistic has mean I - 1 and variance 2 (I - 1).
    assert (random_items.min(), random_items.max()) == (1, num_items)
    expected = len(random_items) / num_items
    statistic = float(((random_items.bincount()[1:] - expected) ** 2 / expected).sum())
    assert abs(statistic - (num_items - 1)) <= 5 * math.sqrt(2 * (num_items - 1))
    # Targets are as frequent in each place of a session.
    at_place = ones.places_N[ones.predicting_P].bincount(minlength=length)
    deviation = 5 * math.sqrt(sessions * probability * (1 - probability))
    assert (at_place - sessions * probability).abs().max() <= deviation


def test_a_session_without_a_drawn_target_has_its_last_event_masked(
    rng: np.random.Generator,
) -> None:
    rows = random_sessions(rng, 300, ITEMS)
    batch = cloze(rows, probability=1e-9)  # nothing is drawn
    last_B = batch.lengths_B.cumsum(0) - 1
    assert torch.equal(batch.predicting_P, last_B)
    assert (batch.inputs_N[last_B] == MASK).all()
    # And not where something was: of pairs, both are targets with p^2, and the last is one with p
    # or where neither was drawn.
    pairs = rng.integers(1, ITEMS + 1, (20_000, 2)).tolist()
    batch = cloze(pairs, probability=0.3)
    targets_B = batch.rows_N[batch.predicting_P].bincount(minlength=len(pairs))
    assert targets_B.min() == 1
    last_ones = int((batch.places_N[batch.predicting_P] == 1).sum())
    for found, share in ((int((targets_B == 2).sum()), 0.3**2), (last_ones, 0.3 + 0.7**2)):
        assert abs(found - 20_000 * share) <= 5 * math.sqrt(20_000 * share * (1 - share))


def test_the_window_is_the_last_events_with_one_more_for_the_target(
    rng: np.random.Generator,
) -> None:
    """The window holds a history of sequence_length events and the mask, as in prediction."""
    rows = random_sessions(rng, 50, ITEMS, longest=14)
    chosen = rng.integers(0, len(rows), 80)
    batch = cloze_batch(
        pack_sessions(rows), chosen, LENGTH, num_items=ITEMS, mask_probability=0.5, random=rng
    )
    inputs_N = batch.inputs_N.clone()
    inputs_N[batch.predicting_P] = batch.targets_N
    found = [row.tolist() for row in inputs_N.split(batch.lengths_B.tolist())]
    assert found == sorted((rows[row][-(LENGTH + 1) :] for row in chosen), key=len)
    assert make_model().window == LENGTH + 1


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("rejects", [False, True])
@pytest.mark.parametrize("uniform", [False, True])
def test_a_mask_is_never_a_negative(style: str, rejects: bool, uniform: bool) -> None:
    """Nor does it reject anything; kept in-batch negatives are as many as there are candidates."""
    rng = np.random.default_rng(1)
    distribution = (
        Distribution(ITEMS)
        if uniform
        else Distribution.of(np.arange(1.0, ITEMS + 1), expected_of=None, device=CPU)
    )
    for seed, (rows, many) in enumerate(itertools.product((2, 12), (3, 500))):
        batch = cloze(random_sessions(rng, rows, ITEMS), seed=seed, probability=0.6)
        torch.manual_seed(seed)
        drawn = sample_negatives(
            batch,
            distribution,
            num_uniform=300,
            num_batch=many,
            sampling_style=style,
            reject_uniform_session_items=rejects,
            reject_in_batch_items=rejects,
        )
        shape = {"eventwise": (len(batch.targets_N), 300), "sessionwise": (rows, 300)}
        assert drawn.uniform.shape == shape.get(style, (300,))
        assert drawn.uniform.min() >= 1
        assert drawn.uniform.max() <= ITEMS
        keep_BM = drawn.in_batch_keep_BM
        for row in range(rows):
            own_N = batch.rows_N == row
            if rejects and style != "batchwise":
                sets = {"eventwise": batch.target_rows_P == row, "sessionwise": row}
                found = set(drawn.uniform[sets[style]].flatten().tolist())
                assert not found & set(batch.inputs_N[own_N].tolist())
            candidate_N = batch.inputs_N != MASK
            if rejects:
                candidate_N &= ~own_N
            index_M = drawn.in_batch_BM[row]
            index_M = index_M if keep_BM is None else index_M[keep_BM[row]]
            assert candidate_N[index_M].all()
            assert len(index_M.unique()) == len(index_M) == min(many, int(candidate_N.sum()))


# ---- the network ----------------------------------------------------------------------------


def torch_encoder(model: BERT4Rec, block: str) -> nn.TransformerEncoder:
    """torch's encoder with the model's weights, in float64 and without dropout."""
    pre = block == "pre-norm"
    inner = model.blocks[0].feed_forward[0].out_features
    layer = nn.TransformerEncoderLayer(
        model.embedding_dim, 2, inner, dropout=0.0, activation="relu" if pre else "gelu",
        batch_first=True, norm_first=pre, layer_norm_eps=1e-5 if pre else 1e-12,
    )  # fmt: skip
    norm = nn.LayerNorm(model.embedding_dim) if pre else None
    encoder = nn.TransformerEncoder(layer, 2, norm=norm, enable_nested_tensor=False).double()
    names = {
        "self_attn.in_proj_": "query_key_value.",
        "self_attn.out_proj": "attention_output",
        "linear1": "feed_forward.0",
        "linear2": "feed_forward.3",
        "norm1": "attention_norm",
        "norm2": "feed_forward_norm",
        "layers.": "blocks.",
    }
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            for theirs, our in names.items():
                name = name.replace(theirs, our)
            parameter.copy_(ours[name])
    return encoder


@pytest.mark.parametrize("positions", ["end", "start", "none"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("key_padding_mask", [True, False])
def test_hidden_states_are_those_of_torchs_encoder_in_both_directions(
    positions: str, block: str, key_padding_mask: bool, rng: np.random.Generator
) -> None:
    """Without key_padding_mask padding is attended to, zero at the input of every layer."""
    model = make_model(positions, block, key_padding_mask=key_padding_mask).double()
    batch = cloze(random_sessions(rng, 12, ITEMS))
    table_VD = model.item_embedding.weight.detach().clone().requires_grad_()
    window = LENGTH + 1
    missing_B1 = window - batch.lengths_B[:, None]
    # Padding in front with positions="end", else behind.
    if positions == "end":
        is_real_BW = torch.arange(window) >= missing_B1
    else:
        is_real_BW = torch.arange(window) < batch.lengths_B[:, None]
    inputs_BW = torch.zeros(is_real_BW.shape, dtype=torch.int64)
    inputs_BW[is_real_BW] = batch.inputs_N
    x_BWD = table_VD[inputs_BW]
    if block == "pre-norm":
        x_BWD = x_BWD * math.sqrt(8)
    if positions != "none":
        x_BWD = x_BWD + model.position_embedding.weight
    if block == "post-norm":
        normed = model.input_norm
        x_BWD = nn.functional.layer_norm(x_BWD, (8,), normed.weight, normed.bias, 1e-12)
    encoder = torch_encoder(model, block)
    final_norm = encoder.norm or nn.Identity()
    final_norm.load_state_dict(model.norm.state_dict())
    for layer in encoder.layers:
        hidden = ~is_real_BW if key_padding_mask else None
        x_BWD = layer(x_BWD * is_real_BW[:, :, None], src_key_padding_mask=hidden)
    expected_ND = final_norm(x_BWD)[is_real_BW]
    found_ND = model(batch)
    torch.testing.assert_close(found_ND, expected_ND, rtol=0, atol=1e-10)
    weights_ND = torch.randn_like(expected_ND)
    (found,) = torch.autograd.grad((found_ND * weights_ND).sum(), model.item_embedding.weight)
    (expected,) = torch.autograd.grad((expected_ND * weights_ND).sum(), table_VD)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("reuse", [True, False])
def test_the_head_is_the_originals(block: str, reuse: bool, rng: np.random.Generator) -> None:
    """FeiSun/BERT4Rec's get_masked_lm_output on the states of a model without a head."""
    plain = make_model(block=block, output_bias=True, reuse_item_embeddings=reuse).double()
    changes = {"output_bias": True, "reuse_item_embeddings": reuse, "prediction_head": True}
    model = make_model(block=block, **changes).double()
    (_, dense, _, norm) = (each for each in model.norm.modules() if not list(each.children()))
    assert isinstance(dense, nn.Linear)
    assert isinstance(norm, nn.LayerNorm)
    of_both = {name: value for name, value in model.state_dict().items() if "norm." not in name[:5]}
    plain.load_state_dict({**plain.state_dict(), **of_both})
    plain.norm.load_state_dict(model.norm[0].state_dict())
    batch = cloze(random_sessions(rng, 12, ITEMS))
    states_ND = plain(batch)[:, :8].detach()
    # gelu(x W + b) by the error function, normalized with an epsilon of 1e-12; then scores of the
    # items with a bias each.
    x_ND = states_ND @ dense.weight.T + dense.bias
    x_ND = x_ND * 0.5 * (1.0 + torch.erf(x_ND / math.sqrt(2.0)))
    centred_ND = x_ND - x_ND.mean(dim=1, keepdim=True)
    deviation_N1 = (centred_ND.square().mean(dim=1, keepdim=True) + 1e-12).sqrt()
    x_ND = centred_ND / deviation_N1 * norm.weight + norm.bias
    expected_NV = x_ND @ model.item_table[:, :8].T + model.item_table[:, 8]
    found_NV = model(batch) @ model.item_table.T
    torch.testing.assert_close(found_NV, expected_NV, rtol=0, atol=1e-10)


@pytest.mark.parametrize("initialization", ["default", "normal"])
def test_a_head_begins_as_in_the_original(initialization: str) -> None:
    config = make_config(
        model="bert4rec", prediction_head=True, output_bias=True, initialization=initialization,
        embedding_dim=64, num_heads=1,
    )  # fmt: skip
    model = build_model(config, 500)
    assert isinstance(model, BERT4Rec)
    assert not model.item_table[:, 64].any()
    assert model.item_table[:, :64].all(dim=1).all()
    dense = model.norm[1][0]
    if initialization == "normal":
        assert float(dense.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert not dense.bias.any()
    with torch.device("meta"):  # as checkpoints are loaded
        assert build_model(config, 500).state_dict().keys() == model.state_dict().keys()


def test_without_a_head_nothing_is_named_otherwise_than_before() -> None:
    """Checkpoints from before there was one have no such setting, and load."""
    names = set(make_model().state_dict())
    assert {name for name in names if name.startswith("norm")} == {"norm.weight", "norm.bias"}
    assert not [name for name in make_model(block="post-norm").state_dict() if name[:4] == "norm"]
    head = make_model(block="post-norm", prediction_head=True)
    assert len(head.state_dict()) == len(make_model(block="post-norm").state_dict()) + 4


def test_one_row_does_not_serve_all_and_steps_are_not_recorded() -> None:
    for positions in ("end", "start", "none"):
        model = make_model(positions)
        assert (model.one_row_serves_all, model.fixed_shapes) == (False, False)
        assert model.mask_item == MASK
        assert len(model.item_table) == len(model.item_embedding.weight) == ITEMS + 2


# ---- prediction -----------------------------------------------------------------------------


class Served:
    """Scores of items 0..I at a mask behind a history's last events, in a batch of its own."""

    def __init__(self, model: BERT4Rec) -> None:
        self.model = model
        self.known: dict[tuple[int, ...], list[float]] = {}

    @torch.no_grad()
    def scores(self, history: Sequence[int]) -> list[float]:
        row = (*history[-LENGTH:], MASK)
        if row not in self.known:
            items = np.array(row, dtype=np.int32)
            batch = pack(items, np.array([0]), np.array([len(row)]), with_targets=False)
            table = self.model.item_table[: ITEMS + 1].double()
            self.known[row] = (table @ self.model(batch)[-1].double()).tolist()
        return self.known[row]


def one_history_at_a_time(
    served: Served, rows: list[list[int]], protocol: str, filter_rated: bool, full: bool
) -> Iterator[tuple[int, int, int, int, list[int]]]:
    """Session, event, target, rank and list of each predicted event."""
    for number, row in enumerate(rows):
        first = 1 if full else max(1, len(row) - LENGTH)
        if protocol == "last-item":
            first = max(1, len(row) - 1)
        for event in range(first, len(row)):
            scores = served.scores(row[:event])
            seen = set(row[:event]) if filter_rated else set()
            target = row[event]
            # Of equal ones the target comes last.
            ranked = sorted(
                set(range(1, ITEMS + 1)) - seen,
                key=lambda item, s=scores, t=target: (-s[item], item == t, item),
            )
            rank = 0 if target in seen else ranked.index(target) + 1
            yield number, event, target, rank, ranked


def check_predictions(served: Served, rows: list[list[int]], **options: Any) -> None:
    found = predict(served.model, pack_sessions(rows), top_items=6, **options)
    expected = list(
        one_history_at_a_time(
            served,
            rows,
            options["protocol"],
            options.get("filter_rated", False),
            options.get("full_sessions", False),
        )
    )
    columns = (found.session_E, found.event_E, found.target_E, found.rank_E)
    assert list(zip(*(each.tolist() for each in columns), strict=True)) == [
        row[:4] for row in expected
    ]
    for top, (*_, target, _, ranked), rank in zip(
        found.top_EK.tolist(), expected, found.rank_E.tolist(), strict=True
    ):
        assert set(top) <= set(range(1, ITEMS + 1))
        # Items 3 and 7 tie, in whatever order; the target has its rank.
        same = {3: 3, 7: 3}
        assert [same.get(i, i) for i in top] == [same.get(i, i) for i in ranked[:6]]
        assert not 0 < rank <= 6 or top[rank - 1] == target


@pytest.fixture
def rows(rng: np.random.Generator) -> list[list[int]]:
    """Lengths 0 to 14 around a window of 5, with repeats."""
    found = random_sessions(rng, 20, ITEMS, longest=14, shortest=0)
    return [*found, [3, 3, 7, 3, 3, 7], [1], [], [2, 9]]


@pytest.mark.parametrize("positions", ["end", "start", "none"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("protocol", ["every-step", "last-item"])
def test_predictions_are_those_of_a_mask_behind_one_history_at_a_time(
    positions: str, block: str, protocol: str, rows: list[list[int]]
) -> None:
    served = Served(make_model(positions, block))
    for filter_rated, full, batch_size in ((False, False, 512), (True, True, 7)):
        check_predictions(
            served, rows, protocol=protocol, filter_rated=filter_rated, full_sessions=full,
            batch_size=batch_size,
        )  # fmt: skip


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_predictions_with_an_output_table_and_a_bias(
    reuse: bool, bias: bool, rows: list[list[int]]
) -> None:
    model = make_model(reuse_item_embeddings=reuse, output_bias=bias)
    check_predictions(Served(model), rows, protocol="every-step")


def test_rows_that_are_no_item_count_for_nothing(rows: list[list[int]]) -> None:
    """However they score: the mask's row of the output table, and row 0."""
    model = make_model(reuse_item_embeddings=False)
    sessions = pack_sessions(rows)
    before = predict(model, sessions, protocol="every-step", top_items=ITEMS)
    for value in (1e6, -1e6):
        with torch.no_grad():
            model.item_table[[0, MASK]] = value
        after = predict(model, sessions, protocol="every-step", top_items=ITEMS)
        assert np.array_equal(after.rank_E, before.rank_E)
        assert np.array_equal(after.top_EK, before.top_EK)
    # In a shared table the mask's row is an input too.
    model = make_model()
    with torch.no_grad():
        model.item_table[MASK] *= 1000
    check_predictions(Served(model), rows, protocol="every-step")


@pytest.mark.parametrize("protocol", ["every-step", "last-item"])
@pytest.mark.parametrize("full", [False, True])
def test_the_bar_ends_where_it_said(
    protocol: str, full: bool, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Any] = []

    class Bar:
        def __init__(self, *, total: int, **_: Any) -> None:
            self.total, self.n = total, 0
            bars.append(self)

        def update(self, count: int) -> None:
            self.n += count

        def close(self) -> None:
            pass

    monkeypatch.setattr(events, "tqdm", Bar)
    found = predict(make_model(), pack_sessions(rows), protocol=protocol, full_sessions=full)
    (bar,) = bars
    assert bar.total == bar.n == len(found.rank_E) > 0


# ---- training -------------------------------------------------------------------------------


def by_hand(model: BERT4Rec, batch: Batch, negatives: Negatives, config: Any) -> torch.Tensor:
    """The loss, target by target, with whole tables."""
    hidden_ND = model(batch)
    table, inputs, total = model.item_table, batch.inputs_N.tolist(), 0.0
    for number, (event, target) in enumerate(
        zip(batch.predicting_P.tolist(), batch.targets_N.tolist(), strict=True)
    ):
        row = int(batch.rows_N[event])
        index = {"eventwise": number, "sessionwise": row, "batchwise": None}[config.sampling_style]
        drawn = negatives.uniform if index is None else negatives.uniform[index]
        keep = negatives.uniform_keep
        items = drawn.tolist() if keep is None or keep[index or 0] else []
        keep_BM = negatives.in_batch_keep_BM
        items += [
            inputs[other]
            for place, other in enumerate(negatives.in_batch_BM[row].tolist())
            if keep_BM is None or keep_BM[row, place]
        ]
        items = [item for item in items if item != target]
        logits = table[torch.tensor(items, dtype=torch.int64)] @ hidden_ND[event]
        if config.topk_sampling:
            logits = logits.topk(min(config.topk_sampling_k, len(items))).values
        total = total + position_loss(table[target] @ hidden_ND[event], logits, config)
    return total / len(batch.targets_N)


@pytest.mark.parametrize("num_items", [ITEMS, 2000])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("reuse", [True, False])
def test_loss_and_gradients_of_looked_up_rows_are_those_of_whole_tables(
    num_items: int, style: str, reuse: bool
) -> None:
    """Where some events have a target and the others have none."""
    rng = np.random.default_rng(num_items)
    rows = random_sessions(rng, 8, num_items)
    for optimizer, loss, (topk, rejects) in zip(
        ("row_adam", "adam", "adagrad", "row_adam"),
        ("ssm", "bce", "bpr-max", "ssm"),
        itertools.product((False, True), repeat=2),
        strict=True,
    ):
        config = make_config(
            model="bert4rec", optimizer=optimizer, loss=loss, sampling_style=style,
            reuse_item_embeddings=reuse, topk_sampling=topk, topk_sampling_k=4,
            output_bias=topk, bpr_penalty=0.2, num_batch_negatives=3,
            reject_in_batch_items=rejects, reject_uniform_session_items=rejects,
        )  # fmt: skip
        torch.manual_seed(5)
        model = build_model(config, num_items).double()
        batch = cloze(rows, num_items=num_items, seed=len(loss))
        assert 0 < len(batch.targets_N) < len(batch.inputs_N)
        distribution = Distribution(num_items)
        torch.manual_seed(11)
        negatives = sample_negatives(
            batch,
            distribution,
            num_uniform=config.num_uniform_negatives,
            num_batch=config.num_batch_negatives,
            sampling_style=style,
            reject_uniform_session_items=rejects,
            reject_in_batch_items=rejects,
        )
        expected = by_hand(model, batch, negatives, config)
        names, weights = zip(*model.named_parameters(), strict=True)
        theirs = torch.autograd.grad(expected, weights)
        torch.manual_seed(11)
        found = training_loss(model, batch, config, distribution)
        found.backward()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        for name, parameter, gradient in zip(names, weights, theirs, strict=True):
            torch.testing.assert_close(
                parameter.grad.to_dense(), gradient, rtol=0, atol=1e-9,
                msg=lambda text, n=name: f"{n}: {text}",
            )  # fmt: skip


@pytest.mark.parametrize("reuse", [True, False])
def test_cross_entropy_is_among_the_items(reuse: bool, rng: np.random.Generator) -> None:
    """Not with the mask, whose row learns as an input only."""
    config = make_config(
        model="bert4rec", loss="ce", num_uniform_negatives=0, num_batch_negatives=0,
        reuse_item_embeddings=reuse,
    )  # fmt: skip
    torch.manual_seed(5)
    model = build_model(config, ITEMS).double()
    batch = cloze(random_sessions(rng, 8, ITEMS))
    logits_PI = model(batch)[batch.predicting_P] @ model.item_table[1 : ITEMS + 1].T
    expected = nn.functional.cross_entropy(logits_PI, batch.targets_N - 1)
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    found = training_loss(model, batch, config, Distribution(ITEMS))
    found.backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    for parameter, gradient in zip(model.parameters(), theirs, strict=True):
        torch.testing.assert_close(parameter.grad.to_dense(), gradient, rtol=0, atol=1e-9)
    assert bool(model.item_table.grad[MASK].any()) == reuse


RUN = {"model": "bert4rec", "mask_probability": 0.3, "optimizer": "row_adam"}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    rng = np.random.default_rng(5)
    splits = {name: random_sessions(rng, 45, 30) for name in ("train", "val", "test")}
    write_dataset(tmp_path / "data", **splits, num_items=30)
    return tmp_path / "data"


@pytest.mark.parametrize("step", [1, 7, 17])
def test_stopped_and_resumed_ends_the_same(
    step: int, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, save_every=0, **RUN)
    start(config, data_dir, tmp_path / "runs", "whole")
    interrupt_at(monkeypatch, step, 15)
    with pytest.raises(InterruptedRunError):
        start(config, data_dir, tmp_path / "runs", "stopped")
    monkeypatch.undo()
    resume(data_dir, tmp_path / "runs" / "stopped")
    check_same_run(tmp_path / "runs" / "stopped", tmp_path / "runs" / "whole", same_log=False)


@pytest.mark.slow
def test_killed_and_resumed_ends_the_same(data_dir: Path, tmp_path: Path) -> None:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs processes that can be killed")
    context = multiprocessing.get_context("forkserver")
    config = write_config(tmp_path, **RUN)  # saved after steps 4, 6, 8, 12, 16 and 18
    start(config, data_dir, tmp_path / "runs", "whole")
    run_dir = tmp_path / "runs" / "killed"
    assert in_process(context, die_in_step, 11, config, data_dir, run_dir) == -9
    start_or_resume(config, data_dir, run_dir)
    check_same_run(run_dir, tmp_path / "runs" / "whole")


# ---- the command line -----------------------------------------------------------------------


def test_one_pass_is_refused(
    command: Callable[..., tuple[int, str, str]], data_dir: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, **{**RUN, "max_epochs": 1})
    place = ["--data-dir", data_dir, "--device", "cpu"]
    code, out, _ = command("train", "--config", config, "--output-dir", tmp_path / "runs", *place)
    assert code == 0
    best = out.split()[-1]
    lists = tmp_path / "run.txt"
    code, out, err = command("evaluate", best, *place, "--one-pass", "--run", lists)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert "--one-pass does not apply to model=bert4rec" in err
    assert not lists.exists()
    assert command("compare", best, best, *place, "--one-pass")[0] == 2  # it has no such option
    code, out, _ = command("evaluate", best, *place, "--full-sessions", "--json")
    assert code == 0
    assert "each event from its own history" in out
