"""The package's metadata, and the versions that developers can reproduce."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from packaging.requirements import Requirement

import tron_cli

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()


def test_every_dependency_has_a_version_in_the_constraints_that_the_metadata_allow() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    tables = re.findall(r"^(?:dependencies|dev) = \[(.*?)\]$", PROJECT, re.MULTILINE | re.DOTALL)
    needed = [Requirement(text) for table in tables for text in re.findall(r'"(.*?)"', table)]
    assert len(needed) > 12
    for requirement in needed:
        assert requirement.specifier.contains(pins[requirement.name]), requirement
    assert not [pin for pin in pins.values() if "+" in pin]  # a local build that no index has


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(tron_cli.__file__).parent / "py.typed").is_file()
    assert 'tron_cli = ["py.typed"]' in PROJECT
    assert '"Typing :: Typed"' in PROJECT


def test_the_installation_says_what_takes_so_long(tmp_path: Path) -> None:
    """pip is quiet, so a line goes before it; an installed environment has none."""
    words = ["make", "--dry-run", "--always-make", "demo", f"VENV={tmp_path / 'env'}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    said = next(place for place, line in enumerate(lines) if f"Installing into {tmp_path}" in line)
    assert said < min(place for place, line in enumerate(lines) if " pip install " in line)
    assert sum("Installing" in line for line in lines) == 1


def test_the_version_is_written_alike() -> None:
    assert f'version = "{tron_cli.__version__}"' in PROJECT
