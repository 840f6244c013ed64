"""Checkpoints: whole or absent, safe to load, and complete."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import random_checkpoint
from helpers.datasets import cyclic_sessions, tiny_settings, write_dataset
from safetensors.numpy import load_file

from tron_cli.checkpoint import (
    Checkpoint,
    best_checkpoint,
    checkpoint_name,
    dataset_identity,
    encode_item_ids,
    load_checkpoint,
    save_checkpoint,
)
from tron_cli.config import ExperimentConfig, config_from_dict
from tron_cli.errors import InputError, RunError
from tron_cli.models.base import build_model
from tron_cli.models.sasrec import SASRec

TEXT_IDS = np.array(["a b", "100%", "é", "7", "x\u2028y"], dtype=object)


def save(path: Path, **changes: Any) -> tuple[SASRec, ExperimentConfig]:
    config = ExperimentConfig(**tiny_settings(output_bias=True, positions="start"))
    model = build_model(config, 5)
    content: dict[str, Any] = {
        "config": config,
        "model": model,
        "step": 12,
        "epoch": 3,
        "metrics": {"R@5": 0.25},
        "dataset": {"name": "tiny", "num_items": 5},
        "item_ids": encode_item_ids(np.arange(5)),
        "training": {},
    }
    save_checkpoint(path, **{**content, **changes})
    return model, config


def one_sentence(message: str) -> bool:
    return "\n" not in message and len(message) < 400


def test_a_model_may_map_its_weights_without_a_copy(tmp_path: Path) -> None:
    save(tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    found = load_checkpoint(tmp_path / "a.pt")
    model = found.build_model(torch.device("cpu"), mapped=True)
    weights = found.weights["item_embedding.weight"]
    assert model.item_table.data_ptr() == weights.data_ptr()
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        model.item_table[2] += 1
    assert (tmp_path / "a.pt").read_bytes() == before


def stored_in_half(path: Path, target: Path) -> Path:
    content = torch.load(path, weights_only=True)
    content["weights"] = {
        name: values.half() if values.dtype == torch.float32 else values
        for name, values in content["weights"].items()
    }
    torch.save(content, target)
    return target


@pytest.mark.parametrize("mapped", [False, True])
def test_weights_stored_in_half_precision_are_computed_with_in_float32(
    mapped: bool, tmp_path: Path
) -> None:
    model, _ = save(tmp_path / "a.pt")
    found = load_checkpoint(stored_in_half(tmp_path / "a.pt", tmp_path / "half.pt"))
    rebuilt = found.build_model(torch.device("cpu"), mapped=mapped).state_dict()
    for name, values in model.state_dict().items():
        rounded = torch.from_numpy(values.numpy().astype(np.float16).astype(np.float32))
        assert rebuilt[name].dtype == torch.float32
        assert torch.equal(rebuilt[name], rounded)


@pytest.mark.parametrize("changes", [{}, {"reuse_item_embeddings": False}, {"score": "cosine"}])
def test_every_command_reads_half_precision_as_the_rounded_weights(
    changes: dict[str, Any], tmp_path: Path, command: Any
) -> None:
    """Figures, run files, lists and exports equal those of the same numbers stored as float32."""
    data = write_dataset(tmp_path, train=cyclic_sessions(30, 1), test=cyclic_sessions(20, 2))
    random_checkpoint(data, tmp_path / "a.pt", torch_seed=1, **changes)
    half = stored_in_half(tmp_path / "a.pt", tmp_path / "half.pt")
    content = torch.load(half, weights_only=True)
    content["weights"] = {
        name: values.float() if values.dtype == torch.float16 else values
        for name, values in content["weights"].items()
    }
    torch.save(content, tmp_path / "rounded.pt")
    found = []
    for name in ("half", "rounded"):
        file = tmp_path / f"{name}.pt"
        words = ["evaluate", file, "--data-dir", tmp_path, "--run", tmp_path / "run", "--json"]
        report = json.loads(run(command, *words))
        lists = run(command, "recommend", file, "--history", "101 105", "--scores")
        similar = run(command, "similar", file, "103")
        run(command, "export", file, "--format", "safetensors", "--output", tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        exported = {key: values.tolist() for key, values in tensors.items()}
        found.append((report["metrics"], (tmp_path / "run").read_text(), lists, similar, exported))
    assert found[0] == found[1]


def run(command: Any, *words: object) -> str:
    code, out, err = command(*words)
    assert code == 0, err
    return out


@pytest.mark.parametrize(
    "popularity",
    [[1] * 6, torch.ones(5, dtype=torch.int64), torch.ones(6), -torch.ones(6, dtype=torch.int64)],
)
def test_popularity_that_is_no_count_per_item_is_refused(popularity: Any, tmp_path: Path) -> None:
    save(tmp_path / "a.pt", popularity=popularity)
    with pytest.raises(InputError, match="its popularity is not") as error:
        load_checkpoint(tmp_path / "a.pt")
    assert one_sentence(str(error.value))


def test_it_holds_all_that_evaluation_needs(tmp_path: Path) -> None:
    data = write_dataset(tmp_path, train=[[1, 2, 5]], protocol="last-item")
    model, config = save(tmp_path / "a.pt", dataset=dataset_identity(data))
    found = load_checkpoint(tmp_path / "a.pt")
    assert found.config == config
    assert (found.step, found.epoch, found.metrics) == (12, 3, {"R@5": 0.25})
    assert found.dataset == {
        "name": "tiny",
        "protocol": "last-item",
        "num_items": 5,
        "catalogue_fingerprint": data.info["catalogue_fingerprint"],
        "train_fingerprint": data.info["splits"]["train"]["fingerprint"],
    }
    rebuilt = found.build_model(torch.device("cpu"))
    assert not rebuilt.training
    for name, value in model.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name], value)


def test_it_is_mapped_and_the_model_has_its_own_memory(tmp_path: Path) -> None:
    """A checkpoint of 4 GB opens at once, and may be replaced while its weights are used."""
    save(tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    found = load_checkpoint(tmp_path / "a.pt")
    random_state = torch.get_rng_state()
    rebuilt = found.build_model(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), random_state), "weights drawn only to be replaced"
    with torch.no_grad():
        for weights in rebuilt.parameters():
            weights.zero_()
    assert any(bool(value.any()) for value in found.weights.values())
    assert (tmp_path / "a.pt").read_bytes() == before
    save(tmp_path / "a.pt", step=13)
    assert any(bool(value.any()) for value in found.weights.values())
    assert load_checkpoint(tmp_path / "a.pt").step == 13


STATE = {"optimizer": {"moments": torch.rand(1000)}, "scaler": {}, "progress": {}}


@pytest.mark.parametrize("training", [{}, STATE])
def test_a_checkpoint_is_a_sound_zip_file(training: dict[str, Any], tmp_path: Path) -> None:
    """Scanners and converters can read it, with the checksums that loading compares."""
    save(tmp_path / "a.pt", training=training)
    archive = zipfile.ZipFile(tmp_path / "a.pt")
    assert archive.testzip() is None
    assert all(member.CRC for member in archive.infolist())
    assert load_checkpoint(tmp_path / "a.pt").training.keys() == training.keys()


def test_it_loads_with_weights_only(tmp_path: Path) -> None:
    """RecTools, RePlay and Transformers4Rec need weights_only=False, which executes code."""
    save(tmp_path / "a.pt", item_ids=encode_item_ids(TEXT_IDS))
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content["step"] == 12
    assert content["config"]["embedding_dim"] == 8


@pytest.mark.parametrize(
    "ids", [np.array([5, -3, 2**62, 0, 9]), np.array([1, 2], np.int32), TEXT_IDS]
)
def test_item_ids_come_back(ids: np.ndarray, tmp_path: Path) -> None:
    dataset = {"name": "tiny", "num_items": len(ids)}
    save(tmp_path / "a.pt", item_ids=encode_item_ids(ids), dataset=dataset)
    found = load_checkpoint(tmp_path / "a.pt").decoded_item_ids()
    assert found.tolist() == ids.tolist()


def test_a_damaged_or_foreign_file_is_one_sentence(tmp_path: Path) -> None:
    save(tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    contents = {
        "truncated": good[: len(good) // 2],
        "almost whole": good[:-1],
        "empty": b"",
        "random": np.random.default_rng(0).bytes(5000),
        "text": b"hello\n",
    }
    for name, content in contents.items():
        file = tmp_path / f"{name}.pt"
        file.write_bytes(content)
        with pytest.raises(InputError, match=re.escape(str(file))) as error:
            load_checkpoint(file)
        assert one_sentence(str(error.value))


class _Code:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize(
    "by", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, protocol=2))]
)
def test_code_in_a_file_is_not_executed(by: Any, tmp_path: Path) -> None:
    by({"format_version": 1, "weights": _Code(tmp_path / "executed")}, tmp_path / "evil.pt")
    with pytest.raises(InputError) as error:
        load_checkpoint(tmp_path / "evil.pt")
    assert one_sentence(str(error.value))
    assert "weights_only" not in str(error.value)  # torch's own message advises to switch it off
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"format_version": 2},
        {"weights": {}},
        {},
        [1, 2],
        torch.zeros(3),
        {"format_version": 1},
        {"format_version": 1, "config": {"dataset_name": "x"}},
    ],
)
def test_other_content_is_one_sentence(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt") as error:
        load_checkpoint(tmp_path / "other.pt")
    assert one_sentence(str(error.value))


def test_a_setting_of_a_later_version_is_one_sentence(tmp_path: Path) -> None:
    save(tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    content["config"]["flux_capacitor"] = 3
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"another version of tron.*flux_capacitor"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_setting_that_an_older_file_lacks_has_its_default(tmp_path: Path) -> None:
    """Before `score` was a setting, every score was a dot product."""
    model, config = save(tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    for name in ("score", "score_scale", "learn_score_scale", "normalize_inputs"):
        del content["config"][name]
    torch.save(content, tmp_path / "a.pt")
    found = load_checkpoint(tmp_path / "a.pt")
    assert found.config == config
    served = found.build_model(torch.device("cpu"), mapped=True).scored_table()
    assert torch.equal(served, model.item_table[:6])
    assert served.data_ptr() == found.weights["item_embedding.weight"].data_ptr()


def test_a_missing_file_or_an_unfinished_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "no.pt")
    save(tmp_path / "last.pt")
    with pytest.raises(InputError, match="expected one finished checkpoint"):
        load_checkpoint(tmp_path)


def test_a_run_folder_stands_for_its_best_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "last.pt", step=99)
    save(tmp_path / "tron-best.pt", step=7)
    assert best_checkpoint(tmp_path) == tmp_path / "tron-best.pt"
    assert load_checkpoint(tmp_path).step == 7
    save(tmp_path / "tron-other.pt", step=8)
    with pytest.raises(InputError, match=r"found 2 \(tron-best\.pt, tron-other\.pt\)"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("fails_at", ["torch.save", "os.fsync", "pathlib.Path.replace"])
def test_a_save_that_fails_leaves_the_old_file_whole(
    fails_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a.pt", step=1)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(fails_at, fail)
    with pytest.raises(RunError, match=r"a\.pt .*no space.*make room"):
        save(tmp_path / "a.pt", step=2)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "a.pt").step == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "a.pt"]


def test_the_name_says_what_was_trained() -> None:
    config = config_from_dict(
        {"dataset_name": "otto", "num_blocks": 2, "dropout_rate": 0.05, "embedding_dim": 200}
    )
    assert checkpoint_name(config, 12000, {"R@20": 0.472}) == (
        "tron-otto-step=12000-loss=ssm-negs=16384+127-topk=100-emb=200-blocks=2-dropout=0.05"
        "-R@20=0.4720.pt"
    )
    plain = config_from_dict({"dataset_name": "shop", "loss": "bce", "topk_sampling": False})
    assert checkpoint_name(plain, 5, {}).startswith(
        "sasrec-shop-step=5-loss=bce-negs=16384+127-emb"
    )


@pytest.mark.parametrize("metric", ["R@20", "nDCG(dcg='exp-log2')@10", "Success@5", "R(rel=1)@20"])
@pytest.mark.parametrize("dataset_name", ["otto", "my shop", "a/b", "c:d"])
def test_the_name_lives_on_every_file_system(metric: str, dataset_name: str) -> None:
    try:
        config = config_from_dict({"dataset_name": dataset_name, "val_metric": metric})
    except InputError:  # refusing is as good as replacing
        return
    name = checkpoint_name(config, 10**9, {metric: 0.5})
    assert not set(name) & set('<>:"/\\|?*')
    assert len(name) < 200


def test_a_label_is_only_a_label(tmp_path: Path) -> None:
    save(tmp_path / "a.pt")
    (tmp_path / "a.pt").rename(tmp_path / "renamed by hand.pt")
    found = load_checkpoint(tmp_path / "renamed by hand.pt")
    assert isinstance(found, Checkpoint)
    assert found.step == 12
