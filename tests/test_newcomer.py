"""The model, the loss and the sampler of docs/extending.md, added to a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.datasets import write_dataset

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"`(tron_cli/[\w/]+\.py)`:\n\n```python\n(.*?)^```", PAGE, re.M | re.S))
LINES = dict(re.findall(r"^In `(\w+)` of `registry\.py`:\n\n```python\n(.*?\n)```", PAGE, re.M))

CYCLE = 8
CONFIG = """
from tron_cli.config import ExperimentConfig

config = ExperimentConfig(
    dataset_name="cyclic", sequence_length=8, embedding_dim=16, num_blocks=1,
    num_uniform_negatives=8, num_batch_negatives=4, topk_sampling=False,
    # Nearly all items are inputs of some session of the batch: rejection would leave none.
    reject_in_batch_items=False,
    train_batch_size=20, max_epochs=6, lr=2e-2, metrics=("R@1",), val_metric="R@1",
)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the package, add the code of the page, and write sessions whose next item is known."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(
        ROOT / "tron_cli", folder / "tron_cli", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name, code in FILES.items():
        assert not (folder / name).exists(), "a newcomer's file is a new one"
        (folder / name).write_text(code)
    registry = folder / "tron_cli" / "registry.py"
    for names, line in LINES.items():
        assert line.count("\n") == 1
        before, begin, after = registry.read_text().partition(f"\n{names} = {{\n")
        assert begin
        registry.write_text(before + begin + line + after)
    (folder / "cyclic.py").write_text(CONFIG)
    random = np.random.default_rng(3)

    def sessions(count: int) -> list[list[int]]:
        """Draw sessions in which each item is followed by the next one, the last by the first."""
        starts, lengths = random.integers(CYCLE, size=count), random.integers(2, 8, size=count)
        return [
            [(start + place) % CYCLE + 1 for place in range(length)]
            for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
        ]

    write_dataset(
        folder / "datasets", name="cyclic",
        train=sessions(600), val=sessions(40), test=sessions(80),
    )  # fmt: skip
    return folder


def tron(checkout: Path, *words: str) -> dict:
    """Return what the copy's command prints with --json."""
    done = subprocess.run(
        [sys.executable, "-m", "tron_cli", *words, "--device", "cpu", "--json"],
        cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_page_adds_a_model_a_loss_and_a_sampler():
    assert set(LINES) == {"MODELS", "LOSSES", "SAMPLERS"}
    modules = {re.search(r'Entry\("([\w.]+):', line).group(1) for line in LINES.values()}
    assert modules == {name.removesuffix(".py").replace("/", ".") for name in FILES}


@pytest.mark.parametrize(
    "settings",
    [
        ("model=mean", "loss=hinge", "negative_sampler=square_root"),
        ("model=mean", "num_heads=2"),
        ("model=gru4rec", "loss=hinge", "bpr_penalty=0.01"),
        ("model=sasrec", "loss=hinge", "negative_sampler=square_root"),
    ],
    ids=" ".join,
)
def test_newcomers_are_trained_and_evaluated(checkout, settings):
    """The models learn to predict the following item on unseen sessions."""
    trained = tron(checkout, "train", "--config", "cyclic.py", *settings)
    report = tron(checkout, "evaluate", trained["checkpoint"])
    assert report["items"] == CYCLE
    assert report["metrics"]["R@1"]["value"] >= 0.95
