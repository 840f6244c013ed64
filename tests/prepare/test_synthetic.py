"""The generated shop against its own documentation, rebuilt here from the original item ids."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tron_cli.data.dataset import Dataset
from tron_cli.errors import InputError
from tron_cli.evaluation.metrics import Figure, parse_measures, score
from tron_cli.evaluation.reference import reference_figures
from tron_cli.prepare.sources.synthetic import (
    LOYALTY,
    NOISE,
    SUCCESSOR_PROBABILITIES,
    Shop,
    make_shop,
    next_item_probabilities,
    prepare_synthetic,
)

DAY = 24 * 3_600_000
SEED = 3


def prepare(folder: Path, name: str = "synthetic", **options: Any) -> Dataset:
    return prepare_synthetic(folder, name, reference_figures, **options)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare(tmp_path_factory.mktemp("data"), seed=SEED)


@pytest.fixture(scope="module")
def shop() -> Shop:
    return make_shop(np.random.default_rng(SEED))


def true_probabilities(shop: Shop, history: list[tuple[int, int]]) -> np.ndarray:
    """P(next = (category, brand)), [C, B], written out case by case from the documentation."""
    category_count, brand_count = len(shop.category_share), len(shop.brand_share)
    probabilities = np.zeros((category_count, brand_count))
    for category in range(category_count):
        follows = 0.0
        for successor, chance in zip(
            shop.successors[history[-1][0]], SUCCESSOR_PROBABILITIES, strict=True
        ):
            follows += chance if successor == category else 0.0
        for brand in range(brand_count):
            chosen = float(shop.brand_share[brand])
            if len(history) > 1:
                chosen = (1 - LOYALTY) * chosen + LOYALTY * (history[-2][1] == brand)
            any_item = shop.category_share[category] * shop.brand_share[brand]
            probabilities[category, brand] = (1 - NOISE) * follows * chosen + NOISE * any_item
    return probabilities


def histories(dataset: Dataset, split: str) -> list[tuple[int, list[tuple[int, int]]]]:
    """(session, (category, brand) of its items up to the target) for every prediction."""
    pairs = [divmod(int(original), 1000) for original in dataset.item_ids]
    sessions = dataset.split(split)
    return [
        (index, [pairs[item - 1] for item in session[: end + 1]])
        for index, session in enumerate(
            map(np.asarray, (sessions[s] for s in range(len(sessions))))
        )
        for end in range(1, len(session))
    ]


def test_probabilities_are_the_documented_ones(shop: Shop) -> None:
    rng = np.random.default_rng(0)
    brand_count = len(shop.brand_share)
    for length in (1, 2, 2, 5):
        history = [
            (int(rng.integers(len(shop.category_share))), int(rng.integers(brand_count)))
            for _ in range(length)
        ]
        expected = true_probabilities(shop, history)
        assert expected.sum() == pytest.approx(1)
        before_last = history[-2][1] if length > 1 else brand_count
        actual = shop.next_item(history[-1][0])[before_last]
        np.testing.assert_allclose(actual, expected.ravel(), atol=1e-15)
        numbers = np.array([category * brand_count + brand + 1 for category, brand in history])
        assert np.array_equal(next_item_probabilities(SEED, numbers), actual)


def test_best_is_the_expectation_over_the_evaluated_events_and_is_realized(
    dataset: Dataset, shop: Shop
) -> None:
    """Every event of the test split: sort the catalogue by the true probability of the items."""
    references = dataset.info["references"]["test"]["best"]
    measures = parse_measures(list(references))
    ideal = {"R": lambda r: 1.0, "RR": lambda r: 1 / r, "nDCG": lambda r: 1 / np.log2(r + 1)}
    rng = np.random.default_rng(1)
    ranks, clusters, top = [], [], []
    chances_after = [shop.next_item(category) for category in range(len(shop.category_share))]
    best_after = [np.sort(chances, axis=1)[:, ::-1][:, :20] for chances in chances_after]
    for session, history in histories(dataset, "test"):
        *prefix, (category, brand) = history
        last, before_last = prefix[-1][0], prefix[-2][1] if len(prefix) > 1 else -1
        chances = chances_after[last][before_last]
        wanted = chances[category * len(shop.brand_share) + brand]
        # Equally probable items are told apart by a coin, as an arbitrary order would do.
        ranks.append(
            1
            + np.count_nonzero(chances > wanted)
            + rng.integers(np.count_nonzero(chances == wanted))
        )
        clusters.append(session)
        top.append(best_after[last][before_last])
    realized = score(np.array(ranks), np.array(clusters), measures)
    top_at = np.mean(top, axis=0)
    for measure in measures:
        cutoff = measure["cutoff"]
        gain = ideal[measure.NAME]
        expected = sum(top_at[rank - 1] * gain(rank) for rank in range(1, cutoff + 1))
        assert references[str(measure)] == pytest.approx(expected, rel=1e-9), measure
        figure: Figure = realized[str(measure)]
        assert figure.stderr is not None
        assert abs(figure.value - expected) < 4 * figure.stderr, measure


def test_figures_leave_a_sequence_model_something_to_show(dataset: Dataset) -> None:
    for split in ("val", "test"):
        references = dataset.info["references"][split]
        best, markov, popularity = (
            references[name]["R@20"] for name in ("best", "markov", "popularity")
        )
        assert 0.5 <= best <= 0.9
        assert popularity <= 0.1
        assert popularity < markov <= 0.8 * best


def test_the_next_item_depends_on_the_last_two_as_documented(dataset: Dataset, shop: Shop) -> None:
    """Frequencies in the training data, counted without the generator's formulas."""
    followed = loyal = predictions = later = 0
    for _, history in histories(dataset, "val"):
        predictions += 1
        followed += history[-1][0] in shop.successors[history[-2][0]]
        if len(history) > 2:
            later += 1
            loyal += history[-1][1] == history[-3][1]
    jump = shop.category_share[shop.successors].sum(axis=1).mean()
    assert followed / predictions == pytest.approx(1 - NOISE + NOISE * jump, abs=0.01)
    same_by_chance = np.square(shop.brand_share).sum()
    expected = (1 - NOISE) * LOYALTY
    assert loyal / later == pytest.approx(expected + (1 - expected) * same_by_chance, abs=0.015)


def test_shape_of_the_shop(dataset: Dataset) -> None:
    assert dataset.protocol == "every-step"
    assert dataset.num_items >= 5000
    train = dataset.split("train")
    counts = np.bincount(train.items, minlength=dataset.num_items + 1)
    assert counts[0] == 0
    assert counts[1:].min() >= 1  # training shows every item
    assert 10 < counts.max() / np.median(counts[1:]) < 100  # a mild Zipf law
    lengths = train.lengths
    assert lengths.min() == 2
    assert 6 <= lengths.mean() <= 8
    assert lengths.max() > 50


def test_splits_are_cut_by_time(dataset: Dataset) -> None:
    spans = []
    for split in ("train", "val", "test"):
        sessions = dataset.split(split)
        assert sessions.times is not None
        starts = sessions.times[sessions.offsets[:-1]]
        ends = sessions.times[sessions.offsets[1:] - 1]
        assert (np.diff(starts) >= 0).all()
        assert (starts // DAY == ends // DAY).all()  # no session past midnight
        inside = np.ones(len(sessions.times) - 1, dtype=bool)
        inside[sessions.offsets[1:-1] - 1] = False
        assert (np.diff(sessions.times)[inside] > 0).all()
        spans.append((sessions.times.min() // DAY, sessions.times.max() // DAY))
    assert spans[0][1] + 1 == spans[1][0]
    assert spans[1][1] + 1 == spans[2][0]
    assert [last - first + 1 for first, last in spans] == [26, 2, 2]


def test_same_seed_same_shop(dataset: Dataset, tmp_path: Path) -> None:
    again = prepare(tmp_path, "again", seed=SEED)
    other = prepare(tmp_path, "other", seed=SEED + 1)
    assert again.info["references"] == dataset.info["references"]
    for split in ("train", "val", "test"):
        fingerprint = dataset.split_info(split)["fingerprint"]
        assert again.split_info(split)["fingerprint"] == fingerprint
        assert other.split_info(split)["fingerprint"] != fingerprint


def test_too_few_sessions_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="never occur"):
        prepare(tmp_path, sessions=1000)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_dataset_is_kept(dataset: Dataset) -> None:
    with pytest.raises(InputError, match="--force"):
        prepare(dataset.path.parent, seed=SEED)
    assert Dataset.open(dataset.path).info == dataset.info


@pytest.mark.parametrize("name", ["raw", "../victim", ""])
def test_the_name_is_a_folder_name(tmp_path: Path, name: str) -> None:
    """Nothing outside the data folder is written, and the downloads in raw/ stay."""
    data_dir = tmp_path / "data"
    with pytest.raises(InputError, match="--name"):
        prepare(data_dir, name, force=True, sessions=80_000)
    assert list(tmp_path.iterdir()) == []


def test_needs_no_torch() -> None:
    code = "import sys, tron_cli.prepare.sources.synthetic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
