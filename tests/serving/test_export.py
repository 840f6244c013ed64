"""Exported models: what other runtimes recommend, beside the network's own states and scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.checkpoints import random_checkpoint
from helpers.datasets import random_sessions, write_dataset

from tron_cli.checkpoint import Checkpoint
from tron_cli.data.batches import pack
from tron_cli.serving.export import export
from tron_cli.serving.recommender import Recommender

NUM_ITEMS, WINDOW = 60, 5

NETWORKS: dict[str, dict[str, Any]] = {
    "tron": {},
    "sasrec-start-untied": {
        "positions": "start",
        "reuse_item_embeddings": False,
        "output_bias": True,
        "num_heads": 2,
        "num_blocks": 2,
    },
    "sasrec-padding-attended": {"key_padding_mask": False},
    "recbole": {"block": "post-norm", "activation": "gelu", "positions": "start"},
    "ligr": {"block": "ligr", "activation": "swiglu", "feed_forward_dim": 32},
    "gsasrec": {"model": "gsasrec", "num_heads": 2},
    "gsasrec-padding-attended": {"model": "gsasrec", "key_padding_mask": False},
    "gru4rec": {"model": "gru4rec", "num_blocks": 2},
    "bert4rec": {"model": "bert4rec"},
    "bert4rec-head": {
        "model": "bert4rec",
        "block": "post-norm",
        "activation": "gelu",
        "prediction_head": True,
        "output_bias": True,
        "num_heads": 2,
    },
}

# histories [B, L], k, filter_rated -> items [B, k], scores [B, k]
Runtime = Callable[[np.ndarray, int, bool], tuple[np.ndarray, np.ndarray]]


def make_checkpoint(folder: Path, **changes: Any) -> Checkpoint:
    """Save a network whose positions and order matter, and many of whose items tie."""
    dataset = write_dataset(folder, train=[[1, 2, 2, NUM_ITEMS]], num_items=NUM_ITEMS)
    return random_checkpoint(
        dataset, folder / "a.pt", with_ties=True, sequence_length=WINDOW, **changes
    )


def padded(histories: list[list[int]], width: int, random: np.random.Generator) -> np.ndarray:
    """Return [B, width]: each history in order, with zeros in front, behind and between."""
    found = np.zeros((len(histories), width), dtype=np.int64)
    for row, history in enumerate(histories):
        places = np.sort(random.choice(width, len(history), replace=False))
        found[row, places] = history
    return found


def in_onnxruntime(folder: Path) -> Runtime:
    session = onnxruntime.InferenceSession(folder / "model.onnx")

    def run(histories: np.ndarray, k: int, filter_rated: bool) -> tuple[np.ndarray, np.ndarray]:
        items, scores = session.run(
            ["items", "scores"],
            {
                "histories": histories,
                "k": np.array(k),
                "filter_rated": np.array(filter_rated),
            },
        )
        return items, scores

    return run


def in_torch(folder: Path) -> Runtime:
    program = torch.export.load(folder / "model.pt2").module()

    def run(histories: np.ndarray, k: int, filter_rated: bool) -> tuple[np.ndarray, np.ndarray]:
        found = program(torch.from_numpy(histories), torch.tensor(k), torch.tensor(filter_rated))
        return found[0].numpy(), found[1].numpy()

    return run


RUNTIMES = {"onnx": in_onnxruntime, "torch": in_torch}


@torch.inference_mode()
def all_scores(checkpoint: Checkpoint, histories: list[list[int]]) -> np.ndarray:
    """Return the scores of all items after each history, float64 [B, I + 1]; of item 0 -inf."""
    model = checkpoint.build_model(torch.device("cpu"))
    scores = np.full((len(histories), NUM_ITEMS + 1), -np.inf)
    for row, history in enumerate(histories):
        if history:
            items = np.asarray(history[-WINDOW:], dtype=np.int32)
            batch = pack(
                items,
                np.array([0]),
                np.array([len(items)]),
                with_targets=False,
                appended_item=model.mask_item,
            )
            hidden_D = model(batch)[-1].double()
            scores[row, 1:] = (model.item_table[1 : NUM_ITEMS + 1].double() * hidden_D).sum(1)
    return scores


def check_lists(
    found: tuple[np.ndarray, np.ndarray], score_BI: np.ndarray, seen: list[set[int]], k: int
) -> None:
    """Compare with a sort by descending score, then number, of the items that are not seen.

    Different items may only change places where their scores differ by float32's rounding.
    """
    items_Bk, scores_Bk = found
    assert items_Bk.dtype == np.int64
    assert scores_Bk.dtype == np.float32
    for items, scores, score_I, out in zip(items_Bk, scores_Bk, score_BI, seen, strict=True):
        score_I = score_I.copy()
        score_I[list(out)] = -np.inf
        expected = np.lexsort((np.arange(NUM_ITEMS + 1), -score_I))[:k]
        expected[score_I[expected] == -np.inf] = 0
        np.testing.assert_allclose(scores, score_I[expected], rtol=1e-5, atol=1e-5)
        for place in np.flatnonzero(items != expected):
            gap = abs(score_I[items[place]] - score_I[expected[place]])
            assert 0 < gap < 1e-5, (items, expected, place)


@pytest.fixture(scope="module", params=list(NETWORKS))
def exported(request: Any, tmp_path_factory: Any) -> tuple[Checkpoint, dict[str, Runtime]]:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = make_checkpoint(folder, **NETWORKS[request.param])
    for format in RUNTIMES:
        export(checkpoint.path, format=format, output=folder / format)
    return checkpoint, {format: load(folder / format) for format, load in RUNTIMES.items()}


@pytest.mark.slow
def test_runtimes_recommend_as_the_network_does(
    exported: tuple[Checkpoint, dict[str, Runtime]], rng: np.random.Generator
) -> None:
    """Histories of any length, padded anywhere, with and without their own items."""
    checkpoint, runtimes = exported
    histories = [*random_sessions(rng, 1000, NUM_ITEMS, longest=14, shortest=1), [3] * 13]
    score_BI = all_scores(checkpoint, histories)
    rows = padded(histories, 17, rng)
    for run in runtimes.values():
        for filter_rated in (False, True):
            seen = [set(history) if filter_rated else set() for history in histories]
            check_lists(run(rows, 10, filter_rated), score_BI, seen, 10)
        # One history at a time, as long as it is; all items, and more than there are.
        for history, score_I in zip(histories[:30], score_BI, strict=False):
            row = np.array([history])
            check_lists(run(row, 1, False), score_I[None], [set()], 1)
            check_lists(run(row, NUM_ITEMS, True), score_I[None], [set(history)], NUM_ITEMS)
            assert run(row, NUM_ITEMS + 7, False)[0].shape == (1, NUM_ITEMS)


@pytest.mark.slow
def test_runtimes_recommend_as_the_recommender_does(
    exported: tuple[Checkpoint, dict[str, Runtime]], rng: np.random.Generator
) -> None:
    """The same original ids in the same order after thousands of histories, empty ones among them.

    Two neighbours in a list may change places where float32 states leave their order open.
    """
    checkpoint, runtimes = exported
    recommender = Recommender.load(checkpoint.path)
    histories = random_sessions(rng, 3000, NUM_ITEMS, longest=14, shortest=0)
    rows = padded(histories, 14, rng)
    for filter_rated in (False, True):
        expected = recommender.recommend(
            [recommender.item_ids[np.array(history, dtype=int) - 1] for history in histories],
            k=10,
            filter_rated=filter_rated,
        )
        for run in runtimes.values():
            swapped = 0
            for items, scores, right in zip(*run(rows, 10, filter_rated), expected, strict=True):
                ids = recommender.item_ids[items[items > 0] - 1].tolist()
                shown = scores[items > 0]
                np.testing.assert_allclose(shown, right.scores, rtol=1e-5, atol=1e-5)
                for place in np.flatnonzero(np.array(ids) != np.array(right.items)):
                    gaps = np.abs(np.delete(right.scores, place) - right.scores[place])
                    assert 0 < gaps.min() < 1e-5
                    swapped += 1
            assert swapped <= 4
