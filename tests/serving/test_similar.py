"""Similar items against all cosines in float64, and against counts of the training sessions."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import random_checkpoint
from helpers.datasets import random_sessions, write_dataset
from helpers.ranks import with_ties

from tron_cli.data.dataset import Dataset
from tron_cli.errors import InputError
from tron_cli.registry import BASELINES, MODELS
from tron_cli.serving import similar
from tron_cli.serving.recommender import Recommender
from tron_cli.serving.similar import CosineNeighbors

NUM_ITEMS = 30


@pytest.fixture
def train(rng: np.random.Generator) -> list[list[int]]:
    return random_sessions(rng, 50, NUM_ITEMS)


@pytest.fixture
def data(train: list[list[int]], tmp_path: Path) -> Dataset:
    return write_dataset(tmp_path, train=train, num_items=NUM_ITEMS)


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e18])
@pytest.mark.parametrize("k", [1, 7, 400])
def test_cosines_in_float64_with_ties_by_number(
    k: int, scale: float, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similar, "_SPARE", 1)
    table = with_ties(rng, 300, 5) * torch.from_numpy(2.0 ** rng.integers(-9, 9, (301, 1))).float()
    table = table * scale
    wide = table.double().numpy()
    norms = np.linalg.norm(wide, axis=1)
    items = torch.tensor([1, 2, 5, 11, 17, 300])
    found, cosines = CosineNeighbors(table).nearest(items, k)
    for item, best, cosine in zip(items.tolist(), found.numpy(), cosines.numpy(), strict=True):
        both = norms * norms[item]
        expected = np.where(both > 0, wide @ wide[item] / np.where(both > 0, both, 1), 0.0)
        others = [other for other in range(1, 301) if other != item]
        assert len(set(best.tolist())) == len(best) == min(k, 299)
        assert item not in best
        np.testing.assert_allclose(cosine, expected[best], atol=1e-12)
        np.testing.assert_allclose(cosine, np.sort(expected[others])[::-1][: len(best)], atol=1e-12)
        for (one, here), (other, there) in itertools.pairwise(zip(best, cosine, strict=True)):
            assert here > there or (here == there and one < other)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shared", [True, False])
def test_networks_compare_the_embeddings_of_their_inputs(
    model: str, shared: bool, data: Dataset, tmp_path: Path
) -> None:
    """Without the bias column that a shared table may have."""
    file = tmp_path / "model.pt"
    checkpoint = random_checkpoint(
        data, file, model=model, reuse_item_embeddings=shared, output_bias=True
    )
    wide = checkpoint.weights["item_embedding.weight"].double().numpy()[1 : NUM_ITEMS + 1, :8]
    unit = wide / np.linalg.norm(wide, axis=1)[:, None]
    served = Recommender.load(file)
    for place in (0, 12, NUM_ITEMS - 1):
        here = served.similar(place + 101, k=5)
        cosine = unit @ unit[place]
        cosine[place] = -np.inf
        assert here.items == (np.argsort(-cosine)[:5] + 101).tolist()
        np.testing.assert_allclose(here.scores, np.sort(cosine)[::-1][:5], atol=1e-6)


def test_markov_counts_what_directly_followed(
    train: list[list[int]], data: Dataset, tmp_path: Path
) -> None:
    random_checkpoint(data, tmp_path / "model.pt", model="markov")
    served = Recommender.load(tmp_path / "model.pt")
    occurrences = Counter(itertools.chain.from_iterable(train))
    for item in range(1, NUM_ITEMS + 1):
        pairs = itertools.chain.from_iterable(map(itertools.pairwise, train))
        times = Counter(after for before, after in pairs if before == item != after)
        best = sorted(times, key=lambda other: (-times[other], -occurrences[other], other))
        here = served.similar(str(item + 100), k=NUM_ITEMS)
        assert here.items == [other + 100 for other in best]
        assert here.scores == [times[other] for other in best]


def test_ease_lists_its_weights(data: Dataset, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(data, tmp_path / "model.pt", model="ease")
    weights = checkpoint.weights["weights"].numpy()[4, 1:].astype(np.float64)
    weights[3] = -np.inf
    here = Recommender.load(tmp_path / "model.pt").similar(104, k=6)
    assert here.items == (np.argsort(-weights)[:6] + 101).tolist()
    np.testing.assert_allclose(here.scores, np.sort(weights)[::-1][:6], rtol=1e-6)


def test_session_knn_lists_items_of_sessions_with_the_item(
    train: list[list[int]], data: Dataset, tmp_path: Path
) -> None:
    random_checkpoint(data, tmp_path / "model.pt", model="session_knn")
    here = Recommender.load(tmp_path / "model.pt").similar(104, k=NUM_ITEMS)
    together = {item + 100 for row in train if 4 in row for item in row} - {104}
    assert set(here.items) == together
    assert here.scores == sorted(here.scores, reverse=True)


@pytest.mark.parametrize("model", sorted({*BASELINES} - {"markov", "ease", "session_knn"}))
def test_other_baselines_refuse(model: str, data: Dataset, tmp_path: Path) -> None:
    random_checkpoint(data, tmp_path / "model.pt", model=model)
    with pytest.raises(InputError, match="no measure of similar items"):
        Recommender.load(tmp_path / "model.pt").similar(104)


@pytest.mark.parametrize("item", [5, "x", True, None, 101.0, [101]])
def test_unknown_items_and_wrong_types_are_refused(
    item: object, data: Dataset, tmp_path: Path
) -> None:
    random_checkpoint(data, tmp_path / "model.pt")
    served = Recommender.load(tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"not in the catalogue|expected item ids"):
        served.similar(item)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="k must be from 1"):
        served.similar(101, k=0)
