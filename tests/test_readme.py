"""README.md and docs/ agree with the code: settings, commands, figures, links."""

import json
import os
import re
import shlex
import subprocess
import sys
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from benchmarks import field as benchmark
from benchmarks.accuracy.runs import RESULTS
from benchmarks.accuracy.table import BEGIN, END, table
from tron_cli.config import load_config, packaged_configs, parse_overrides
from tron_cli.errors import InputError
from tron_cli.registry import BASELINES, CATALOGUE_LOSSES, LOSSES, MODELS, SAMPLERS

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        ROOT / "README.md",
        ROOT / "ARCHITECTURE.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
README = PAGES["README.md"]


def commands() -> list[str]:
    """Return the distinct `tron` commands in the code blocks of all pages."""
    found = {}
    for page in PAGES.values():
        blocks = "".join(re.findall(r"^```\w*\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE))
        joined = blocks.replace("\\\n", " ")
        found |= dict.fromkeys(line for line in joined.splitlines() if line.startswith("tron "))
    return list(found)


NO_NEGATIVES = ["num_uniform_negatives=0", "num_batch_negatives=0", "topk_sampling=False"]


def section(heading: str, page: str = "docs/models-and-losses.md") -> str:
    """Return a section of a page."""
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGES[page], re.DOTALL | re.MULTILINE)
    return found.group(1)


@cache
def help_text(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tron_cli", *command, "--help"],
        capture_output=True, text=True, check=True, env={"COLUMNS": "200"},
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("command", commands())
def test_every_command_has_the_options_it_is_shown_with(command):
    words = [word for word in shlex.split(command)[1:] if word != "--debug"]
    is_group = words[0] in ("prepare", "config")
    known = help_text(*words[: 2 if is_group else 1])
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"(?<![\w-]){word}(?![\w-])", known), word
    if "--config" in words:
        name = words[words.index("--config") + 1]
        overrides = [
            word
            for word in words
            if re.match(r"\w+=", word) and ".py:" not in word  # tested with plugins
        ]
        if name.endswith(".json"):  # a file of the reader's
            parse_overrides(overrides)
        else:
            assert name.removesuffix(".py") in packaged_configs()
            load_config(name, overrides)


def test_the_four_commands_of_the_readme_compare_two_models_on_a_log(tmp_path):
    """Run them as they stand, then all commands of docs/ about these runs; one epoch is enough."""
    random = np.random.default_rng(7)
    rows = ["session,item,time"]
    for session in range(400):
        start = datetime(2025, 3, 1) + timedelta(days=float(random.random() * 20))
        first, length = random.integers(50), random.integers(2, 9)
        rows += [
            f"v{session},SKU-{(first + place) % 50},{start + timedelta(minutes=int(place))}"
            for place in range(length)
        ]
    (tmp_path / "events.csv").write_text("\n".join(rows) + "\n")
    four = section("Your own data", "README.md").split("```")[1].strip().splitlines()
    assert [line.split()[1] for line in four] == ["prepare", "train", "train", "compare"]
    about_them = [
        line
        for line in commands()
        if re.match(
            r"tron (evaluate|compare|check|recommend|similar) (shop|runs/(tron|knn)-shop)", line
        )
    ]
    assert len(about_them) >= 12
    (tmp_path / "sessions.csv").write_text("session,item\nv1,SKU-3\nv2,SKU-4\nv1,SKU-5\n")
    (tmp_path / "sessions.jsonl").write_text('{"session": "v1", "items": ["SKU-3"]}\n')
    words = [shlex.split(line)[1:] for line in [*four, *about_them]]
    words = [[*line, "max_epochs=1"] if line[0] == "train" else line for line in words]
    script = (
        "import json, sys\nfrom tron_cli.cli import _run\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    words, _, files = ' '.join(line).partition(' < ')\n"
        "    if files:\n"
        "        source, target = files.split(' > ')\n"
        "        sys.stdin, sys.stdout, line = open(source), open(target, 'w'), words.split()\n"
        "    assert _run(line, False) == 0, line\n"
        "    sys.stdout = sys.__stdout__"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(words)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "difference from tron" in done.stdout
    assert {"shop.run", "shop.qrels", "shop.parquet", "lists.csv", "similar.parquet"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert json.loads((tmp_path / "lists.jsonl").read_text())["session"] == "v1"


def test_the_results_are_those_of_the_committed_files():
    shown = PAGES["docs/results.md"].partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == table()
    for file in RESULTS.glob("*.json"):
        assert f"**{json.loads(file.read_text())['dataset']}**" in shown


def test_the_benchmark_is_that_of_the_committed_files():
    for page, datasets in (("README.md", benchmark.IN_README), ("docs/results.md", None)):
        shown = PAGES[page].partition(benchmark.BEGIN)[2].partition(benchmark.END)[0].strip()
        assert shown == benchmark.table(datasets or benchmark.DATASETS)


@pytest.mark.parametrize(
    ("heading", "registered"),
    [
        ("Models", MODELS),
        ("Losses", {**LOSSES, **CATALOGUE_LOSSES}),
        ("Negatives", SAMPLERS),
        ("Baselines", BASELINES),
    ],
)
def test_everything_registered_has_its_row(heading, registered):
    rows = re.findall(r"^\| `([\w-]+)` \|", section(heading), flags=re.MULTILINE)
    assert sorted(rows) == sorted(registered)


def test_every_packaged_config_is_named_and_every_named_one_exists():
    named = set(re.findall(r"\bconfig_\w+", "".join(PAGES.values())))
    assert named == set(packaged_configs())


def test_settings_of_the_published_forms_are_accepted():
    """Every group of settings in the table of models is accepted for the model of its row."""
    model, tried = "", 0
    for row in re.findall(r"^\|.*\|$", section("Models"), flags=re.MULTILINE)[2:]:
        name, _, form, _ = (cell.strip() for cell in row.strip("|").split("|"))
        model = name.strip("`") or model
        for words in re.findall(r"`((?:\w+=[\w.-]+ ?)+)`", form):
            overrides = words.split()
            if "loss=ce" in overrides or "loss=gbce" in overrides:
                continue  # these have something to say about negatives too: see below
            config, _ = load_config("config_synthetic", [f"model={model}", *overrides])
            assert config.model == model
            tried += 1
    assert tried >= 6


@pytest.mark.parametrize("setting", ["num_uniform_negatives=8", "topk_sampling=True"])
def test_losses_refuse_what_the_table_says(setting):
    """Settings that the table does not name are accepted."""
    rows = dict(re.findall(r"^\| `([\w-]+)` \|.*\| (\w+) \| .*\|$", section("Losses"), re.M))
    assert {name for name, negatives in rows.items() if negatives == "none"} == {*CATALOGUE_LOSSES}
    for loss in rows:
        overrides = {"loss": loss, **dict(word.split("=") for word in NO_NEGATIVES)}
        overrides |= {"num_uniform_negatives": "8"} if loss in LOSSES else {}
        overrides |= {"topk_sampling_k": "4", "reject_in_batch_items": "False"}
        overrides |= dict([setting.split("=")])
        words = [f"{key}={value}" for key, value in overrides.items()]
        if loss in CATALOGUE_LOSSES or (loss == "gbce" and setting == "topk_sampling=True"):
            with pytest.raises(InputError, match=f"loss={loss} .*{setting}"):
                load_config("config_synthetic", words)
        else:
            load_config("config_synthetic", words)


def test_links_within_the_repository_lead_somewhere():
    for page, content in PAGES.items():
        for target in re.findall(r"\]\(((?!https?:)[^)]+)\)", content):
            path, _, anchor = target.partition("#")
            text = ((ROOT / page).parent / path if path else ROOT / page).read_text()
            headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings]
            assert not anchor or anchor in slugs, target


def test_the_readme_is_one_screen_and_leads_to_every_page():
    assert len(README.encode()) < 7000
    assert set(PAGES) - {"README.md"} <= set(re.findall(r"\]\(([^)#]+)\)", README))


def test_every_module_stands_in_the_architecture():
    """The table gives the name and the folder of every module."""
    named = set()
    for cell in re.findall(r"^\| (`.*?`) \|", PAGES["ARCHITECTURE.md"], flags=re.MULTILINE):
        folder = Path()
        for name in re.findall(r"`([\w/]+\.py)`", cell):
            path = Path(name) if "/" in name else folder / name
            folder = path.parent
            named.add(path)
    package = ROOT / "tron_cli"
    there = {path.relative_to(package) for path in package.rglob("*.py")}
    assert named <= there
    unnamed = {path for path in there - named if path.name not in ("__init__.py", "__main__.py")}
    assert {path.parent.name for path in unnamed} == {"configs"}
