"""Models, losses and samplers from outside the package, and what is refused."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import random_sessions, tiny_settings, write_dataset

from tron_cli import registry
from tron_cli.checkpoint import checkpoint_name
from tron_cli.config import ExperimentConfig, config_from_dict, load_config, plugins
from tron_cli.errors import InputError
from tron_cli.training.loop import train

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
NEWCOMERS = re.findall(r"`tron_cli/[\w/]+\.py`:\n\n```python\n(.*?)^```", PAGE, re.M | re.S)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(code: str, name: str = "mine.py") -> Path:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(code))
        return tmp_path / name

    return write


def make(**changes: Any) -> ExperimentConfig:
    return ExperimentConfig(**tiny_settings(**changes))


# ---- from a file to a figure ----------------------------------------------------------------


def tron(folder: Path, *commands: list[str]) -> tuple[list[int], str, str]:
    """Return exit codes, stdout and stderr of commands in one fresh process."""
    script = (
        "import json, sys\nfrom tron_cli.cli import _run\n"
        "codes = [_run(words, False) for words in json.loads(sys.argv[1])]\n"
        "print(json.dumps(codes), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    *err, codes = done.stderr.splitlines()
    return json.loads(codes), done.stdout, "\n".join(err)


@pytest.fixture
def shop(tmp_path: Path, write: Callable[..., Path]) -> Path:
    """Make a folder with data, a config, and the code of docs/extending.md in a file."""
    random = np.random.default_rng(1)
    rows = {name: random_sessions(random, 30, 12) for name in ("train", "val", "test")}
    write_dataset(tmp_path / "datasets", **rows, num_items=12)
    words = ", ".join(f"{key}={value!r}" for key, value in tiny_settings().items())
    write(
        f"from tron_cli.config import ExperimentConfig\nconfig = ExperimentConfig({words})\n",
        "c.py",
    )
    code = "\n".join(NEWCOMERS).replace("from __future__ import annotations\n", "")
    write(f"from __future__ import annotations\nprint('mine.py runs')\n{code}")
    return tmp_path


ALL_THREE = ("model=mine.py:Mean", "loss=mine.py:hinge", "negative_sampler=mine.py:square_root")


@pytest.mark.slow
def test_code_of_a_file_trains_and_its_checkpoint_runs_it_only_when_named(shop: Path) -> None:
    codes, out, err = tron(
        shop, ["train", "--config", "c.py", *ALL_THREE, "num_heads=2", "--name", "a"]
    )
    assert codes == [0], err
    best = Path(out.splitlines()[-1])
    assert re.fullmatch(r"mine\.Mean-tiny-step=\d+-loss=mine\.hinge-[\w.=@+-]+\.pt", best.name)

    evaluate, compare = ["evaluate", str(best)], ["compare", str(best), str(best)]
    resume = ["train", "--resume", "runs/a", "max_epochs=3"]
    # `tron check` does not call a run damaged whose code is not named.
    check = ["check", str(best)]
    codes, out, err = tron(shop, evaluate, compare, resume, check, ["check", "runs/a"])
    assert codes == [2, 2, 2, 2, 2]
    assert out == ""
    assert err.count("needs model=mine.py:Mean") == 5
    assert err.count("--plugin path/to/mine.py:Mean") == 5

    # Wherever the file is by now; each piece of code is named by itself.
    (shop / "elsewhere").mkdir()
    (shop / "mine.py").rename(shop / "elsewhere" / "mine.py")
    named = [f"--plugin=elsewhere/{word.partition('=')[2]}" for word in ALL_THREE]
    others = [[*words, *named] for words in (check, [*evaluate, "--json"], compare, resume)]
    codes, out, err = tron(shop, [*evaluate, *named[:2]], *others)
    assert codes == [2, 0, 0, 0, 0], err
    assert "--plugin path/to/mine.py:square_root" in err
    report = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
    assert report["events"] > 0
    assert report["positions"].startswith("none")


def test_a_config_file_names_code_too(write: Callable[..., Path]) -> None:
    write("def flat(count_I): return count_I * 0 + 1")
    path = write(
        f"""
        from tron_cli.config import ExperimentConfig
        config = ExperimentConfig(**{tiny_settings()!r}, negative_sampler="mine.py:flat")
        """,
        "c.py",
    )
    config, origins = load_config(str(path))
    assert (config.negative_sampler, origins["negative_sampler"]) == ("mine.py:flat", "c.py")


def test_a_module_is_named_by_its_dots(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write("def flat(positive_N, negative_NK, keep_NK, *, num_items, lr): ...", "some_package.py")
    monkeypatch.syspath_prepend(tmp_path)
    config = make(loss="some_package:flat")
    assert "-loss=some_package.flat-" in checkpoint_name(config, 1, {})
    found = registry.settings_of(registry.LOSSES["some_package:flat"], config, num_items=4)
    assert found == {"num_items": 4, "lr": config.lr}


def test_a_name_in_a_checkpoint_s_name_stays_in_its_folder(write: Callable[..., Path]) -> None:
    write("def flat(positive_N, negative_NK, keep_NK): ...", "a b:c*/we ird?.py")
    name = checkpoint_name(make(loss="a b:c*/we ird?.py:flat"), 1, {})
    assert "loss=we_ird_.flat" in name
    assert not set(name) & set('/\\:*?"<>| ')


def test_settings_that_only_some_have_are_refused_where_code_does_not_ask_for_them(
    write: Callable[..., Path],
) -> None:
    write(
        """
        class One:
            def __init__(self, *, num_items, num_heads, embedding_dim): ...
            def forward(self, batch, rows_UD=None): ...
        class Other:
            def __init__(self, *, num_items): ...
            def forward(self, batch, rows_UD=None): ...
        """
    )
    assert make(model="mine.py:One", num_heads=2).num_heads == 2
    with pytest.raises(InputError, match=r"num_heads=2 is a setting of model=.*mine\.py:One"):
        make(model="mine.py:Other", num_heads=2)
    assert make(model="gru4rec", embedding_dim=6).embedding_dim == 6  # everyone's, as before


@pytest.mark.parametrize("trait", ["shares_table", "masks_inputs"])
def test_a_class_says_what_an_entry_would(trait: str, write: Callable[..., Path]) -> None:
    write(f"class One:\n    {trait} = None\n    def forward(self, batch): ...\n")
    make(model="mine.py:One")
    assert getattr(registry.MODELS["mine.py:One"], trait) is None


def test_a_baseline_is_known_by_its_class(write: Callable[..., Path]) -> None:
    write(
        """
        from tron_cli.baselines.popular import Popular
        class Mine(Popular): ...
        """
    )
    config = make(model="mine.py:Mine")
    assert config.is_baseline
    assert checkpoint_name(config, 0, {}) == "mine.Mine-tiny.pt"


def test_a_loss_over_the_catalogue_is_known_by_its_parameters(write: Callable[..., Path]) -> None:
    write("def whole(hidden_ND, table_VD, targets_N): ...")
    with pytest.raises(InputError, match=r"loss=mine\.py:whole compares with the whole catalogue"):
        make(loss="mine.py:whole")


# ---- entry points ---------------------------------------------------------------------------


def test_installed_packages_bring_names(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Checkpoints may name installed code, since a person chose to install it."""
    write("def theirs(count_I): ...", "their_package.py")
    info = tmp_path / "their_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their_package\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[tron.samplers]\ntheirs = their_package:theirs\nlost = their_package:lost\n"
        "gone = their_lost_package:gone\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.metadata.version("their_package") == "1"
    assert config_from_dict(tiny_settings(negative_sampler="theirs")).negative_sampler == "theirs"
    assert registry.load(registry.SAMPLERS["theirs"]).__module__ == "their_package"
    with pytest.raises(InputError, match=r"loss must be one of .*'theirs'"):
        make(loss="theirs")
    with pytest.raises(InputError, match=r"negative_sampler=lost: .*their_package.py .* no lost"):
        make(negative_sampler="lost")
    with pytest.raises(InputError, match=r"module their_lost_package cannot be imported"):
        make(negative_sampler="gone")


# ---- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mine.py:Mean", "../mine.py:Mean", "os:system", "/abs/mine.py:Mean", ":", "a:b:c"]
)
@pytest.mark.parametrize("key", ["model", "loss", "negative_sampler"])
def test_what_a_checkpoint_names_does_not_run(
    key: str, name: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    write(f"open({str(ran)!r}, 'w')\nclass Mean: ...")
    with pytest.raises(plugins.UnnamedCodeError, match=re.escape(f"{key}={name}, code")):
        config_from_dict(tiny_settings(**{key: name}))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("setting", "code", "says"),
    [
        ("model=lost.py:Mean", "", r"no file .*/lost\.py"),
        ("model=mine.py:Maen", "class Mean: ...", r"mine\.py defines no Maen; did you mean Mean\?"),
        ("model=mine.py:Mean", "other = 1", r"mine\.py defines no Mean; it defines other"),
        ("model=mine.py:Mean", "", r"mine\.py defines no Mean; it defines nothing"),
        ("model=mine.py:Mean", "\nclass Mean", r"mine\.py, line 2: SyntaxError: "),
        ("model=mine.py:Mean", "x = 1\n\nx.y", r"mine\.py, line 3: AttributeError: "),
        ("model=mine.py:Mean", "import sys\nsys.exit('bye')", r"mine\.py, line 2: SystemExit: bye"),
        ("model=mine.py:Mean", "import lost_package", r"mine\.py, line 1: ModuleNotFoundError: "),
        ("model=mine.py:Mean", "import sys\nsys.exit()", r"mine\.py, line 2: SystemExit$"),
        ("model=mine.py:Mean", "Mean = 3", "is neither a class nor a function, but 3"),
        ("model=mine.py:Mean", "def Mean(*, num_items): ...", "is no class with `forward"),
        ("model=mine.py:Mean", "class Mean: ...", "is no class with `forward"),
        (
            "model=mine.py:Mean",
            "class Mean:\n  def __init__(self, *, embeding_dim): ...\n  def forward(self): ...",
            "asks for 'embeding_dim', which is no setting; did you mean embedding_dim",
        ),
        (
            "model=mine.py:Mean",
            "class Mean:\n  def __init__(self, num_items): ...\n  def forward(self): ...",
            r"has the parameters \(num_items, \.\.\.\); expected \(\*, \.\.\.\)",
        ),
        (
            "model=mine.py:Mean",
            "class Mean:\n  def __init__(self, **settings): ...\n  def forward(self): ...",
            r"has the parameters \(\*\*settings, ",
        ),
        ("loss=mine.py:mine", "def mine(p, n, k): ...", r"\(p, n, k, .* expected \(positive_N, "),
        ("negative_sampler=mine.py:mine", "def mine(): ...", r"expected \(count_I, "),
        ("model=lost_package:Mean", "", "module lost_package cannot be imported"),
        ("model=..lost:Mean", "", r"module \.\.lost cannot be imported"),
        ("model=mine.py:", "", r"expected code as path/to/file\.py:Name"),
        ("model=:Mean", "", r"expected code as path/to/file\.py:Name"),
        ("model=sasrek", "", r"model must be one of .*; did you mean 'sasrec'"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    setting: str, code: str, says: str, write: Callable[..., Path]
) -> None:
    write(code)
    with pytest.raises(InputError, match=says) as error:
        load_config("config_synthetic", [setting])
    assert len(str(error.value)) <= 500


def test_two_files_of_one_name_are_told_apart(write: Callable[..., Path]) -> None:
    """A checkpoint could mean either."""
    first = write("def flat(count_I): ...", "a/mine.py")
    second = write("def flat(count_I): ...", "b/mine.py")
    assert plugins.add_plugin(f"{first}:flat") == "mine.py:flat"
    assert plugins.add_plugin(f"{first}:flat") == "mine.py:flat"
    with pytest.raises(InputError, match=r"both called mine\.py:flat"):
        plugins.add_plugin(f"{second}:flat")


def test_a_file_does_not_pass_for_a_module_of_its_name(write: Callable[..., Path]) -> None:
    import random

    make(negative_sampler=f"{write('def flat(count_I): ...', 'random.py')}:flat")
    assert sys.modules["random"] is random


@pytest.mark.parametrize(
    "weights",
    [
        "[1.0] * 3", "count_I * float('nan')", "count_I - 1e9", "count_I * 0",
        "count_I * float('inf')", "count_I[:, None]", "1.0",
    ],
)  # fmt: skip
def test_weights_that_no_item_can_be_drawn_by_are_refused(
    weights: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    file = write(f"def drawn(count_I): return {weights}")
    config = make(negative_sampler=f"{file}:drawn")
    dataset = write_dataset(tmp_path, train=[[1, 2, 3, 4], [2, 1]])
    with pytest.raises(InputError, match=r"mine\.py:drawn must give a weight for each of the 4 "):
        train(config, dataset, tmp_path / "run", device=torch.device("cpu"))


@pytest.mark.parametrize("shape", [".mean()", "[:, None] * negative_NK", "[:1]"])
def test_a_loss_that_is_not_one_number_a_position_is_refused(
    shape: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    file = write(f"def wide(positive_N, negative_NK, keep_NK): return positive_N{shape}")
    dataset = write_dataset(tmp_path, train=[[1, 2, 3, 4], [2, 1]])
    with pytest.raises(InputError, match=r"mine\.py:wide must give a number for each of 4 posi"):
        train(make(loss=f"{file}:wide"), dataset, tmp_path / "run", device=torch.device("cpu"))


def test_what_foreign_code_prints_is_no_result(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """`--json` prints one object."""
    mine = write("print(1)\nMean = len")
    plugins.add_plugin(f"{mine}:Mean")
    config = "from tron_cli.config import ExperimentConfig\nprint(2)\n"
    load_config(str(write(config + "config = ExperimentConfig(dataset_name='t')", "c.py")))
    assert capsys.readouterr() == ("", "1\n2\n")
