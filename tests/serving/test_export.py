"""Exported models: what other runtimes recommend, beside the network's own states and scores."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.checkpoints import random_checkpoint
from helpers.datasets import cyclic_sessions, random_sessions, write_dataset
from helpers.runs import interrupt_at, start, write_config
from safetensors import safe_open
from torch.nn import functional as F

from tron_cli.checkpoint import Checkpoint, load_checkpoint
from tron_cli.config import config_from_dict
from tron_cli.data.batches import pack
from tron_cli.errors import InputError, RunError
from tron_cli.files import locked
from tron_cli.serving import export as export_module
from tron_cli.serving.export import export
from tron_cli.serving.recommender import Recommender
from tron_cli.training.loop import InterruptedRunError

NUM_ITEMS, WINDOW = 60, 5

NETWORKS: dict[str, dict[str, Any]] = {
    "tron": {},
    "padding-attended": {"key_padding_mask": False, "num_heads": 2},
    "recbole": {
        "block": "post-norm",
        "activation": "gelu",
        "positions": "start",
        "reuse_item_embeddings": False,
        "output_bias": True,
        "num_blocks": 2,
    },
    "ligr": {"block": "ligr", "activation": "swiglu", "feed_forward_dim": 32, "positions": "none"},
    "gsasrec": {"model": "gsasrec", "num_heads": 2, "key_padding_mask": False},
    "bsarec": {
        "block": "bsarec",
        "activation": "gelu",
        "training_windows": "prefixes",
        "low_frequencies": 3,
        "num_heads": 2,
    },
    "relative": {"relative_positions": True, "positions": "none", "num_heads": 2, "num_blocks": 2},
    "relative-bert4rec": {"model": "bert4rec", "relative_positions": True, "num_heads": 2},
    "gru4rec": {"model": "gru4rec", "num_blocks": 2},
    "bert4rec": {
        "model": "bert4rec",
        "activation": "gelu",
        "prediction_head": True,
        "output_bias": True,
        "num_heads": 2,
    },
    "cosine": {"score": "cosine", "normalize_inputs": True, "output_bias": True},
    "cosine-gru4rec": {"model": "gru4rec", "score": "cosine", "learn_score_scale": True},
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
    more = padded(random_sessions(rng, 3000, NUM_ITEMS, longest=14, shortest=0), 14, rng)
    recommender = Recommender.load(checkpoint.path)
    right = [recommended(recommender, more, 10, filtered) for filtered in (False, True)]
    for format, load in RUNTIMES.items():
        export(checkpoint.path, format=format, output=tmp_path / format)
        run = load(tmp_path / format)
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


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return make_checkpoint(tmp_path)


def test_the_folder_describes_itself(
    checkpoint: Checkpoint, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    folder = tmp_path / "shop"
    code, out, err = command("export", checkpoint.path, "--format", "torch", "-o", folder, "--json")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    assert printed.pop("folder") == str(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert printed == manifest
    assert set(manifest["inputs"]) == {"histories", "k", "filter_rated"}
    assert set(manifest["outputs"]) == {"items", "scores"}
    assert manifest["dataset"] == checkpoint.dataset
    others = {"model.pt2", "item_ids.npy", "popularity.npy", "config.json"}
    assert set(manifest["files"]) == others
    assert {file.name for file in folder.iterdir()} == {*others, "manifest.json"}
    for name, described in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert described["bytes"] == len(content)
        assert described["sha256"] == hashlib.sha256(content).hexdigest()
    assert np.load(folder / "item_ids.npy").tolist() == list(range(101, 101 + NUM_ITEMS))
    popularity = np.load(folder / "popularity.npy")
    assert popularity[[0, 1, NUM_ITEMS - 1]].tolist() == [1, 2, 1]
    assert popularity.sum() == 4
    settings = json.loads((folder / "config.json").read_text())
    assert config_from_dict(settings) == checkpoint.config
    assert not list(tmp_path.glob(".shop*"))


def test_text_ids_are_lines(tmp_path: Path) -> None:
    ids = np.array(["é", "a b", "7"], dtype=object)
    dataset = write_dataset(tmp_path, train=[[1, 2, 3]], item_ids=ids)
    checkpoint = random_checkpoint(dataset, tmp_path / "a.pt")
    export(checkpoint.path, format="safetensors", output=tmp_path / "shop")
    assert (tmp_path / "shop" / "item_ids.txt").read_text("utf-8") == "é\na b\n7\n"


def test_the_default_folder_is_named_after_the_model(
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., tuple[int, str, str]],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command("export", checkpoint.path, "--format", "safetensors")
    assert (code, err) == (0, "")
    assert out.endswith("folder tron-tiny-safetensors\n")
    assert (tmp_path / "tron-tiny-safetensors" / "manifest.json").is_file()


@pytest.mark.parametrize("network", ["tron", "recbole", "gru4rec"])
def test_safetensors_hold_each_tensor_once(network: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, **NETWORKS[network])
    export(checkpoint.path, format="safetensors", output=tmp_path / "shop")
    tensors, metadata = read_safetensors(tmp_path / "shop")
    shared = json.loads(metadata["shared"])
    assert (len(shared) == 1) == (network != "recbole")
    assert not tensors.keys() & shared.keys()
    tensors |= {name: tensors[other] for name, other in shared.items()}
    assert tensors.keys() == checkpoint.weights.keys()
    for name, values in checkpoint.weights.items():
        assert torch.equal(tensors[name], values)
    assert config_from_dict(json.loads(metadata["config"])) == checkpoint.config
    assert json.loads(metadata["dataset"]) == checkpoint.dataset


def read_safetensors(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("table", ["float16", "int8"])
@pytest.mark.parametrize("network", ["tron", "bert4rec", "recbole"])
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


def test_histories_without_events(tmp_path: Path) -> None:
    """Popular items by number among equals, also where there is no place for any event."""
    checkpoint = make_checkpoint(tmp_path)
    for format, load in RUNTIMES.items():
        export(checkpoint.path, format=format, output=tmp_path / format)
        run = load(tmp_path / format)
        rows = [np.zeros((2, 0)), np.zeros((2, 3)), np.array([[-1], [NUM_ITEMS + 1]])]
        for row in rows:
            items, scores = run(row.astype(np.int64), 4, True)
            assert items.tolist() == [[2, 1, NUM_ITEMS, 3]] * 2
            assert scores.tolist() == [[0.0] * 4] * 2


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


def test_a_program_needs_no_tron_and_tells_no_paths(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, **NETWORKS["gru4rec"])
    for format, file in {"torch": "model.pt2", "onnx": "model.onnx"}.items():
        export(checkpoint.path, format=format, output=tmp_path / format)
        content = (tmp_path / format / file).read_bytes()
        assert b"gru4rec.py" not in content
        assert b"gru" in content  # not compressed
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
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that moves with it."""
    export(checkpoint.path, format="onnx", output=tmp_path / "small")
    monkeypatch.setattr(export_module, "_LARGEST_FILE", 100)
    files = export(checkpoint.path, format="onnx", output=tmp_path / "large")["files"]
    table = 4 * checkpoint.weights["item_embedding.weight"].numel()
    assert files["model.onnx.data"]["bytes"] > table
    (tmp_path / "large").rename(tmp_path / "moved")
    row = np.array([[3, 9, 4]])
    small, large = (in_onnxruntime(tmp_path / name)(row, 9, True) for name in ("small", "moved"))
    assert small[0].tolist() == large[0].tolist()


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


def test_last_pt_is_exported_with_the_moves_that_are_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that RowAdam had put to sleep are brought up to date first."""
    write_dataset(tmp_path, train=cyclic_sessions(60, 1), val=cyclic_sessions(9, 2), num_items=500)
    config = write_config(tmp_path, optimizer="row_adam")
    run = tmp_path / "runs" / "a"
    interrupt_at(monkeypatch, 5, signal.SIGTERM)
    with pytest.raises(InterruptedRunError):
        start(config, tmp_path, tmp_path / "runs", "a")
    export(run / "last.pt", format="safetensors", output=tmp_path / "shop")
    tensors, _ = read_safetensors(tmp_path / "shop")
    found = load_checkpoint(run / "last.pt")
    name = "item_embedding.weight"
    assert torch.equal(tensors[name], found.build_model(torch.device("cpu")).state_dict()[name])
    assert not torch.equal(tensors[name], found.weights[name])


def test_force_replaces_an_export(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = tmp_path / "shop"
    export(checkpoint.path, format="safetensors", output=shop)
    with pytest.raises(InputError, match="exists already; pass --force to replace it, or name"):
        export(checkpoint.path, format="torch", output=shop)
    with monkeypatch.context() as patch:
        patch.setattr("tron_cli.serving.export._manifest", _fail)
        with pytest.raises(ArithmeticError):
            export(checkpoint.path, format="torch", output=shop, force=True)
    assert (shop / "model.safetensors").is_file()  # a failure keeps the old one
    export(checkpoint.path, format="torch", output=shop, force=True)
    assert not (shop / "model.safetensors").exists()
    assert (shop / "model.pt2").is_file()
    (shop).rename(tmp_path / ".shop.replaced")  # as a kill between two renames leaves it
    with pytest.raises(InputError, match="exists already"):
        export(checkpoint.path, format="torch", output=shop)
    assert not list(tmp_path.glob(".shop*"))


def _fail(*_: object) -> None:
    raise ArithmeticError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(
    number: int, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    script = (
        "import os, signal, sys\n"
        # A shell starts its background jobs with SIGINT ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tron_cli.serving import export\n"
        f"export._manifest = lambda *a: os.kill(os.getpid(), {int(number)})\n"
        "from tron_cli.cli import main\n"
        "sys.argv = ['tron', 'export', sys.argv[1], '--format', 'safetensors', '-o', sys.argv[2]]\n"
        "main()"
    )
    words = [sys.executable, "-c", script, checkpoint.path, tmp_path / "shop"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*shop*"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--format"),
        (["--format", "tflite"], "tflite"),
        (["--format", "torch", "--table", "int4"], "int4"),
        (["--format", "torch", "-o", "a.pt"], "a.pt exists already"),
        (["--format", "torch", "-o", "."], "exists already"),
        (["--format", "torch", "-o", ""], "it is empty"),
        (["--format", "torch", "-o", "/proc/x"], "cannot write to /proc"),
        (["--format", "torch", "-o", "/dev/null/x"], "cannot write to /dev/null"),
        (["--format", "torch", "-o", "a.pt", "--force"], "a.pt has no manifest.json"),
        (["--format", "torch", "-o", ".", "--force"], "has no manifest.json"),
        (["--format", "torch", "-o", "link", "--force"], "link has no manifest.json"),
        (["--format", "torch", "-o", "a.pt/x"], "cannot write to a.pt"),
        (["--format", "torch", "-o", "/proc/x/y"], "cannot write to /proc/x"),
        (["--format", "torch", "-o", "link"], "link exists already"),
        (["--format", "torch", "-o", "x" * 300], "cannot write"),
        (["--format", "torch", "--plugin", "absent.py:Model"], "absent.py"),
        (["--format", "torch", "k=3"], "k=3"),
    ],
)
def test_wrong_words(
    words: list[str],
    sentence: str,
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., tuple[int, str, str]],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    code, out, err = command("export", "a.pt", *words)
    assert code == 2
    assert out == ""
    assert sentence in err
    assert sorted(tmp_path.iterdir()) == before


def refused(path: Path, kind: type[Exception] = InputError, **options: Any) -> str:
    output = path.parent / "shop"
    with pytest.raises(kind) as error:
        export(path, **{"format": "torch", "output": output, **options})
    assert not [entry for entry in path.parent.iterdir() if "shop" in entry.name]
    return str(error.value)


MINE = (
    "num_items, sequence_length, embedding_dim, num_blocks, dropout_rate, "
    "reuse_item_embeddings, output_bias, session_parallel, train_batch_size"
)


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no checkpoint at" in refused(tmp_path / "absent.pt")
    (tmp_path / "empty.pt").touch()
    assert "truncated or no tron checkpoint" in refused(tmp_path / "empty.pt")
    dataset = write_dataset(tmp_path, train=[[1, 2]])
    for name in ("popular", "markov", "ease"):
        random_checkpoint(dataset, tmp_path / "b.pt", model=name)
        assert f"is the baseline {name}, and only networks" in refused(tmp_path / "b.pt")
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from tron_cli.models.gru4rec import GRU4Rec\nclass Mine(GRU4Rec):\n"
        f"    def __init__(self, *, {MINE}):\n"
        f"        super().__init__({', '.join(f'{name}={name}' for name in MINE.split(', '))})\n"
    )
    monkeypatch.chdir(tmp_path)
    random_checkpoint(dataset, tmp_path / "mine.pt", model="mine.py:Mine")
    assert "model=mine.py:Mine, code from outside tron" in refused(tmp_path / "mine.pt")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "safetensors"])
def test_a_missing_package_is_named_with_what_installs_it(
    package: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    format = package.removesuffix("script")
    sentence = refused(checkpoint.path, format=format)
    assert f"needs the package {package}" in sentence
    assert sentence.endswith(f"run: pip install 'tron-recsys[{format}]'")


@pytest.mark.parametrize(
    ("name", "value", "table", "sentence"),
    [
        ("item_embedding.weight", math.inf, "int8", "weights hold NaN or infinite"),
        ("item_embedding.weight", 1e5, "float16", "the range of float16"),
        ("position_embedding.weight", math.nan, "float32", "weights hold NaN"),
    ],
)
@pytest.mark.parametrize("format", ["torch", "safetensors"])
def test_weights_that_are_not_finite(
    name: str, value: float, table: str, sentence: str, format: str, checkpoint: Checkpoint
) -> None:
    content = torch.load(checkpoint.path, weights_only=True)
    content["weights"][name][2, 1] = value
    torch.save(content, checkpoint.path)
    assert sentence in refused(checkpoint.path, RunError, format=format, table=table)


def test_a_killed_export_leaves_nothing_that_looks_finished(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The next one removes what it left."""
    script = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from tron_cli.serving import export\n"
        "export._manifest = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "export.export(Path(sys.argv[1]), format='safetensors', output=Path(sys.argv[2]))"
    )
    output = tmp_path / "shop"
    killed = subprocess.run([sys.executable, "-c", script, checkpoint.path, output])
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists()
    assert (tmp_path / ".shop.partial" / "model.safetensors").exists()
    export(checkpoint.path, format="safetensors", output=output)
    assert not list(tmp_path.glob(".shop*"))


def test_two_exports_into_one_folder(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shop = tmp_path / "shop"
    sentence = "shop is being written by this process; wait until it ends, or name another --output"
    with locked(tmp_path / ".shop.lock", shop, "wait"), pytest.raises(InputError, match=sentence):
        export(checkpoint.path, format="safetensors", output=shop)
    assert not (tmp_path / "shop").exists()


@pytest.mark.parametrize("format", ["onnx", "safetensors", "torch"])
def test_a_full_disk(format: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The limit on the size of files stands for it."""
    script = (
        "import resource, sys\nfrom tron_cli.cli import _run\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "sys.exit(_run(sys.argv[1:], False))"
    )
    words = ["export", checkpoint.path, "--format", format, "-o", tmp_path / "shop"]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert f"cannot write {tmp_path / 'shop'}" in done.stderr
    assert not list(tmp_path.glob("*shop*"))


def test_the_example_of_the_documentation(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    section = page.partition("\n## Export\n")[2].partition("\n## ")[0]
    example = section.partition("```python\n")[2].partition("```")[0]
    export(checkpoint.path, format="onnx", output=tmp_path / "tron-shop-onnx")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(example, found)
    right = Recommender.load(checkpoint.path).recommend([[101, 105]], k=10, filter_rated=False)
    assert found["recommended"] == right[0].items
