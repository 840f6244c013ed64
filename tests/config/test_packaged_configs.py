"""Every packaged config loads, says what it is, and trains."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.datasets import random_sessions, write_dataset

from tron_cli.config import CONFIGS_DIR, load_config, packaged_configs

# What a packaged config trains, by how its name ends.
KINDS = {
    # TRON's published baseline: one eventwise negative.
    "sasrec": {
        "model": "sasrec", "loss": "bce", "sampling_style": "eventwise", "topk_sampling": False,
        "num_uniform_negatives": 1, "num_batch_negatives": 0,
    },
    "gsasrec": {"model": "gsasrec", "loss": "gbce", "sampling_style": "eventwise"},
    "gru4rec": {"model": "gru4rec", "loss": "bpr-max", "final_activation": True},
    "bert4rec": {"model": "bert4rec", "loss": "ce"},
    "recbole": {"model": "sasrec", "loss": "ce", "block": "post-norm"},
    "bsarec": {"model": "sasrec", "loss": "ce", "block": "bsarec"},
    "ce": {"model": "gsasrec", "loss": "ce", "reuse_item_embeddings": True},
}  # fmt: skip

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FIGURE = r"(?<!\d)\.\d{3,4}\b"
SIZES = {"train": 80, "val": 5, "test": 5}


def kind_of(name: str) -> str:
    ending = name.rpartition("_")[2]
    return ending if ending in KINDS else "tron"


def test_every_session_dataset_has_every_model():
    for data in ("yoochoose", "diginetica"):
        wanted = {f"config_{data}_{kind}" for kind in {*KINDS} - {"bsarec", "ce"}} | {
            f"config_{data}"
        }
        assert wanted <= set(packaged_configs())


@pytest.mark.parametrize("name", packaged_configs())
def test_every_packaged_config_loads(name):
    made, origins = load_config(name)
    assert f"config_{made.dataset_name}" in name
    assert load_config(f"{name}.py")[0] == made
    assert origins["dataset_name"] == f"{name}.py"
    if kind_of(name) == "tron":
        assert made.method == "tron"
    else:
        expected = KINDS[kind_of(name)]
        assert {key: getattr(made, key) for key in expected} == expected


@pytest.mark.parametrize("name", packaged_configs())
def test_every_packaged_config_says_what_it_is(name):
    source = (CONFIGS_DIR / f"{name}.py").read_text()
    doc = ast.get_docstring(ast.parse(source))
    assert doc is not None
    assert "\n" not in doc


def test_figures_in_comments_are_in_the_results_or_in_the_log_of_the_search():
    results = [
        json.loads(path.read_text()) for path in (BENCHMARKS / "results/accuracy").glob("*.json")
    ]
    measured = {f"{value:.4f}"[1:] for each in results for value in each["validation"].values()}
    measured |= {*re.findall(FIGURE, (BENCHMARKS / "SEARCH.md").read_text())}
    claimed = {
        (name, figure)
        for name in packaged_configs()
        for comment in re.findall("#.*", (CONFIGS_DIR / f"{name}.py").read_text())
        for figure in re.findall(FIGURE, comment)
    }
    assert len(claimed) > 5
    assert not [each for each in claimed if each[1] not in measured]


@pytest.mark.parametrize("name", packaged_configs())
def test_every_packaged_config_takes_a_step(name, tmp_path, command):
    """It is reduced in size only, on a small shop with the protocol of its dataset."""
    made, _ = load_config(name)
    last_item = made.dataset_name in ("ml1m", "beauty")
    rng = np.random.default_rng(3)
    write_dataset(
        tmp_path,
        name="shop",
        num_items=600,
        protocol="last-item" if last_item else "every-step",
        **{split: random_sessions(rng, count, 600) for split, count in SIZES.items()},
    )
    code, out, err = command(
        "train", "--config", name, "--data-dir", tmp_path, "--output-dir", tmp_path,
        "--name", "run", "--device", "cpu", "dataset_name=shop", "max_epochs=1",
        "max_batches_per_epoch=1", "train_batch_size=32",
    )  # fmt: skip
    assert code == 0, err
    assert out.strip().endswith(".pt")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert records[-1]["step"] == 1
    assert all(np.isfinite(record["loss"]) for record in records if "loss" in record)
