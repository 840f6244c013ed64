"""Mixed models: session-kNN's votes added to a network's scores, against a loop over all items."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import random_checkpoint
from helpers.datasets import random_sessions, write_dataset
from helpers.servers import running_server

import tron_cli
from tron_cli.baselines.knn_boost import GRID
from tron_cli.checkpoint import Checkpoint, load_checkpoint
from tron_cli.data.dataset import Dataset, Sessions
from tron_cli.data.histories import latest_histories
from tron_cli.errors import InputError
from tron_cli.evaluation.predict import hidden_states, predict
from tron_cli.serving.export import export
from tron_cli.serving.recommender import Recommender
from tron_cli.training.final import final_start
from tron_cli.training.mix import WEIGHTS
from tron_cli.training.warm_start import start_from

NUM_ITEMS, FIRST_ID = 40, 1001
ITEM_IDS = np.arange(FIRST_ID, FIRST_ID + NUM_ITEMS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    rng = np.random.default_rng(5)
    return write_dataset(
        tmp_path_factory.mktemp("data"),
        train=random_sessions(rng, 30, NUM_ITEMS - 3),  # so that kNN scores only some items
        val=random_sessions(rng, 10, NUM_ITEMS),
        test=random_sessions(rng, 12, NUM_ITEMS, longest=12),
        item_ids=ITEM_IDS,
    )


def parts(data: Dataset, folder: Path, **changes: Any) -> tuple[Path, Path]:
    network, knn = folder / "network.pt", folder / "knn.pt"
    random_checkpoint(data, network, **{"with_ties": True, **changes})
    random_checkpoint(data, knn, model="session_knn", knn_neighbors=4, knn_sample_size=9)
    return network, knn


def mixed(data: Dataset, folder: Path, weight: float | None = None, **changes: Any) -> Checkpoint:
    """Return a mixed model. weight: instead of the one that validation chose."""
    network, knn = parts(data, folder, **changes)
    result = tron_cli.mix(
        network, knn, data_dir=data.path.parent, output_dir=folder, name="both", device="cpu"
    )
    if weight is not None:
        content = torch.load(result.checkpoint, weights_only=True)
        content["knn"]["weight"] = float(weight)
        torch.save(content, result.checkpoint)
    return load_checkpoint(result.checkpoint)


@cache
def served(path: Path) -> Recommender:
    return Recommender.load(path)


@cache
def built(path: Path) -> Any:
    return load_checkpoint(path).build_model(torch.device("cpu"))


def boosts(found: Checkpoint, folder: Path, history: list[int], weight: float) -> list[float]:
    """Boosts of all items by the formula, from the scores that session-kNN itself recommends by."""
    knn = served(folder / "knn.pt")
    (listed,) = knn.recommend([[int(ITEM_IDS[item - 1]) for item in history]], k=NUM_ITEMS)
    votes = [0.0] * (NUM_ITEMS + 1)
    for item, score in zip(listed.items, listed.scores, strict=True):
        votes[int(item) - FIRST_ID + 1] = score
    most = max(votes)
    if not most:
        return votes
    steps = [weight * math.log1p(100 * vote / most) / math.log1p(100) / GRID for vote in votes]
    return [round(step) * GRID for step in steps]


def exact_scores(found: Checkpoint, folder: Path, history: list[int]) -> list[Fraction]:
    """Scores of items 1.. without rounding, of the hidden state after a history."""
    assert found.knn is not None
    model = built(found.path)
    items = np.array(history, dtype=np.int32)
    block = latest_histories(Sessions(items, np.array([0, len(items)])), model.sequence_length)
    with torch.inference_mode():
        ((_, hidden_1D),) = hidden_states(model, block, 1)
        table = model.scored_table()
    hidden = [Fraction(value) for value in hidden_1D[0].double().tolist()]
    added = boosts(found, folder, history, found.knn["weight"])
    return [
        sum((h * Fraction(e) for h, e in zip(hidden, row, strict=True)), Fraction(boost))
        for row, boost in zip(table.double().tolist()[1:], added[1:], strict=True)
    ]


VARIANTS = [
    ({"model": "sasrec"}, False, 0.25),
    ({"model": "sasrec"}, True, 6),
    ({"model": "sasrec", "score": "cosine"}, True, 2),
    ({"model": "bert4rec"}, False, 1),
    ({"model": "gru4rec"}, False, 0.5),
]


@pytest.mark.parametrize(("changes", "filter_rated", "weight"), VARIANTS)
def test_ranks_and_lists_are_those_of_a_loop_over_all_items(
    changes: dict[str, Any], filter_rated: bool, weight: float, data: Dataset, tmp_path: Path
) -> None:
    """One history at a time; some embeddings are equal, and some are zero."""
    found = mixed(data, tmp_path, weight, **changes)
    model = found.build_model(torch.device("cpu"))
    test = data.split("test")
    predictions = predict(
        model, test, protocol="every-step", filter_rated=filter_rated, top_items=NUM_ITEMS,
        batch_size=1,
    )  # fmt: skip
    up_to_5 = predict(
        model, test, protocol="every-step", filter_rated=filter_rated, rank_limit=5, batch_size=1
    )
    assert predictions.top_EK is not None
    ties = 0
    for number, (session, event) in enumerate(
        zip(predictions.session_E, predictions.event_E, strict=True)
    ):
        whole = test[session][:event].tolist()
        score = exact_scores(found, tmp_path, whole[-model.sequence_length :])
        target = int(predictions.target_E[number])
        barred = set(whole) if filter_rated else set()
        order = sorted(
            {*range(1, NUM_ITEMS + 1)} - barred,
            key=lambda item: (-score[item - 1], item == target, item),
        )
        rank = 0 if target in barred else 1 + order.index(target)
        ties += sum(score[item - 1] == score[target - 1] for item in order) - 1
        assert predictions.rank_E[number] == rank
        assert min(up_to_5.rank_E[number], 6) == min(rank, 6)
        assert predictions.top_EK[number, : len(order)].tolist() == order
    assert len(predictions.rank_E) > 40
    assert ties > 5


def test_the_int8_pass_gives_the_same_ranks(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tron_cli.evaluation.ranking as ranking

    model = mixed(data, tmp_path, 0.5).build_model(torch.device("cpu"))
    found = []
    for fewest in (ranking._INT8_ITEMS, 1):
        monkeypatch.setattr(ranking, "_INT8_ITEMS", fewest)
        monkeypatch.setattr(ranking, "_INT8_EVENTS", 1)
        found.append(predict(model, data.split("test"), protocol="every-step", rank_limit=20))
    np.testing.assert_array_equal(found[0].rank_E.clip(max=21), found[1].rank_E.clip(max=21))


@pytest.mark.parametrize("filter_rated", [False, True])
def test_recommend_and_the_server_list_what_evaluate_lists(
    filter_rated: bool, data: Dataset, tmp_path: Path
) -> None:
    found = mixed(data, tmp_path, 6, filter_rated=filter_rated)
    test = data.split("test")
    predictions = predict(
        found.build_model(torch.device("cpu")), test, protocol="every-step",
        filter_rated=filter_rated, full_sessions=True, top_items=10,
    )  # fmt: skip
    assert predictions.top_EK is not None
    served = Recommender.load(found.path)
    histories = [
        ITEM_IDS[test[session][:event] - 1].tolist()
        for session, event in zip(predictions.session_E, predictions.event_E, strict=True)
    ]
    lists = served.recommend(histories, k=10)
    with running_server(Recommender.load, found.path) as server:
        answers = [
            server.post("/recommend", {"items": history, "k": 10})[1] for history in histories[:9]
        ]
    assert [answer["items"] for answer in answers] == [here.items for here in lists[:9]]
    for number, here in enumerate(lists):
        assert here.scores == sorted(here.scores, reverse=True)
        target = ITEM_IDS[predictions.target_E[number] - 1]
        top = predictions.top_EK[number]
        expected = ITEM_IDS[top[top > 0] - 1].tolist()
        if here.items != expected:  # the target is last among its equals
            rank = predictions.rank_E[number]
            equals = here.scores[here.items.index(target) : min(rank, 10)]
            assert len(set(equals)) == 1
            left = [item for item in expected if item != target]
            assert [item for item in here.items if item != target][: len(left)] == left


def test_candidates_and_excluded_items_leave_the_order_as_it_is(
    data: Dataset, tmp_path: Path
) -> None:
    served = Recommender.load(mixed(data, tmp_path, 6).path)
    histories = [[1003, 1009], [1011, 1005], list(range(1005, 1017))]
    everything = served.recommend(histories, k=NUM_ITEMS)
    ids = served.item_ids.tolist()
    options = {"exclude": ids[::3], "candidates": ids[1::2]}
    kept = set(ids[1::2]) - set(ids[::3])
    for here, whole in zip(served.recommend(histories, k=9, **options), everything, strict=True):
        pairs = zip(whole.items, whole.scores, strict=True)
        expected = [pair for pair in pairs if pair[0] in kept][:9]
        assert list(zip(here.items, here.scores, strict=True)) == expected


def test_scores_are_the_networks_and_the_boosts(data: Dataset, tmp_path: Path) -> None:
    found = mixed(data, tmp_path, 6)
    (here,) = Recommender.load(found.path).recommend([[1003, 1009]], k=NUM_ITEMS)
    expected = exact_scores(found, tmp_path, [3, 9])
    for item, score in zip(here.items, here.scores, strict=True):
        assert score == pytest.approx(float(expected[int(item) - FIRST_ID]), abs=1e-6)


def test_a_weight_of_zero_is_the_network(data: Dataset, tmp_path: Path) -> None:
    found = mixed(data, tmp_path, 0)
    alone = load_checkpoint(tmp_path / "network.pt")
    assert found.weights.keys() == alone.weights.keys()
    test = data.split("test")
    both = [
        predict(each.build_model(torch.device("cpu")), test, protocol="every-step", top_items=9)
        for each in (found, alone)
    ]
    np.testing.assert_array_equal(both[0].rank_E, both[1].rank_E)
    np.testing.assert_array_equal(both[0].top_EK, both[1].top_EK)  # type: ignore[arg-type]
    histories = [[1003, 1009], [1011]]
    assert Recommender.load(found.path).recommend(histories) == Recommender.load(
        alone.path
    ).recommend(histories)


def test_validation_chooses_the_weight(data: Dataset, tmp_path: Path) -> None:
    """Figures of each weight are those of evaluate on a checkpoint with that weight."""
    network, knn = parts(data, tmp_path, with_ties=False)
    result = tron_cli.mix(
        network, knn, data_dir=data.path.parent, output_dir=tmp_path, name="both", device="cpu"
    )
    assert tuple(result.metrics_by_weight) == WEIGHTS
    best = max(each["R@5"] for each in result.metrics_by_weight.values())
    assert result.metrics == result.metrics_by_weight[result.weight]
    assert result.metrics["R@5"] == best
    earlier = [each["R@5"] for w, each in result.metrics_by_weight.items() if w < result.weight]
    assert max(earlier, default=-1.0) < best
    assert f"knn_weight={result.weight:g}-R@5={best:.4f}" in result.checkpoint.name
    for path, weight in ((result.checkpoint, result.weight), (network, 0.0)):
        report = tron_cli.evaluate(path, dataset=data, split="val", device="cpu", cutoff=0)
        values = {name: figure.value for name, figure in report.metrics.items()}
        assert values == pytest.approx(result.metrics_by_weight[weight], abs=1e-12)
    origin = json.loads((result.run_dir / "origin.json").read_text())["mixed"]
    assert origin["networks"][0]["file"] == str(network)
    compared = tron_cli.compare([result.run_dir, network, knn], dataset=data, device="cpu")
    assert len(compared.models) == 3


def test_votes_win_where_they_know_what_follows(tmp_path: Path) -> None:
    """An untrained network knows nothing of sessions in which each item is followed by the next."""
    rows = [[item, item % 20 + 1] for item in range(1, 21)] * 3
    cyclic = write_dataset(tmp_path / "data", train=rows, val=rows[:20])
    result = tron_cli.mix(
        *parts(cyclic, tmp_path, with_ties=False),
        data_dir=cyclic.path.parent, output_dir=tmp_path, name="both", device="cpu",
    )  # fmt: skip
    assert result.weight > 0
    assert result.metrics["R@5"] == 1
    assert result.metrics_by_weight[0.0]["R@5"] < 0.9


@pytest.mark.parametrize(
    ("first_item", "weight", "advice"),
    [
        (1, 32.0, "a larger one may score higher still; compare it: --weight 64"),
        (21, 0.0, "session-kNN adds nothing to the networks; use {network}"),
    ],
)
def test_the_log_says_what_to_do_where_the_best_weight_is_the_largest_or_0(
    first_item: int, weight: float, advice: str, tmp_path: Path
) -> None:
    """Votes know what follows in sessions of items 1 to 20, and do not know items 21 to 40."""
    rows = np.array([[item, item % 20 + 1] for item in range(1, 21)])
    data = write_dataset(
        tmp_path / "data",
        train=[*rows.tolist()] * 3,
        val=(rows + first_item - 1).tolist(),
        num_items=40,
    )
    pair = parts(data, tmp_path, with_ties=False, score="cosine", score_scale=60.0)
    place = {"data_dir": data.path.parent, "output_dir": tmp_path, "device": "cpu"}
    result = tron_cli.mix(*pair, name="both", **place)
    assert result.weight == weight
    advice = advice.format(network=tmp_path / "network.pt")
    assert advice in (result.run_dir / "train.log").read_text()
    given = tron_cli.mix(*pair, name="given", weight=weight, **place)
    assert advice not in (given.run_dir / "train.log").read_text()


def test_parts_that_do_not_fit_are_refused_in_a_sentence(data: Dataset, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    network, knn = parts(data, tmp_path)
    other = write_dataset(
        tmp_path / "other", train=random_sessions(rng, 30, 12), val=random_sessions(rng, 3, 12)
    )
    popular, elsewhere = tmp_path / "popular.pt", tmp_path / "elsewhere.pt"
    random_checkpoint(data, popular, model="popular")
    random_checkpoint(other, elsewhere, model="session_knn")
    both = mixed(data, tmp_path).path
    refused = {
        (network, network): f"{network} is named twice",
        (knn, knn): "are session_knn, which boosts the scores of a network",
        (network, popular): "is the baseline popular; name networks, and at most one session_knn",
        (network, elsewhere): r"different data: .*40 items.* and .*12 items",
        (both, knn): f"mixed model already; name what it was made of: {network} {knn}",
        (network, tmp_path / "nothing.pt"): "no checkpoint at",
    }
    for pair, sentence in refused.items():
        with pytest.raises(InputError, match=sentence) as caught:
            tron_cli.mix(
                *pair, data_dir=data.path.parent, output_dir=tmp_path, name="new", device="cpu"
            )
        assert len(str(caught.value)) < 500
        assert not (tmp_path / "new").exists()


def test_a_dataset_that_validates_nothing_or_has_changed_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    train = random_sessions(rng, 30, 12)
    places = {"data_dir": tmp_path, "output_dir": tmp_path, "name": "new", "device": "cpu"}
    unvalidated = write_dataset(tmp_path, train=train, num_items=12)
    both = parts(unvalidated, tmp_path)
    with pytest.raises(InputError, match="has no event to predict"):
        tron_cli.mix(*both, **places)
    write_dataset(tmp_path, train=train[1:], val=train, num_items=12)
    with pytest.raises(InputError, match="was trained on another version of"):
        tron_cli.mix(*both, **places)


def test_final_models_last_weights_and_export_are_refused(data: Dataset, tmp_path: Path) -> None:
    found = mixed(data, tmp_path)
    with pytest.raises(InputError, match="holds session-kNN, and only networks can") as error:
        export(found.path, format="torch", output=tmp_path / "exported")
    assert str(error.value).endswith(f"without session-kNN: {tmp_path / 'network.pt'}")
    with pytest.raises(InputError, match="is a mixed model, which `tron mix` makes of"):
        final_start(found.path, data.path.parent)
    network, knn = tmp_path / "network.pt", tmp_path / "knn.pt"
    content = torch.load(network, weights_only=True)
    content["origin"] = {"final": {}}
    torch.save(content, tmp_path / "final.pt")
    with pytest.raises(InputError, match="is a final model, trained on the validation sessions"):
        tron_cli.mix(tmp_path / "final.pt", knn, data_dir=data.path.parent, output_dir=tmp_path)


def test_only_networks_are_named_to_start_from(data: Dataset, tmp_path: Path) -> None:
    found = mixed(data, tmp_path)
    model = found.build_model(torch.device("cpu"))
    with pytest.raises(InputError) as error:
        start_from(found.path, model, found.config, data)
    assert str(error.value).endswith(f"it was made of: {tmp_path / 'network.pt'}")


def test_a_mix_that_was_killed_leaves_its_folder_usable(data: Dataset, tmp_path: Path) -> None:
    places = {"data_dir": data.path.parent, "output_dir": tmp_path, "name": "both"}
    (tmp_path / "both").mkdir()
    half_written = tmp_path / "both" / "sasrec+session_knn-tiny-knn_weight=1.pt.partial"
    half_written.write_bytes(b"half")
    result = tron_cli.mix(*parts(data, tmp_path), **places, device="cpu")
    assert load_checkpoint(tmp_path / "both").path == result.checkpoint


@pytest.mark.parametrize(
    "damage",
    [
        {"weight": "much"},
        {"weight": float("nan")},
        {"weight": -1.0},
        {"arrays": {}},
        {"settings": {"unknown": 3}},
        {"arrays": {"offsets": torch.zeros(0), "items": 3}},
    ],
)
def test_a_checkpoint_with_a_damaged_session_knn_is_refused(
    damage: dict[str, Any], data: Dataset, tmp_path: Path
) -> None:
    path = mixed(data, tmp_path).path
    content = torch.load(path, weights_only=True)
    content["knn"] |= damage
    torch.save(content, path)
    with pytest.raises(InputError, match="session-kNN"):
        load_checkpoint(path).build_model(torch.device("cpu"))
