"""Predicted ranks, compared with a loop that serves one event at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import pack_sessions, random_sessions
from helpers.int8 import use_int8
from helpers.networks import random_model
from torch.nn import functional as F

from tron_cli.data.batches import pack
from tron_cli.errors import RunError
from tron_cli.evaluation import predict as evaluate
from tron_cli.evaluation import ranking
from tron_cli.evaluation.metrics import parse_measures, score
from tron_cli.evaluation.predict import Predictions, predict
from tron_cli.models.sasrec import SASRec

NUM_ITEMS, LENGTH = 40, 5


def make_model(positions: str, *, seed: int = 0, **changes: Any) -> SASRec:
    settings = {"num_items": NUM_ITEMS, "sequence_length": LENGTH, "positions": positions}
    return random_model(SASRec, seed=seed, **{**settings, **changes})


@torch.no_grad()
def hidden_states(model: SASRec, inputs: Sequence[int]) -> torch.Tensor:
    """Return the hidden states of a batch of one row, [len(inputs), D]."""
    items = np.asarray(inputs, dtype=np.int32)
    batch = pack(items, np.array([0]), np.array([len(items)]), with_targets=False)
    return model(batch)


def rank_of(model: SASRec, hidden_D: torch.Tensor, target: int, seen: Sequence[int] = ()) -> int:
    """Return 1 + the number of other eligible items that score at least as high; 0 if filtered."""
    if target in seen:
        return 0
    table = model.item_table.double()
    if model.score == "cosine":
        unit = F.normalize(table[:, : model.embedding_dim], dim=1).float().double()
        table = torch.cat([unit, table[:, model.embedding_dim :]], dim=1)
    scores = (table @ hidden_D.double()).tolist()
    others = set(range(1, len(scores))) - {target} - set(seen)
    return 1 + sum(scores[item] >= scores[target] for item in others)


def one_event_at_a_time(
    model: SASRec,
    sessions: Sequence[Sequence[int]],
    *,
    protocol: str = "every-step",
    filter_rated: bool = False,
    full_sessions: bool = False,
) -> Iterator[tuple[int, int, int, int]]:
    """Return (session, event, target, rank), each from the last events of its own prefix."""
    for number, session in enumerate(sessions):
        last = len(session) - 1
        first = last if protocol == "last-item" else 1
        if protocol == "every-step" and not full_sessions:
            first = max(1, len(session) - LENGTH)
        for event in range(max(first, 1), len(session)):
            history = session[:event]
            hidden = hidden_states(model, history[-LENGTH:])[-1]
            seen = history if filter_rated else ()
            yield number, event, session[event], rank_of(model, hidden, session[event], seen)


def one_pass_over_each(
    model: SASRec, sessions: Sequence[Sequence[int]], protocol: str
) -> Iterator[tuple[int, int, int, int]]:
    """Return (session, event, target, rank) from one pass over the last LENGTH + 1 events."""
    for number, session in enumerate(sessions):
        if len(session) < 2:
            continue
        inputs = session[-LENGTH - 1 : -1]
        hidden = hidden_states(model, inputs)
        for place in range(len(inputs)):
            event = len(session) - len(inputs) + place
            if protocol == "every-step" or event == len(session) - 1:
                yield number, event, session[event], rank_of(model, hidden[place], session[event])


def table(found: Predictions) -> list[tuple[int, ...]]:
    columns = (found.session_E, found.event_E, found.target_E, found.rank_E)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.fixture
def sessions(rng: np.random.Generator) -> list[list[int]]:
    """Sessions of 0 to 14 events for a window of 5, with repeats."""
    rows = random_sessions(rng, 12, NUM_ITEMS, longest=14, shortest=0)
    return [*rows, [3, 3, 7, 3, 3, 7], [1], [], [2, 9]]


@pytest.mark.parametrize("positions", ["end", "start"])
@pytest.mark.parametrize("protocol", ["every-step", "last-item"])
@pytest.mark.parametrize("full_sessions", [False, True])
@pytest.mark.parametrize("filter_rated", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_every_rank_is_that_of_serving_one_event_at_a_time(
    positions: str,
    protocol: str,
    full_sessions: bool,
    filter_rated: bool,
    batch_size: int,
    sessions: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "_SESSIONS_AT_ONCE", 8)
    monkeypatch.setattr(ranking, "_CHUNK_ELEMENTS", 100)
    model = make_model(positions)
    found = predict(
        model,
        pack_sessions(sessions),
        protocol=protocol,
        filter_rated=filter_rated,
        full_sessions=full_sessions,
        batch_size=batch_size,
    )
    expected = one_event_at_a_time(
        model,
        sessions,
        protocol=protocol,
        filter_rated=filter_rated,
        full_sessions=full_sessions,
    )
    assert table(found) == list(expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"reuse_item_embeddings": False},
        {"output_bias": True},
        {"score": "cosine", "output_bias": True},
        {"score": "cosine", "normalize_inputs": True, "learn_score_scale": True},
    ],
)
def test_serving_with_an_output_table_or_a_bias_or_by_cosine(
    changes: dict[str, Any], sessions: list[list[int]]
) -> None:
    model = make_model("end", **changes)
    found = predict(model, pack_sessions(sessions), protocol="every-step")
    if "reuse_item_embeddings" in changes:
        assert model.item_table is not model.item_embedding.weight
    assert table(found) == list(one_event_at_a_time(model, sessions))


@pytest.mark.parametrize("positions", ["end", "start"])
@pytest.mark.parametrize("protocol", ["every-step", "last-item"])
def test_one_pass_is_a_single_pass_over_the_last_events(
    positions: str, protocol: str, sessions: list[list[int]]
) -> None:
    model = make_model(positions)
    found = predict(model, pack_sessions(sessions), protocol=protocol, one_pass=True)
    assert table(found) == list(one_pass_over_each(model, sessions, protocol))


def ranks_of_earlier_events(
    model: SASRec, sessions: list[list[int]], cut: int, one_pass: bool
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Predictions of the events before `cut`, with the later events there and with them deleted."""

    def earlier(rows: list[list[int]]) -> list[tuple[int, ...]]:
        found = predict(model, pack_sessions(rows), protocol="every-step", one_pass=one_pass)
        return [row for row in table(found) if row[1] < cut]

    return earlier(sessions), earlier([row[:cut] for row in sessions])


@pytest.mark.parametrize("positions", ["end", "start"])
def test_defect_future_leak_deleting_later_events_changes_no_earlier_rank(
    positions: str, rng: np.random.Generator
) -> None:
    """TRON counts positions from the end of a session that it knows whole."""
    sessions = random_sessions(rng, 60, NUM_ITEMS, longest=LENGTH + 1, shortest=4)
    whole, cut = ranks_of_earlier_events(make_model(positions), sessions, 3, one_pass=False)
    assert len(whole) == 120
    assert whole == cut


def test_defect_future_leak_one_pass_leaks_with_end_positions_only(
    rng: np.random.Generator,
) -> None:
    sessions = random_sessions(rng, 60, NUM_ITEMS, longest=LENGTH + 1, shortest=4)
    whole, cut = ranks_of_earlier_events(make_model("end"), sessions, 3, one_pass=True)
    assert [row[:3] for row in whole] == [row[:3] for row in cut]
    assert sum(a != b for a, b in zip(whole, cut, strict=True)) > 30
    whole, cut = ranks_of_earlier_events(make_model("start"), sessions, 3, one_pass=True)
    assert whole == cut


def test_with_start_positions_one_pass_and_serving_agree_within_the_window(
    rng: np.random.Generator,
) -> None:
    sessions = pack_sessions(random_sessions(rng, 40, NUM_ITEMS, longest=LENGTH + 1))
    model = make_model("start")
    served = predict(model, sessions, protocol="every-step")
    passed = predict(model, sessions, protocol="every-step", one_pass=True)
    assert table(served) == table(passed)


def test_defect_dropped_sessions_every_session_of_an_incomplete_batch_counts(
    rng: np.random.Generator,
) -> None:
    """TRON's drop_last=True loses the sessions of the last, incomplete batch."""
    sessions = random_sessions(rng, 129, NUM_ITEMS)
    found = predict(
        make_model("end"), pack_sessions(sessions), protocol="last-item", batch_size=128
    )
    assert found.session_E.tolist() == list(range(129))


def test_defect_mean_of_batch_means_the_figure_is_a_mean_over_events(
    rng: np.random.Generator,
) -> None:
    """Batches of different sizes weigh the same in TRON's figure."""
    sessions = random_sessions(rng, 33, NUM_ITEMS)
    measures = parse_measures("R@5 RR@10")
    model = make_model("end")
    expected = [rank for *_, rank in one_event_at_a_time(model, sessions)]
    recall = sum(rank <= 5 for rank in expected) / len(expected)
    reciprocal = sum(1 / rank for rank in expected if rank <= 10) / len(expected)
    for batch_size in (1, 7, 32, 512):
        found = predict(
            model, pack_sessions(sessions), protocol="every-step", batch_size=batch_size
        )
        figures = score(found.rank_E, found.session_E, measures)
        assert figures["R@5"].value == pytest.approx(recall, abs=1e-12)
        assert figures["RR@10"].value == pytest.approx(reciprocal, abs=1e-12)


def test_defect_half_precision_ranks_are_the_same_for_any_batch_and_thread_count(
    rng: np.random.Generator,
) -> None:
    """Ranking is float32 also within autocast, where half precision would make ties."""
    model = make_model("end", num_items=3000, embedding_dim=64)
    with torch.no_grad():  # scores close to each other: half precision could not tell them apart
        model.item_table.copy_(1 + 1e-3 * torch.randn(3001, 64))
    sessions = pack_sessions(random_sessions(rng, 40, 3000))
    expected = table(predict(model, sessions, protocol="every-step"))
    assert len({row[3] for row in expected}) > 50
    threads = torch.get_num_threads()
    try:
        for batch_size, count in ((1, 1), (512, 2), (64, 1)):
            torch.set_num_threads(count)
            found = predict(model, sessions, protocol="every-step", batch_size=batch_size)
            assert table(found) == expected
    finally:
        torch.set_num_threads(threads)
    with torch.autocast("cpu", torch.bfloat16):
        assert table(predict(model, sessions, protocol="every-step")) == expected


def test_defect_filter_of_seen_items_repeats_are_reachable_unless_filtered() -> None:
    """Filtering is over the whole history, not the window; a filtered target is a miss."""
    model = make_model("end")
    repeat = [[9, 1, 2, 3, 4, 5, 6, 9]]  # 9 lies before the window of 5
    plain = predict(model, pack_sessions(repeat), protocol="last-item")
    assert plain.rank_E[0] >= 1
    filtered = predict(
        model, pack_sessions(repeat), protocol="last-item", filter_rated=True, top_items=NUM_ITEMS
    )
    assert filtered.rank_E.tolist() == [0]
    assert filtered.top_EK is not None
    assert set(filtered.top_EK[0].tolist()) == set(range(NUM_ITEMS + 1)) - {1, 2, 3, 4, 5, 6, 9}


@pytest.mark.parametrize("filter_rated", [False, True])
def test_lists_hold_the_target_at_its_rank(filter_rated: bool, sessions: list[list[int]]) -> None:
    found = predict(
        make_model("end"),
        pack_sessions(sessions),
        protocol="every-step",
        filter_rated=filter_rated,
        top_items=12,
        batch_size=9,
    )
    assert found.top_EK is not None
    for (session, event, target, rank), top in zip(table(found), found.top_EK, strict=True):
        listed = top.tolist()
        assert len(set(listed)) == 12
        assert 0 not in listed
        assert (target in listed) == (1 <= rank <= 12)
        if target in listed:
            assert listed.index(target) == rank - 1
        if filter_rated:
            assert not set(listed) & set(sessions[session][:event])


@pytest.mark.parametrize("rows", [[], [[1]], [[], [2]]])
def test_sessions_without_anything_to_predict_give_empty_predictions(rows: list[list[int]]) -> None:
    found = predict(make_model("end"), pack_sessions(rows), protocol="every-step", top_items=3)
    assert table(found) == []
    assert found.top_EK is not None
    assert found.top_EK.shape == (0, 3)


@pytest.mark.parametrize(("part", "place"), [("query", 0), ("key", 8), ("value", 16)])
def test_a_model_that_is_not_finite_is_an_error(part: str, place: int) -> None:
    """Torch's fused attention turns NaN scores of a query or key into zeros."""
    model = make_model("end")
    with torch.no_grad():
        model.blocks[0].query_key_value.bias[place] = torch.nan
    with pytest.raises(RunError, match="NaN"):
        predict(model, pack_sessions([[1, 2, 3]]), protocol="every-step")


def test_predicting_leaves_the_model_in_its_mode() -> None:
    model = make_model("end").train()
    found = predict(model, pack_sessions([[1, 2, 3]]), protocol="every-step")
    assert model.training  # while dropout was off:
    assert table(found) == list(one_event_at_a_time(model.eval(), [[1, 2, 3]]))


@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("filter_rated", [False, True])
def test_ranks_up_to_a_limit_and_lists_do_not_depend_on_int8_products(
    filter_rated: bool, score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("end", score=score)
    sessions = pack_sessions(random_sessions(np.random.default_rng(5), 60, NUM_ITEMS))
    settings: dict[str, Any] = {"protocol": "every-step", "filter_rated": filter_rated}
    expected = predict(model, sessions, top_items=4, **settings)
    use_int8(monkeypatch)
    found = predict(model, sessions, top_items=4, rank_limit=4, **settings)
    assert np.minimum(found.rank_E, 5).tolist() == np.minimum(expected.rank_E, 5).tolist()
    assert found.top_EK.tolist() == expected.top_EK.tolist()
    assert found.rank_E.tolist() != expected.rank_E.tolist()  # int8 was used


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("protocol", ["every-step", "last-item"])
def test_shares_of_several_processes_are_all_events_with_the_same_ranks(
    protocol: str, processes: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Blocks of 30 sessions, whose events are ranked some ten at a time."""
    monkeypatch.setattr(evaluate, "_SESSIONS_AT_ONCE", 30)
    monkeypatch.setattr(evaluate, "_EVENTS_AT_ONCE", 10)
    model = random_model(SASRec, positions="end")
    sessions = pack_sessions(random_sessions(rng, 70, 40))
    options: dict[str, Any] = {"protocol": protocol, "batch_size": 4, "rank_limit": 5}
    whole = predict(model, sessions, **options)
    parts = [
        predict(model, sessions, share=(rank, processes), **options) for rank in range(processes)
    ]
    assert min(len(part.rank_E) for part in parts) > len(whole.rank_E) / processes / 2
    session_E, event_E, rank_E = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("session_E", "event_E", "rank_E")
    )
    order = np.lexsort((event_E, session_E))
    np.testing.assert_array_equal(session_E[order], whole.session_E)
    np.testing.assert_array_equal(event_E[order], whole.event_E)
    np.testing.assert_array_equal(rank_E[order], whole.rank_E)
