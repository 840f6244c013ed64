"""Options without a value, as unset shell variables give them, are refused."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path

import pytest
from helpers.command_lines import Command, is_one_sentence

import tron_cli
from tron_cli.cli import app
from tron_cli.cli.options import given_path
from tron_cli.errors import InputError

COMMANDS = {
    str(command.name or command.callback.__name__): inspect.signature(
        command.callback, eval_str=True
    ).parameters
    for group in (app, *(group.typer_instance for group in app.registered_groups))
    if group is not None
    for command in group.registered_commands
    if command.callback is not None
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_path_of_a_command_may_be_empty(name: str) -> None:
    """It would be the current folder."""
    for option, parameter in COMMANDS[name].items():
        kind, *info = typing.get_args(parameter.annotation)
        if Path in (kind, *typing.get_args(kind)):
            assert info[0].parser is given_path, option


@pytest.mark.parametrize(
    "line",
    [
        "train --config EMPTY",
        "train --resume EMPTY",
        "train --final EMPTY",
        "train --config config_yoochoose --init-from EMPTY",
        "train --config config_yoochoose --output-dir EMPTY",
        "train --config config_yoochoose --name EMPTY",
        "train --config config_yoochoose --device EMPTY",
        "train --config config_yoochoose dataset_name=",
        "evaluate EMPTY",
        "evaluate x.pt --dataset EMPTY",
        "evaluate x.pt --run EMPTY",
        "compare x.pt EMPTY",
        "compare x.pt y.pt --dataset EMPTY",
        "check EMPTY",
        "config show EMPTY",
        "export EMPTY --format onnx",
        "export x.pt --format onnx --output EMPTY",
        "import tron EMPTY -o x.pt",
        "import tron x.ckpt -o EMPTY",
        "import tron x.ckpt -o x.pt --dataset EMPTY",
        "prepare synthetic --name EMPTY",
        "prepare table --input EMPTY --item-col i --time-col t --session-col s --name n",
        "prepare table --input x.csv --item-col EMPTY --time-col t --session-col s --name n",
        "prepare table --input x.csv --item-col i --time-col t --session-col EMPTY --name n",
        "prepare table --input x.csv --item-col i --time-col t --session-col s --name n "
        "--time-format EMPTY",
        "prepare ml1m --catalogue EMPTY",
        "recommend EMPTY --history a",
        "recommend x.pt --history a --candidates EMPTY",
        "recommend x.pt --input x.csv --session-col EMPTY",
        "recommend x.pt --input x.csv --time-col EMPTY",
        "recommend x.pt --output EMPTY",
        "serve EMPTY",
        "serve x.pt --host EMPTY",
        "similar EMPTY a",
        "similar x.pt a --output EMPTY",
        "evaluate x.pt --plugin EMPTY",
    ],
)
def test_an_empty_value_is_refused(
    line: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*("" if word == "EMPTY" else word for word in line.split()))
    assert (code, out) == (2, "")
    assert is_one_sentence(err) or err.startswith("Usage: ")
    assert "empty" in err or "''" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("empty", ["", " "])
def test_empty_arguments_in_python(empty: str) -> None:
    with pytest.raises(InputError, match="dataset is empty"):
        tron_cli.evaluate("x.pt", dataset=empty)
    with pytest.raises(InputError, match="resume is empty"):
        tron_cli.train(resume=empty)
    with pytest.raises(InputError, match=r"path must be the path of a checkpoint, got ' ?'"):
        tron_cli.Recommender.load(empty)
    with pytest.raises(InputError, match="name is empty"):
        tron_cli.prepare("synthetic", name=empty)
