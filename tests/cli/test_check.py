"""Damaged files are refused when they are read, and `tron check` reads everything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import random_sessions, tiny_settings, write_dataset

import tron_cli.data.dataset
from tron_cli.checkpoint import load_checkpoint
from tron_cli.config import ExperimentConfig
from tron_cli.data.dataset import Dataset, DatasetWriter, Sessions
from tron_cli.training.fit import fit
from tron_cli.training.loop import train

Command = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")


@pytest.fixture
def shop(tmp_path: Path) -> Dataset:
    """A dataset with times and session ids; 20 items."""
    rng = np.random.default_rng(3)
    with DatasetWriter(tmp_path / "data" / "tiny") as writer:
        writer.write_items(np.arange(101, 121))
        for split in ("train", "val", "test"):
            rows = random_sessions(rng, 30, 20)
            items = np.concatenate(rows).astype(np.int32)
            offsets = np.cumsum([0, *map(len, rows)])
            times = 10**12 + np.arange(len(items)) * 1000
            writer.write_split(split, [Sessions(items, offsets, times, np.arange(len(rows)))])
        return writer.finish(name="tiny", protocol="every-step")


@pytest.fixture
def best(shop: Dataset, tmp_path: Path) -> Path:
    config = ExperimentConfig(**tiny_settings(max_epochs=1))
    return train(config, shop, tmp_path / "run", device=CPU)


def change(file: str, by: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        np.save(path / file, by(np.load(path / file).copy()))

    return damage


def put(place: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def by(array: np.ndarray) -> np.ndarray:
        array[place] = value
        return array

    return by


def describe(**changes: Any) -> Callable[[Path], None]:
    """Change entries of dataset.json; None takes one away."""

    def damage(path: Path) -> None:
        info = json.loads((path / "dataset.json").read_text())
        info |= changes
        kept = {key: value for key, value in info.items() if value is not None}
        (path / "dataset.json").write_text(json.dumps(kept))

    return damage


def without(split: str, key: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        info = json.loads((path / "dataset.json").read_text())
        del info["splits"][split][key]
        (path / "dataset.json").write_text(json.dumps(info))

    return damage


# All of these were evaluated before, with wrong figures and exit code 0, or with a traceback.
DAMAGES = {
    "reversed items": change("test/items.npy", lambda items: items[::-1]),
    "item 0": change("test/items.npy", put(5, 0)),
    "item above the catalogue": change("test/items.npy", put(5, 21)),
    "negative item": change("test/items.npy", put(5, -1)),
    "offsets that fall": change("test/offsets.npy", put(3, 1)),
    "offsets from elsewhere": change("test/offsets.npy", put(0, 1)),
    "wide items": change("test/items.npy", lambda items: items.astype(np.int64)),
    "items as a table": change("test/items.npy", lambda items: items[None]),
    "items as fractions": change("test/items.npy", lambda items: items.astype(np.float32)),
    "few times": change("test/times.npy", lambda times: times[:-1]),
    "other item ids": change("item_ids.npy", lambda ids: ids[::-1]),
    "item ids as fractions": change("item_ids.npy", lambda ids: ids + 0.5),
    "unknown protocol": describe(protocol="sideways"),
    "no protocol": describe(protocol=None),
    "no splits": describe(splits=None),
    "splits of another kind": describe(splits=[1, 2]),
    "no catalogue": describe(catalogue_fingerprint=None),
    "items of another kind": describe(num_items="20"),
    "no fingerprint": without("test", "fingerprint"),
    "no lost predictions": without("test", "lost_predictions"),
    "events": without("test", "events"),
    "an archive": lambda path: (path / "test" / "items.npy").write_bytes(b"PK\x03\x04rubbish"),
    "no end of brackets": lambda path: (path / "dataset.json").write_text("[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_dataset_is_not_evaluated(
    damage: str, best: Path, shop: Dataset, command: Command, tmp_path: Path
) -> None:
    DAMAGES[damage](shop.path)
    for words in (["evaluate", best], ["check", "tiny"]):
        code, _, err = command(*words, "--data-dir", tmp_path / "data")
        said = [line for line in err.splitlines() if line.startswith("tron: ")]
        assert code == 2, err
        assert str(shop.path) in said[0]
        assert "prepare" in said[0]
        assert len(said[0]) < 500


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_dataset_is_not_trained_on(
    split: str, shop: Dataset, command: Command, tmp_path: Path
) -> None:
    change(f"{split}/items.npy", lambda items: items[::-1])(shop.path)
    words = ["model=popular", "dataset_name=tiny", "--data-dir", shop.path.parent]
    code, _, err = command(
        "train", "--config", "config_yoochoose", *words, "--output-dir", tmp_path / "runs"
    )
    assert code == 2
    assert f"the {split} split of {shop.path} is damaged" in err
    assert not (tmp_path / "runs").exists()


def test_of_large_splits_only_what_cannot_be_is_found_unless_tron_check_reads_them(
    best: Path, shop: Dataset, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tron_cli.data.dataset, "FINGERPRINTED_BYTES", 10)
    where = ["--data-dir", shop.path.parent]
    DAMAGES["reversed items"](shop.path)
    assert command("evaluate", best, *where)[0] == 0
    code, _, err = command("check", "tiny", *where)
    assert code == 2
    assert "the test split" in err
    DAMAGES["item above the catalogue"](shop.path)
    code, _, err = command("evaluate", best, *where)
    assert code == 2
    assert "item 21 of event 6 is not in 1..20" in err


def test_check_says_what_is_sound_and_names_every_fault(shop: Dataset, command: Command) -> None:
    code, out, err = command("check", shop.path)
    assert (code, err) == (0, "")
    assert [line.split()[-1] for line in out.splitlines()[2:]] == ["sound"] * 4
    assert "20 items" in out
    assert "30 sessions" in out
    change("train/times.npy", put(0, 7))(shop.path)
    change("val/session_ids.npy", lambda ids: ids[1:])(shop.path)
    code, out, err = command("check", shop.path, "--json")
    assert code == 2
    found = json.loads(out)
    assert [part["name"] for part in found["parts"] if part["fault"]] == ["train", "val"]
    assert [f"tron: {fault}" for fault in found["faults"]] == err.splitlines()
    assert "times.npy of the train split" in err
    assert "session_ids.npy of the val split" in err


def put_byte(file: str, place: int, value: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray((path / file).read_bytes())
        content[place] = value
        (path / file).write_bytes(content)

    return damage


@pytest.mark.parametrize(
    "damage",
    {
        "another id": put_byte("test/session_ids.txt", 0, ord("x")),
        "an id that is no text": put_byte("test/session_ids.txt", 0, 0xFF),
        "ids cut elsewhere": change("test/session_ids_offsets.npy", put(3, 7)),
        "ids that are gone": lambda path: (path / "test" / "session_ids_offsets.npy").unlink(),
        "another user": change("test/user_ids.npy", put(3, 7)),
        "other losses": change("test/lost_predictions.npy", lambda lost: lost[::-1]),
    }.items(),
    ids=lambda damage: damage[0],
)
def test_damaged_ids_never_come_out_in_files(
    damage: tuple[str, Callable[[Path], None]], tmp_path: Path, command: Command
) -> None:
    rows = random_sessions(np.random.default_rng(3), 30, 20)
    items, offsets = np.concatenate(rows).astype(np.int32), np.cumsum([0, *map(len, rows)])
    ids = np.array([f"visit {number}" for number in range(30)], object)
    with DatasetWriter(tmp_path / "tiny") as writer:
        writer.write_items(np.arange(101, 121))
        lost = np.arange(30)
        for split in ("train", "val", "test"):
            sessions = Sessions(items, offsets, None, ids, np.arange(30))
            writer.write_split(split, [sessions], lost_predictions=lost)
        data = writer.finish(name="tiny", protocol="every-step")
    config = ExperimentConfig(**tiny_settings(model="popular"))
    best = fit(config, data, tmp_path / "run")
    damage[1](data.path)
    files = {name: tmp_path / f"out.{name}" for name in ("run", "qrels")}
    words = [word for name, file in files.items() for word in (f"--{name}", file)]
    for asked in (["evaluate", best, *words, "--full-sessions"], ["check", "tiny"]):
        code, _, err = command(*asked, "--data-dir", tmp_path)
        assert (code, "prepare it again" in err) == (2, True), err
    assert not any(file.exists() for file in files.values())


def test_check_finds_items_that_are_named_twice(tmp_path: Path, command: Command) -> None:
    path = write_dataset(tmp_path, train=[[1, 2, 3]], item_ids=np.array([7, 8, 7])).path
    code, _, err = command("check", path)
    assert code == 2
    assert "names 1 item twice" in err


def flip(file: Path, values: bytes) -> None:
    """Change one bit of an array within a checkpoint."""
    content = bytearray(file.read_bytes())
    place = content.index(values)
    content[place + 2] ^= 0x40
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["best", "last.pt"])
def test_a_flipped_bit_of_a_checkpoint_is_found(
    name: str, best: Path, shop: Dataset, command: Command
) -> None:
    file = best if name == "best" else best.parent / name
    weights = load_checkpoint(file).weights["item_embedding.weight"]
    flip(file, weights.numpy().tobytes())
    for words in (
        ["evaluate", file, "--data-dir", shop.path.parent],
        ["check", file],
        ["check", best.parent],
    ):
        code, _, err = command(*words)
        assert code == 2
        assert f"{file} is damaged: " in err
        assert "checksum" in err


def test_a_file_to_resume_from_of_before_has_no_checksums_and_loads(
    best: Path, command: Command
) -> None:
    last = best.parent / "last.pt"
    content = torch.load(last, weights_only=True)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, last)
    finally:
        torch.serialization.set_crc32_options(before)
    assert load_checkpoint(last).step == content["step"]
    assert command("check", best.parent)[0] == 0


def set_config(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["config"].update({key: value})


CONTENTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "wider": set_config("embedding_dim", 16),
    "deeper": set_config("num_blocks", 2),
    "another network": set_config("model", "gsasrec"),
    "a baseline": set_config("model", "markov"),
    "more items": lambda content: content["dataset"].update(num_items=21),
    "no number of items": lambda content: content["dataset"].pop("num_items"),
    "no weights": lambda content: content["weights"].clear(),
    "weights of another kind": lambda content: content["weights"].update(a=3),
    "weights as a list": lambda content: content.update(weights=[1]),
    "item ids as fractions": lambda content: content.update(item_ids=torch.rand(20)),
    "config as a list": lambda content: content.update(config=[1]),
    "step as text": lambda content: content.update(step="9"),
}


@pytest.mark.parametrize("damage", CONTENTS)
def test_a_checkpoint_whose_parts_do_not_fit_is_one_sentence(
    damage: str, best: Path, shop: Dataset, command: Command
) -> None:
    content = torch.load(best, weights_only=True)
    CONTENTS[damage](content)
    torch.save(content, best)
    for words in (["evaluate", best, "--data-dir", shop.path.parent], ["check", best]):
        code, _, err = command(*words)
        assert code == 2, err
        assert str(best) in err
        assert len(err.splitlines()) == 1


def test_check_of_nothing_is_one_sentence(tmp_path: Path, command: Command) -> None:
    code, _, err = command("check", "nothing", "--data-dir", tmp_path)
    assert code == 2
    assert "no prepared dataset at" in err
