"""Published checkpoints: cards, figures and hashes; how they are packed and trained again."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.datasets import cyclic_sessions, write_dataset
from helpers.runs import start, write_config

import tron_cli
from benchmarks import pretrained
from benchmarks.accuracy.runs import RESULTS
from benchmarks.commands import hardware
from tron_cli.checkpoint import load_checkpoint
from tron_cli.errors import InputError

PUBLISHED = sorted(pretrained.PRETRAINED.glob("*.pt"))
SHOWN = re.compile(r"^\| (\S+) \| (\S+)(?: \((\S+)\))? \| (\S+) \((\S+)\) \|$", re.MULTILINE)


def figures_of_card(card: str) -> dict[str, dict[str, Any]]:
    """Figures by split and measure: value and standard error, None where there is none."""
    found: dict[str, dict[str, Any]] = {"validation": {}, "test": {}}
    for measure, value, stderr, test_value, test_stderr in SHOWN.findall(card):
        found["validation"][measure] = (value, stderr or None)
        found["test"][measure] = (test_value, test_stderr)
    return found


def check_card(file: Path, results: Path) -> None:
    card = file.with_suffix(".md").read_text()
    assert hashlib.sha256(file.read_bytes()).hexdigest() in card
    assert f"benchmarks/results/accuracy/{file.stem}.json" in card
    result = json.loads((results / f"{file.stem}.json").read_text())
    figures = figures_of_card(card)
    assert figures["test"] == {
        measure: (f"{figure['value']:.4f}", f"{figure['stderr']:.4f}")
        for measure, figure in result["test"]["metrics"].items()
    }
    for measure, (value, _) in figures["validation"].items():
        assert value == f"{result['validation'][measure]:.4f}"
    for command in result["commands"][:-1]:
        assert command in card
    assert result["commit"] in card
    found = load_checkpoint(file)
    assert found.popularity is None
    assert found.knn is None
    assert not found.training
    history = found.decoded_item_ids()[:3].tolist()
    (recommended,) = tron_cli.Recommender.load(file).recommend([history], k=5)
    assert len(set(recommended.items) - set(history)) == 5


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_a_published_checkpoint_is_that_of_its_card_and_its_result(file: Path) -> None:
    check_card(file, RESULTS)


def test_cards_and_records_name_files_and_all_is_small() -> None:
    folder = pretrained.PRETRAINED
    cards = {path.stem for path in folder.glob("*.md")} - {"README"}
    assert cards == {path.stem for path in PUBLISHED}
    for best in folder.glob("BEST-*"):
        assert (folder / best.read_text().strip()) in PUBLISHED
    assert sum(path.stat().st_size for path in PUBLISHED) < 3.5e6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a dataset and a run of it."""
    folder = tmp_path_factory.mktemp("trained")
    sessions = cyclic_sessions(40, 1)
    val = [[*session, session[-1] % 20 + 1] for session in sessions]
    test = [[*session, session[-1] % 20 + 1] for session in val]
    write_dataset(
        folder / "data", name="ml1m_tiny", protocol="last-item",
        train=sessions, val=val, test=test, num_items=20,
    )  # fmt: skip
    config = write_config(folder, dataset_name="ml1m_tiny", filter_rated=True)
    start(config, folder / "data", folder / "runs", "net", seed=5)
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy of that folder with the run's result; published files go there too."""
    place = tmp_path / "place"
    shutil.copytree(trained, place)
    for name in ("RESULTS", "PRETRAINED"):
        (place / name).mkdir()
        monkeypatch.setattr(pretrained, name, place / name)
    train = f"tron train --config {place / 'config.py'} seed=5 --name net"
    write_result(place, [train, "tron evaluate runs/net"])
    return place


def write_result(place: Path, commands: list[str], name: str = "net") -> None:
    run = load_checkpoint(place / "runs" / name)
    val, test = (
        tron_cli.evaluate(run.path, data_dir=place / "data", split=split, device="cpu").report
        for split in ("val", "test")
    )
    result = {
        "title": "Network", "dataset": "ml1m_tiny", "commands": commands, "commit": "abc1234",
        "hardware": hardware(), "seed": 5, "training_seconds": 7200, "steps": run.step,
        "validation": {name: each["value"] for name, each in val["metrics"].items()}, "test": test,
    }  # fmt: skip
    (place / "RESULTS" / "net.json").write_text(json.dumps(result))


def pack(place: Path, *words: str, checkpoint: Path = Path("runs/net")) -> None:
    pretrained.main(
        ["pack", str(place / checkpoint), "--name", "net", "--prepare", "tron prepare mine",
         "--data-dir", str(place / "data"), *words]
    )  # fmt: skip


def test_a_packed_checkpoint_is_half_as_large_and_has_its_card(place: Path) -> None:
    pack(place, "--note", "It is the first of three seeds.", "--best")
    file = place / "PRETRAINED" / "net.pt"
    check_card(file, place / "RESULTS")
    card = file.with_suffix(".md").read_text()
    for text in ("stored as float16", "first of three seeds", "tron prepare mine\n", "Harper",
                 "2.00 hours", "tron evaluate pretrained/net.pt\n"):  # fmt: skip
        assert text in card
    weights = torch.load(file, weights_only=True)["weights"]
    original = load_checkpoint(place / "runs" / "net").weights
    assert weights.keys() == original.keys()
    for name, values in original.items():
        assert torch.equal(weights[name], values.half())
    assert (place / "PRETRAINED" / "BEST-ml1m").read_text() == "net.pt\n"


def change(place: Path, change: Callable[[dict[str, Any]], None], result: bool = True) -> None:
    """Change the run's best checkpoint and, if asked, its result."""
    path = load_checkpoint(place / "runs" / "net").path
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    if result:
        write_result(place, ["tron train", "tron evaluate runs/net"])


def near(content: dict[str, Any]) -> None:
    """Make items so alike that half precision cannot tell them apart."""
    table = content["weights"]["item_embedding.weight"]
    table.copy_(1 + 1e-5 * torch.randn(table.shape, generator=torch.manual_seed(1)))


def large(content: dict[str, Any]) -> None:
    content["weights"]["item_embedding.weight"] *= 1e6


@pytest.mark.parametrize("changed", [near, large])
def test_weights_stay_in_float32_where_half_precision_changes_a_figure(
    place: Path, changed: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    change(place, changed)
    pack(place)
    file = place / "PRETRAINED" / "net.pt"
    check_card(file, place / "RESULTS")
    assert "stored as float32" in file.with_suffix(".md").read_text()
    assert "float16 changes R@5 value on val" in capsys.readouterr().err
    original = load_checkpoint(place / "runs" / "net").weights
    for name, values in load_checkpoint(file).weights.items():
        assert values.dtype == torch.float32
        assert torch.equal(values, original[name])


def with_knn(content: dict[str, Any]) -> None:
    content["knn"] = {"weight": 1.0, "settings": {}, "arrays": {}}


def without_an_item(content: dict[str, Any]) -> None:
    content["weights"]["item_embedding.weight"][:5] = 0


def of_other_sessions(content: dict[str, Any]) -> None:
    content["dataset"]["train_fingerprint"] = "0" * 64


def of_other_data(content: dict[str, Any]) -> None:
    content["dataset"]["name"] = "diginetica"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (with_knn, "holds training sessions"),
        (without_an_item, "does not have the figures"),
        (of_other_sessions, "trained on other sessions"),
        (of_other_data, "weights trained on diginetica"),
    ],
)
def test_what_must_not_be_published_is_refused(
    place: Path,
    changed: Callable[[dict[str, Any]], None],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(place, changed, result=False)
    with pytest.raises(SystemExit) as end:
        pack(place)
    assert end.value.code == 2
    assert reason in capsys.readouterr().err
    assert not list((place / "PRETRAINED").iterdir())


def test_the_state_of_a_run_and_a_missing_result_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        pack(place, checkpoint=Path("runs/net/last.pt"))
    assert "holds the state of a run" in capsys.readouterr().err
    (place / "RESULTS" / "net.json").unlink()
    with pytest.raises(SystemExit):
        pack(place)
    assert "net.json does not exist" in capsys.readouterr().err


def test_paths_and_training_counts_are_not_published(place: Path) -> None:
    def add(content: dict[str, Any]) -> None:
        content["origin"] = {"mixed": {"networks": [{"file": "/home/me/runs/a/b.pt", "step": 3}]}}

    change(place, add, result=False)
    pack(place)
    found = load_checkpoint(place / "PRETRAINED" / "net.pt")
    assert found.origin == {"mixed": {"networks": [{"file": "b.pt", "step": 3}]}}
    assert found.popularity is None
    with pytest.raises(InputError, match="does not hold the popularity of items, as publi"):
        tron_cli.Recommender.load(found.path).recommend([[]], k=3)


def test_a_check_of_what_is_not_published_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(place) == 2
    assert "net.pt does not exist" in capsys.readouterr().err


def check(place: Path) -> int:
    """Train the published checkpoint again; return the exit code."""
    place = place.resolve()
    words = ["--data-dir", str(place / "data"), "--work-dir", str(place / "again")]
    with pytest.raises(SystemExit) as end:
        pretrained.main(["check", "net", *words])
    return end.value.code


@pytest.mark.slow
def test_a_published_checkpoint_is_trained_again_to_the_same_bits(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(place)
    assert check(place) == 0
    assert "the same bits: yes" in capsys.readouterr().out
    assert (place / "again" / "runs" / "net" / "last.pt").exists()


def test_mixed_networks_are_packed_and_made_again_from_runs_that_are_there(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: Callable[..., tuple[int, str, str]],
) -> None:
    commands = [
        f"train --config {place / 'config.py'} seed=5 --name net",
        f"train --config {place / 'config.py'} seed=6 --name other",
        "mix runs/net runs/other --name both",
    ]
    monkeypatch.chdir(place)
    for each in commands[1:]:
        assert command(*each.split(), "--data-dir", "data", "--device", "cpu")[0] == 0
    write_result(place, [*(f"tron {each}" for each in commands), "tron evaluate runs/both"], "both")
    pack(place, checkpoint=Path("runs/both"))
    file = place / "PRETRAINED" / "net.pt"
    check_card(file, place / "RESULTS")
    assert "stored as float16" in file.with_suffix(".md").read_text()

    ran = []

    def tron(words: list[str], folder: Path) -> None:
        monkeypatch.chdir(folder)
        assert command(*words, "--device", "cpu")[0] == 0
        ran.append(words[:3])

    monkeypatch.setattr(pretrained, "_tron", tron)
    shutil.copytree(place / "runs" / "other", place / "again" / "runs" / "other")
    assert check(place) == 0
    assert "the same bits: yes" in capfd.readouterr().out
    assert ran == [
        ["train", "--config", str(place / "config.py")],
        ["train", "--resume", "runs/other"],
        ["mix", "runs/net", "runs/other"],
    ]
    content = torch.load(file, weights_only=True)
    name = "networks.1.blocks.0.attention_norm.bias"
    content["weights"][name][2] += 1
    torch.save(content, file)
    assert check(place) == 1
    out = capfd.readouterr().out
    (difference,) = re.findall(rf"the same bits: no; largest difference (\S+), in {name}", out)
    assert float(difference) == pytest.approx(1, abs=1e-3)  # rounded
    assert re.search(r"test R@5: \d\.\d{4} \(\d\.\d{4}\), here \d\.\d{4}", out)
    assert len(ran) == 5  # the two runs resumed, and no third mixture
