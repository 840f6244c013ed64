"""The README says what the code does: its settings, its commands, its figures."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from benchmarks.accuracy import BEGIN, END, EXPERIMENTS, table
from tron_cli.config import FIELDS, load_config, packaged_configs, parse_overrides
from tron_cli.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    blocks = "".join(re.findall(r"^```\w*\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE))
    joined = blocks.replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.startswith("tron ")]


@cache
def help_text(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tron_cli", *command, "--help"],
        capture_output=True, text=True, check=True, env={"COLUMNS": "200"},
    )  # fmt: skip
    return done.stdout


def test_every_setting_stands_in_the_table_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", README, flags=re.MULTILINE))
    for name, field in FIELDS.items():
        shown = rows[name].strip("`")
        if name == "dataset_name":
            assert shown == "required"
        elif name == "metrics":
            measures = [
                f"{kind}@{cutoff}"
                for kinds, cutoffs in re.findall(r"([\w, ]+) @ ([\d, ]+)", shown)
                for kind in kinds.split(",")
                for cutoff in cutoffs.split(",")
            ]
            assert sorted(re.sub(" ", "", name) for name in measures) == sorted(field.default)
        else:
            assert shown == str(field.default), name


def test_names_of_other_tools_get_the_hint_that_the_table_gives():
    rows = re.findall(r"^\| `(\w+)` \| .*? \| .*? \| (.*) \|$", README, flags=re.MULTILINE)
    named = [(name, other) for name, cells in rows for other in re.findall(r"`(\w+)", cells)]
    assert len(named) > 60
    for name, other in named:
        if other not in FIELDS and other != "SASRecModel":  # a class, not a setting
            with pytest.raises(InputError, match=f"did you mean {name}"):
                parse_overrides([f"{other}=1"])


@pytest.mark.parametrize("command", commands())
def test_every_command_has_the_options_it_is_shown_with(command):
    words = shlex.split(command)[1:]
    is_group = words[0] in ("prepare", "config")
    known = help_text(*words[: 2 if is_group else 1])
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"(?<![\w-]){word}(?![\w-])", known), word
    if "--config" in words:
        name = words[words.index("--config") + 1]
        overrides = [word for word in words if re.match(r"\w+=", word)]
        if name.endswith(".json"):  # a file of the reader's
            parse_overrides(overrides)
        else:
            assert name.removesuffix(".py") in packaged_configs()
            load_config(name, overrides)


def test_the_results_are_those_of_the_committed_files():
    shown = README.partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == table()
    for experiment in EXPERIMENTS.values():
        assert f"**{experiment.dataset}**" in shown


def test_every_module_stands_in_the_architecture():
    architecture = (ROOT / "ARCHITECTURE.md").read_text()
    for path in (ROOT / "tron_cli").rglob("*.py"):
        if path.name not in ("__init__.py", "__main__.py") and path.parent.name not in (
            "configs",
            "models",
        ):
            assert f"{path.name}`" in architecture, path.name
