"""Fixtures of several commands' tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.datasets import random_sessions, tiny_settings, write_dataset


@pytest.fixture
def shop(tmp_path: Path) -> list[str]:
    """A small dataset and a config for it: the options that name them."""
    rng = np.random.default_rng(5)
    write_dataset(
        tmp_path / "data",
        train=random_sessions(rng, 40, 30),
        val=random_sessions(rng, 20, 30),
        test=random_sessions(rng, 30, 30, longest=12),
        num_items=30,
        lost_predictions=3,
    )
    words = ", ".join(f"{key}={value!r}" for key, value in tiny_settings().items())
    (tmp_path / "config.py").write_text(
        f"from tron_cli.config import ExperimentConfig\nconfig = ExperimentConfig({words})\n"
    )
    return [
        "--config", str(tmp_path / "config.py"), "--data-dir", str(tmp_path / "data"),
        "--output-dir", str(tmp_path / "runs"), "--device", "cpu",
    ]  # fmt: skip
