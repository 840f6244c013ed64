"""Recommendations against `tron evaluate`'s lists, and against a plain loop over all items."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import random_checkpoint
from helpers.datasets import random_sessions, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tron_cli.data.batches import pack
from tron_cli.data.dataset import Dataset
from tron_cli.data.histories import Predictions
from tron_cli.errors import InputError, RunError
from tron_cli.evaluation.predict import predict
from tron_cli.registry import BASELINES, MODELS
from tron_cli.serving.recommender import Recommender

NUM_ITEMS, FIRST_ID = 40, 1001
METHODS = [*MODELS, *BASELINES]
# Settings that change what a history is, or what scores it.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((method, {}) for method in METHODS),
    ("sasrec", {"reuse_item_embeddings": False, "output_bias": True}),
    ("sasrec", {"positions": "start"}),
    ("gru4rec", {"session_parallel": True}),
    ("sasrec", {"score": "cosine", "normalize_inputs": True}),
    ("bert4rec", {"score": "cosine", "learn_score_scale": True, "output_bias": True}),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    rng = np.random.default_rng(5)
    return write_dataset(
        tmp_path_factory.mktemp("data"),
        train=random_sessions(rng, 60, NUM_ITEMS - 3),  # which never shows the last three
        test=random_sessions(rng, 25, NUM_ITEMS, longest=12),
        item_ids=np.arange(FIRST_ID, FIRST_ID + NUM_ITEMS),
    )


def recommender(data: Dataset, folder: Path, model: str, **changes: Any) -> Recommender:
    file = folder / "model.pt"
    random_checkpoint(data, file, with_ties=True, model=model, **changes)
    return Recommender.load(file)


def prefixes(data: Dataset, found: Predictions) -> list[list[int]]:
    """The original ids before each predicted event."""
    sessions, ids = data.split("test"), data.item_ids
    return [
        ids[sessions[session][:event] - 1].tolist()
        for session, event in zip(found.session_E, found.event_E, strict=True)
    ]


@pytest.mark.parametrize("filter_rated", [False, True])
@pytest.mark.parametrize(("model", "changes"), VARIANTS)
def test_the_items_are_those_that_evaluate_lists(
    model: str, changes: dict[str, Any], filter_rated: bool, data: Dataset, tmp_path: Path
) -> None:
    """In the same order; only a target that ties may be further up, among its equals."""
    served = recommender(data, tmp_path, model, **changes)
    found = predict(
        served.checkpoint.build_model(torch.device("cpu")),
        data.split("test"),
        protocol="every-step",
        filter_rated=filter_rated,
        full_sessions=True,
        top_items=NUM_ITEMS,
    )
    assert found.top_EK is not None
    lists = served.recommend(prefixes(data, found), k=NUM_ITEMS, filter_rated=filter_rated)
    assert len(lists) == len(found.target_E) > 100
    for here, top_K, target, rank in zip(
        lists, found.top_EK, found.target_E + FIRST_ID - 1, found.rank_E, strict=True
    ):
        expected = (top_K[top_K > 0] + FIRST_ID - 1).tolist()
        others = [item for item in here.items if item != target]
        assert others == [item for item in expected if item != target]
        assert (target in here.items) == bool(rank)
        if rank:
            place = here.items.index(target)
            assert place <= rank - 1
            assert len(set(here.scores[place:rank])) == 1
        assert len(here.scores) == len(here.items)
        assert here.scores == sorted(here.scores, reverse=True) or model in BASELINES


@pytest.mark.parametrize("model", METHODS)
def test_exclude_and_candidates_leave_the_order_as_it_is(
    model: str, data: Dataset, tmp_path: Path
) -> None:
    served = recommender(data, tmp_path, model)
    ids = served.item_ids.tolist()
    histories = [[1003, 1009], [1011], [], [5], list(range(1005, 1017))]
    everything = served.recommend(histories, k=NUM_ITEMS)
    assert all(sorted(here.items) == ids for here in everything)
    excluded, candidates = ids[::3], ids[1::2]
    for filter_rated in (False, True):
        for k in (1, 4, NUM_ITEMS):
            for options in (
                {"exclude": excluded},
                {"candidates": candidates},
                {"exclude": excluded, "candidates": candidates[::-1]},
            ):
                lists = served.recommend(histories, k=k, filter_rated=filter_rated, **options)
                for history, here, whole in zip(histories, lists, everything, strict=True):
                    barred = {*options.get("exclude", ()), *(history if filter_rated else ())}
                    expected = [
                        (item, score)
                        for item, score in zip(whole.items, whole.scores, strict=True)
                        if item not in barred and item in options.get("candidates", ids)
                    ][:k]
                    assert list(zip(here.items, here.scores, strict=True)) == expected


@pytest.fixture(scope="module")
def shared(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recommender]:
    folder = tmp_path_factory.mktemp("shared")
    return {
        "sasrec": recommender(data, folder, "sasrec"),
        "gru4rec": recommender(data, folder, "gru4rec", output_bias=True),
    }


ANY_IDS = st.lists(st.integers(FIRST_ID - 3, FIRST_ID + NUM_ITEMS + 3), max_size=15)


@settings(max_examples=100, deadline=None)
@given(
    histories=st.lists(ANY_IDS, max_size=5),
    k=st.integers(1, NUM_ITEMS),
    filter_rated=st.booleans(),
    exclude=ANY_IDS,
    candidates=st.none() | st.sets(st.integers(FIRST_ID, FIRST_ID + NUM_ITEMS - 1)),
    model=st.sampled_from(["sasrec", "gru4rec"]),
)
def test_any_request_is_answered_as_by_sorting_all_scores(
    histories: list[list[int]],
    k: int,
    filter_rated: bool,
    exclude: list[int],
    candidates: set[int] | None,
    model: str,
    shared: dict[str, Recommender],
    data: Dataset,
) -> None:
    """Scores in float64 of each hidden state, computed for one history at a time."""
    served = shared[model]
    network = served.checkpoint.build_model(torch.device("cpu"))
    table = network.item_table.detach().double().numpy()
    count = np.bincount(data.split("train").items, minlength=NUM_ITEMS + 1)
    lists = served.recommend(
        histories, k=k, filter_rated=filter_rated, exclude=exclude, candidates=candidates
    )
    assert len(lists) == len(histories)
    for history, here in zip(histories, lists, strict=True):
        known = [item - FIRST_ID + 1 for item in history if 0 < item - FIRST_ID + 1 <= NUM_ITEMS]
        if known:
            items = np.array(known[-served.sequence_length :], np.int32)
            batch = pack(items, np.array([0]), np.array([len(items)]), with_targets=False)
            with torch.inference_mode():
                score = table @ network(batch)[-1].double().numpy()
        else:
            score = count.astype(float)
        eligible = [
            number
            for number in range(1, NUM_ITEMS + 1)
            if number + FIRST_ID - 1 not in exclude
            and (candidates is None or number + FIRST_ID - 1 in candidates)
            and not (filter_rated and number in known)
        ]
        # Equal embeddings tie, also where another order of summation makes float64 differ.
        best = sorted(eligible, key=lambda number: (-round(score[number], 12), number))[:k]
        assert here.items == [number + FIRST_ID - 1 for number in best]
        expected = score[best] if known else np.zeros(len(best))
        np.testing.assert_allclose(here.scores, expected, rtol=1e-6, atol=1e-6)


def test_networks_score_in_float64_and_order_ties_by_number(data: Dataset, tmp_path: Path) -> None:
    served = recommender(data, tmp_path, "sasrec")
    (here,) = served.recommend([[1001, 1002]], k=NUM_ITEMS)
    keys = [(-score, item) for item, score in zip(here.items, here.scores, strict=True)]
    assert keys == sorted(keys)
    assert len(set(here.scores)) < NUM_ITEMS - 8
    assert all(float(np.float32(score)) == score for score in here.scores)


def test_a_history_without_known_items_gets_the_popular_ones(data: Dataset, tmp_path: Path) -> None:
    count = np.bincount(data.split("train").items, minlength=NUM_ITEMS + 1)[1:]
    expected = sorted(range(NUM_ITEMS), key=lambda place: (-count[place], place))
    for model in ("sasrec", "session_knn"):
        served = recommender(data, tmp_path, model)
        empty, unknown, known = served.recommend([[], [7, "x"], [1001, 7]], k=9)
        assert empty.items == unknown.items == [place + FIRST_ID for place in expected[:9]]
        assert empty.scores == [0.0] * 9
        assert known == served.recommend([[1001]], k=9)[0]
        with pytest.raises(InputError, match="history 2 holds no item"):
            served.recommend([[1001], [7]], on_empty="raise")


def test_a_checkpoint_without_popularity_serves_all_but_empty_histories(
    data: Dataset, tmp_path: Path
) -> None:
    random_checkpoint(data, tmp_path / "new.pt")
    content = torch.load(tmp_path / "new.pt", weights_only=True)
    del content["popularity"]
    torch.save(content, tmp_path / "old.pt")
    old, new = (Recommender.load(tmp_path / f"{name}.pt") for name in ("old", "new"))
    assert old.recommend([[1001]]) == new.recommend([[1001]])
    with pytest.raises(InputError, match="known items; leave such histories out, or train again"):
        old.recommend([[1001], []])
    with pytest.raises(InputError, match="knows; leave it out"):  # on_empty=popular would not help
        old.recommend([[1001], []], on_empty="raise")
    with pytest.raises(InputError, match="pass on_empty=popular"):
        new.recommend([[1001], []], on_empty="raise")


def test_unknown_items_are_skipped_warned_of_or_refused(
    data: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = recommender(data, tmp_path, "sasrec")
    histories = [[1001, 3, 1002, "04"]]
    expected = served.recommend([[1001, 1002]])
    assert served.recommend(histories) == expected
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "tron"):
        assert served.recommend(histories, on_unknown="warn") == expected
    assert "2 of 4 events" in caplog.text
    with pytest.raises(InputError, match=r"history 1: .* 2 of 4 events, the first 3"):
        served.recommend(histories, on_unknown="raise")


def test_ids_may_be_text_or_integers_in_both_kinds_of_catalogues(
    data: Dataset, tmp_path: Path
) -> None:
    served = recommender(data, tmp_path, "sasrec")
    expected = served.recommend([[1001, 1002]])
    assert all(type(item) is int for item in expected[0].items)
    for same in (
        ["1001", "1002"],
        ["1001.0", 1002],
        (1001, "1002"),
        np.array([1001, 1002]),
        iter([1001, 1002]),
    ):
        assert served.recommend([same]) == expected
    # These are no spellings of 1001.
    for other in ("01001", "1001.00", "1001.5", " 1001", "+1001", "\u0661", 2**70, "9" * 30):
        assert served.recommend([[other, 1001]]) == served.recommend([[1001]])
    text = write_dataset(
        tmp_path, name="text", train=[[1, 2, 3]],
        item_ids=np.array(["7", "shoe 8", "é"], dtype=object),
    )  # fmt: skip
    random_checkpoint(text, tmp_path / "text.pt")
    served = Recommender.load(tmp_path / "text.pt")
    assert served.recommend([[7]], k=3) == served.recommend([["7"]], k=3)
    assert sorted(served.recommend([["shoe 8"]], k=3)[0].items) == ["7", "shoe 8", "é"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"histories": [[True]]}, "got True .bool."),
        ({"histories": [[1001, 5.0]]}, "history 1: .* got 5.0 .float. at place 2"),
        ({"histories": [[None]]}, "got None"),
        ({"histories": [np.array([1.0])]}, "got 1.0"),
        ({"histories": ["1001"]}, "expected a list of item ids, got '1001'"),
        ({"histories": "1001"}, "expected a list of histories"),
        ({"histories": 5}, "expected a list of histories"),
        ({"histories": np.array(5)}, "expected a list of histories"),
        ({"histories": [np.array(5)]}, "history 1: expected a list of item ids"),
        (
            {"histories": [{99}], "on_unknown": "raise"},
            "history 1: .* the items of 1 of 1 event, the first 99",
        ),
        ({"histories": [{99: 1}.keys()], "on_unknown": "raise"}, "the items of 1 of 1 event"),
        ({"histories": [1001, 1002]}, "expected a list of item ids, got 1001"),
        ({"histories": [{"items": [1]}]}, "expected a list of item ids"),
        ({"k": 0}, "k must be from 1 to 40"),
        ({"k": 41}, "k must be from 1 to 40"),
        ({"k": True}, "k must be an integer"),
        ({"k": 2.0}, "k must be an integer"),
        ({"filter_rated": "yes"}, "filter_rated must be"),
        ({"on_unknown": "ignore"}, "on_unknown must be one of"),
        ({"on_empty": "ignore"}, "on_empty must be one of"),
        ({"filter_rated": np.array([True, False])}, "filter_rated must be True, False or None"),
        ({"filter_rated": 1}, "filter_rated must be True, False or None, got 1"),
        ({"on_unknown": np.array(["skip"] * 2)}, "on_unknown must be one of"),
        ({"on_empty": ["popular"]}, "on_empty must be one of"),
        ({"k": np.array([1, 2])}, "k must be an integer"),
        ({"exclude": "1001"}, "exclude: expected a list"),
        ({"exclude": 5}, "exclude: expected a list"),
        ({"candidates": np.array(5)}, "candidates: expected a list"),
        ({"histories": [["\ud800"]], "on_unknown": "raise"}, "the items of 1 of 1 event"),
        ({"candidates": ["\ud800"]}, "lacks 1 of 1 id, the first"),
        ({"candidates": [1001, 5, "x"]}, "the catalogue .* lacks 2 of 3 ids, the first 5"),
        ({"candidates": "1001"}, "candidates: expected a list"),
        ({"exclude": [1.5]}, "exclude: expected item ids"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    arguments: dict[str, Any], words: str, data: Dataset, tmp_path: Path
) -> None:
    served = recommender(data, tmp_path, "sasrec")
    with pytest.raises(InputError, match=words):
        served.recommend(**{"histories": [[1001]], **arguments})


@pytest.mark.parametrize(
    ("path", "plugins"),
    [(None, ()), (5, ()), (b"model.pt", ()), (["model.pt"], ()), *[("a.pt", p) for p in (None, 5)]],
)
def test_a_checkpoint_is_a_path_and_plugins_are_a_list(path: Any, plugins: Any) -> None:
    with pytest.raises(InputError, match="must be"):
        Recommender.load(path, plugins=plugins)


def test_no_candidates_and_everything_excluded_give_empty_lists(
    data: Dataset, tmp_path: Path
) -> None:
    for model in ("sasrec", "markov", "ease"):
        served = recommender(data, tmp_path, model)
        for options in (
            {"candidates": []},
            {"exclude": served.item_ids.tolist()},
            {"candidates": [1001], "exclude": ["1001"]},
            {"candidates": [1001], "filter_rated": True},
        ):
            (here,) = served.recommend([[1001]], **options)
            assert here.items == here.scores == []
        assert served.recommend([]) == []


def test_weights_that_are_not_finite_are_refused_at_load(data: Dataset, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(data, tmp_path / "model.pt")
    content = torch.load(checkpoint.path, weights_only=True)
    content["weights"]["item_embedding.weight"][3, 1] = torch.nan
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(RunError, match="NaN"):
        Recommender.load(tmp_path / "bad.pt")
    with pytest.raises(InputError, match="got 'tpu'"):
        Recommender.load(checkpoint.path, device="tpu")


def test_threads_may_ask_at_the_same_time(data: Dataset, tmp_path: Path) -> None:
    served = recommender(data, tmp_path, "bert4rec")
    histories = [[FIRST_ID + place, FIRST_ID + 2 * place] for place in range(20)]
    expected = [served.recommend([history])[0].items for history in histories]
    wrong: list[int] = []

    def ask() -> None:
        for place, history in enumerate(histories):
            if served.recommend([history])[0].items != expected[place]:
                wrong.append(place)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
