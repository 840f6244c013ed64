"""The folder that `tron export` writes: what it holds, when it is replaced, what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import random_checkpoint
from helpers.datasets import cyclic_sessions, write_dataset
from helpers.exports import NETWORKS, NUM_ITEMS, make_checkpoint, read_safetensors
from helpers.runs import interrupt_at, start, write_config

from tron_cli.checkpoint import Checkpoint, load_checkpoint
from tron_cli.config import config_from_dict
from tron_cli.errors import InputError, RunError
from tron_cli.files import locked
from tron_cli.serving.export import export
from tron_cli.training.loop import InterruptedRunError


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
def test_a_full_disk(
    format: str,
    checkpoint: Checkpoint,
    tmp_path: Path,
    command: Callable[..., tuple[int, str, str]],
) -> None:
    """The limit on the size of files stands for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        code, _, err = command(
            "export", checkpoint.path, "--format", format, "-o", tmp_path / "shop"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert err.count("\n") == 1
    assert f"cannot write {tmp_path / 'shop'}" in err
    assert not list(tmp_path.glob("*shop*"))
