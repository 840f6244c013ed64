"""Exported programs: what other runtimes recommend, beside the network's own states and scores."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import random_checkpoint
from helpers.datasets import random_sessions, write_dataset
from helpers.exports import (
    NETWORKS,
    NUM_ITEMS,
    RUNTIMES,
    WINDOW,
    Runtime,
    in_onnxruntime,
    in_torch,
    make_checkpoint,
    padded,
    read_safetensors,
)
from torch.nn import functional as F

from tron_cli.checkpoint import Checkpoint
from tron_cli.data.batches import pack
from tron_cli.serving import export as export_module
from tron_cli.serving.export import export
from tron_cli.serving.program import Program
from tron_cli.serving.recommender import Recommender


@torch.inference_mode()
def all_scores(checkpoint: Checkpoint, histories: list[list[int]]) -> np.ndarray:
    """Return the scores of all items after each history, float64 [B, I + 1]; of item 0 -inf."""
    model = checkpoint.build_model(torch.device("cpu"))
    table = model.item_table[1 : NUM_ITEMS + 1].double()
    if checkpoint.config.score == "cosine":  # there may be a bias
        table[:, :8] = F.normalize(table[:, :8], dim=1)
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
            scores[row, 1:] = (table * hidden_D).sum(1)
    return scores


def check_lists(
    found: tuple[np.ndarray, np.ndarray], score_BI: np.ndarray, out: list[set[int]]
) -> None:
    """Compare with a sort by descending score, then number, of the items that are not `out`.

    Different items may only change places where their scores differ by float32's rounding.
    """
    items_Bk, scores_Bk = found
    assert (items_Bk.dtype, scores_Bk.dtype) == (np.int64, np.float32)
    score_BI = score_BI.copy()
    for row, numbers in enumerate(out):
        score_BI[row, list(numbers)] = -np.inf
    number_BI = np.broadcast_to(np.arange(NUM_ITEMS + 1), score_BI.shape)
    expected_Bk = np.lexsort((number_BI, -score_BI))[:, : items_Bk.shape[1]]
    right_Bk = np.take_along_axis(score_BI, expected_Bk, axis=1)
    expected_Bk = np.where(right_Bk == -np.inf, 0, expected_Bk)
    np.testing.assert_allclose(scores_Bk, right_Bk, rtol=1e-5, atol=1e-5)
    for row, place in np.argwhere(items_Bk != expected_Bk):
        assert 0 < abs(score_BI[row, items_Bk[row, place]] - right_Bk[row, place]) < 1e-5


def recommended(
    recommender: Recommender, rows: np.ndarray, k: int, filter_rated: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return original ids [B, k], 0 for none, and scores [B, k] after padded histories."""
    lists = recommender.best([row[row > 0] for row in rows], k=k, filter_rated=filter_rated)
    ids = [each.items + [0] * (k - len(each.items)) for each in lists]
    return np.array(ids), np.array([(each.scores + [-np.inf] * k)[:k] for each in lists])


def check_same(found: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray]) -> None:
    """Compare with the same original ids in the same order, after empty histories too.

    Neighbours may change places where float32 states leave their order open: almost never.
    """
    ids_Bk, scores_Bk = right
    np.testing.assert_allclose(found[1], scores_Bk, rtol=1e-5, atol=1e-5)
    differ = np.argwhere(np.where(found[0] > 0, found[0] + 100, 0) != ids_Bk)
    for row, place in differ:
        gaps = np.abs(np.delete(scores_Bk[row], place) - scores_Bk[row, place])
        assert 0 < gaps.min() < 1e-5
    assert len(differ) <= 4


def in_program(checkpoint: Checkpoint) -> Runtime:
    """Run what is exported, before it is."""
    model = checkpoint.build_model(torch.device("cpu"))
    assert checkpoint.popularity is not None
    program = Program([model], "float32", checkpoint.popularity[1:]).eval()

    @torch.inference_mode()
    def run(histories: np.ndarray, k: int, filter_rated: bool) -> tuple[np.ndarray, np.ndarray]:
        found = program(torch.from_numpy(histories), torch.tensor(k), torch.tensor(filter_rated))
        return found[0].numpy(), found[1].numpy()

    return run


# The others have no operation that these, or the tests below, have not.
EXPORTED = {*NETWORKS} - {"tron", "gru4rec", "relative-bert4rec"}


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_runtimes_recommend_as_the_network_does(
    network: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Histories of any length, padded anywhere, with and without their own items."""
    checkpoint = make_checkpoint(tmp_path, **NETWORKS[network])
    histories = random_sessions(rng, 300, NUM_ITEMS, longest=14, shortest=1)
    score_BI = all_scores(checkpoint, histories)
    rows = padded(histories, 17, rng)
    more = padded(random_sessions(rng, 600, NUM_ITEMS, longest=14, shortest=0), 14, rng)
    recommender = Recommender.load(checkpoint.path)
    right = [recommended(recommender, more, 10, filtered) for filtered in (False, True)]
    runs = [in_program(checkpoint)]
    for format, load in RUNTIMES.items() if network in EXPORTED else ():
        export(checkpoint.path, format=format, output=tmp_path / format)
        check_no_paths(next((tmp_path / format).glob("model.*")), network)
        runs.append(load(tmp_path / format))
    for run in runs:
        for filter_rated in (False, True):
            out = [set(history) if filter_rated else set() for history in histories]
            check_lists(run(rows, 10, filter_rated), score_BI, out)
            check_same(run(more, 10, filter_rated), right[filter_rated])
        # One history at a time, as long as it is; all items, and more than there are.
        for history, score_I in zip(histories[:30], score_BI, strict=False):
            row = np.array([history])
            check_lists(run(row, 1, False), score_I[None], [set()])
            check_lists(run(row, NUM_ITEMS, True), score_I[None], [set(history)])
        assert run(rows, NUM_ITEMS + 7, False)[0].shape == (300, NUM_ITEMS)
        assert run(rows, 0, False)[0].shape == (300, 1)
        # Popular items by number among equals, also where there is no place for any event.
        for empty in (np.zeros((2, 0)), np.zeros((2, 3)), np.array([[-1], [NUM_ITEMS + 1]])):
            items, scores = run(empty.astype(np.int64), 4, True)
            assert items.tolist() == [[2, 1, NUM_ITEMS, 3]] * 2
            assert scores.tolist() == [[0.0] * 4] * 2


def check_no_paths(file: Path, network: str) -> None:
    content = file.read_bytes()
    for source in (b"gru4rec.py", b"transformer.py", b"program.py"):
        assert source not in content
    assert b"gru" in content or "gru4rec" not in network  # not compressed


@pytest.mark.parametrize(
    ("network", "table"),
    [("tron", "float16"), ("bert4rec", "int8"), ("recbole", "float16"), ("recbole", "int8")],
)
def test_smaller_tables_score_as_their_rounded_rows(
    table: str, network: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """The rows that safetensors hold, put into the network, give what the program recommends."""
    checkpoint = make_checkpoint(tmp_path, **NETWORKS[network])
    export(checkpoint.path, format="safetensors", output=tmp_path / "weights", table=table)
    export(checkpoint.path, format="torch", output=tmp_path / "torch", table=table)
    tensors, metadata = read_safetensors(tmp_path / "weights")
    tables = [name for name in checkpoint.weights if name.endswith("_embedding.weight")]
    for name in {*tables} - {"position_embedding.weight"}:
        stored = json.loads(metadata["shared"]).get(name, name)
        rows = tensors[stored].float()
        if table == "int8":
            assert tensors[stored].dtype == torch.int8
            rows *= tensors[f"{stored}.scale"][:, None]
        if f"{stored}.bias" in tensors:
            rows = torch.cat([rows, tensors[f"{stored}.bias"][:, None]], dim=1)
        exact = checkpoint.weights[name]
        step = 2**-10 if table == "float16" else 1 / 250
        assert ((rows - exact).abs().amax(1) <= step * exact.abs().amax(1)).all()
        checkpoint.weights[name] = rows
    histories = random_sessions(rng, 200, NUM_ITEMS, longest=9, shortest=1)
    run = in_torch(tmp_path / "torch")
    found = run(padded(histories, 9, rng), 10, False)
    check_lists(found, all_scores(checkpoint, histories), [set()] * len(histories))


def test_a_checkpoint_without_popularity_recommends_nothing_after_them(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path)
    content = torch.load(checkpoint.path, weights_only=True)
    del content["popularity"]
    torch.save(content, checkpoint.path)
    manifest = export(checkpoint.path, format="torch", output=tmp_path / "shop")
    assert "popularity" in manifest["empty_histories"]
    assert "popularity.npy" not in manifest["files"]
    items, scores = in_torch(tmp_path / "shop")(np.zeros((1, 2), np.int64), 3, False)
    assert items.tolist() == [[0, 0, 0]]
    assert scores.tolist() == [[-math.inf] * 3]


def test_hundreds_of_equal_rows_are_ordered_by_number(tmp_path: Path) -> None:
    """More equal items than are asked for, of which float32 products may differ."""
    dataset = write_dataset(tmp_path, train=[[1, 1500]], num_items=1500)
    checkpoint = random_checkpoint(dataset, tmp_path / "a.pt", embedding_dim=24)
    content = torch.load(checkpoint.path, weights_only=True)
    table = content["weights"]["item_embedding.weight"]
    table[1100:1320] = table[4]
    torch.save(content, checkpoint.path)
    recommender = Recommender.load(checkpoint.path)
    histories = np.arange(1, 301)[:, None]
    right = recommender.best(list(histories), k=50, filter_rated=False)
    tied = [row for row, found in enumerate(right) if 104 in found.items]
    assert len(tied) > 4
    for format, load in RUNTIMES.items():
        export(checkpoint.path, format=format, output=tmp_path / format)
        items, _ = load(tmp_path / format)(histories[tied], 50, False)
        for row, found in zip(tied, items, strict=True):
            place = right[row].items.index(104)
            assert (found[place:] + 100).tolist() == right[row].items[place:]


def test_a_program_needs_no_tron(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, **NETWORKS["gru4rec"])
    export(checkpoint.path, format="torch", output=tmp_path / "torch")
    script = (
        "import sys; sys.modules['tron_cli'] = None\nimport torch\n"
        "run = torch.export.load(sys.argv[1]).module()\n"
        "print(run(torch.tensor([[3, 4]]), torch.tensor(2), torch.tensor(True))[0].tolist())"
    )
    words = [sys.executable, "-c", script, tmp_path / "torch" / "model.pt2"]
    done = subprocess.run(words, cwd=tmp_path, env={}, capture_output=True, text=True)
    right = Recommender.load(checkpoint.path).recommend([[103, 104]], k=2, filter_rated=True)
    assert [[number + 100 for number in row] for row in json.loads(done.stdout)] == [right[0].items]


def test_weights_of_a_large_onnx_model_are_in_a_file_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that moves with it."""
    checkpoint = make_checkpoint(tmp_path)
    monkeypatch.setattr(export_module, "_LARGEST_FILE", 100)
    files = export(checkpoint.path, format="onnx", output=tmp_path / "large")["files"]
    table = 4 * checkpoint.weights["item_embedding.weight"].numel()
    assert files["model.onnx.data"]["bytes"] > table
    (tmp_path / "large").rename(tmp_path / "moved")
    items, _ = in_onnxruntime(tmp_path / "moved")(np.array([[3, 9, 4]]), 9, True)
    (right,) = Recommender.load(checkpoint.path).recommend(
        [[103, 109, 104]], k=9, filter_rated=True
    )
    assert (items[0] + 100).tolist() == right.items


def test_a_window_of_one_event(tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = make_checkpoint(tmp_path, num_heads=1)
    changed = dataclasses.replace(checkpoint.config, sequence_length=1)
    content = torch.load(checkpoint.path, weights_only=True)
    content["config"]["sequence_length"] = changed.sequence_length
    position = content["weights"]["position_embedding.weight"]
    content["weights"]["position_embedding.weight"] = position[:1].clone()
    torch.save(content, checkpoint.path)
    export(checkpoint.path, format="torch", output=tmp_path / "shop")
    items, _ = in_torch(tmp_path / "shop")(np.array([[4, 9], [9, 0]]), 5, False)
    assert items[0].tolist() == items[1].tolist()
    right = Recommender.load(checkpoint.path).recommend([[109]], k=5)[0].items
    assert (items[0] + 100).tolist() == right


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    section = page.partition("\n## Export\n")[2].partition("\n## ")[0]
    example = section.partition("```python\n")[2].partition("```")[0]
    export(checkpoint.path, format="onnx", output=tmp_path / "tron-shop-onnx")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(example, found)
    right = Recommender.load(checkpoint.path).recommend([[101, 105]], k=10, filter_rated=False)
    assert found["recommended"] == right[0].items
