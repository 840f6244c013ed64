"""Config files, overrides and hints: every value has an origin, every mistake a sentence."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tron_cli.config import (
    FIELDS,
    ExperimentConfig,
    config_from_dict,
    load_config,
    packaged_configs,
    parse_overrides,
)
from tron_cli.errors import InputError


def config(**values) -> ExperimentConfig:
    return ExperimentConfig(**{"dataset_name": "shop", **values})


def test_a_config_survives_a_dictionary():
    made = config(lr=0.1, metrics=("R@5",), filter_rated=True)
    assert config_from_dict(dataclasses.asdict(made)) == made
    with pytest.raises(InputError, match="unknown setting 'future'"):
        config_from_dict({"dataset_name": "shop", "future": 1})


# --- overrides ------------------------------------------------------------------------------------


def test_overrides_are_read_by_the_type_of_their_field():
    assert parse_overrides(
        [
            "lr=1e-3",
            "max_epochs=3",
            "filter_rated=True",
            "topk_sampling=false",
            "loss=bce",
            "metrics=R@20,nDCG@10 RR@5",
            "dataset_name=a=b",
            "clip_norm=2",
        ]
    ) == {
        "lr": 1e-3,
        "max_epochs": 3,
        "filter_rated": True,
        "topk_sampling": False,
        "loss": "bce",
        "metrics": ("R@20", "nDCG@10", "RR@5"),
        "dataset_name": "a=b",
        "clip_norm": 2.0,
    }


@pytest.mark.parametrize(
    ("word", "pattern"),
    [
        ("learning_rate=1", r"unknown setting 'learning_rate'"),
        (
            "sequence_lenght=50",
            r"unknown setting 'sequence_lenght'; did you mean sequence_length\?",
        ),
        ("max_epochs=many", r"max_epochs must be a whole number, got 'many'"),
        ("max_epochs=1.5", r"max_epochs must be a whole number, got '1.5'"),
        ("max_epochs=", r"max_epochs must be a whole number, got ''"),
        ("lr=fast", r"lr must be a number, got 'fast'"),
        ("filter_rated=maybe", r"filter_rated must be True or False, got 'maybe'"),
        ("lr", r"key=value.*'lr'"),
        ("--lr=1", r"unknown setting '--lr'"),
    ],
)
def test_a_bad_override_is_named(word, pattern):
    with pytest.raises(InputError, match=pattern):
        parse_overrides([word])


def test_an_override_given_twice_is_refused():
    with pytest.raises(InputError, match="lr is given twice"):
        parse_overrides(["lr=1", "seed=2", "lr=3"])


# --- files ----------------------------------------------------------------------------------------


def write(folder: Path, body: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text("from tron_cli.config import ExperimentConfig\n\n" + body)
    return path


def test_defaults_then_file_then_command_line(tmp_path):
    path = write(tmp_path, "config = ExperimentConfig(dataset_name='shop', lr=0.1, loss='bce')\n")
    made, origins = load_config(str(path), ["lr=0.2", "seed=7"])
    assert (made.dataset_name, made.lr, made.loss, made.seed) == ("shop", 0.2, "bce", 7)
    assert made.max_epochs == FIELDS["max_epochs"].default
    assert set(origins) == set(FIELDS)
    assert origins["dataset_name"] == origins["loss"] == "mine.py"
    assert origins["lr"] == origins["seed"] == "command line"
    assert origins["max_epochs"] == "default"


def test_overrides_are_checked_together_with_the_file(tmp_path):
    path = write(tmp_path, "config = ExperimentConfig(dataset_name='shop', num_heads=4)\n")
    made, _ = load_config(str(path), ["embedding_dim=12"])
    assert made.embedding_dim == 12
    with pytest.raises(InputError, match="embedding_dim=30"):
        load_config(str(path), ["embedding_dim=30"])


def test_the_published_configs_are_there():
    assert {
        f"config_{name}{kind}"
        for name in ("otto", "yoochoose", "diginetica")
        for kind in ("", "_sasrec")
    } <= set(packaged_configs())
    otto, _ = load_config("config_otto")
    assert (otto.num_uniform_negatives, otto.num_batch_negatives) == (16384, 127)
    assert (otto.sampling_style, otto.topk_sampling_k) == ("batchwise", 100)


def test_a_file_goes_before_a_packaged_config(tmp_path, monkeypatch):
    write(tmp_path, "config = ExperimentConfig(dataset_name='mine')\n", "config_otto.py")
    monkeypatch.chdir(tmp_path)
    assert load_config("config_otto.py")[0].dataset_name == "mine"
    assert load_config("config_otto")[0].dataset_name == "otto"


def test_a_missing_config_gets_a_suggestion(tmp_path):
    with pytest.raises(InputError, match=r"'config_oto'.*did you mean config_otto\?"):
        load_config("config_oto")
    with pytest.raises(InputError, match="packaged are config_"):
        load_config("zzz")
    # A path into a folder is no packaged config, even where the file name is one.
    with pytest.raises(InputError, match="neither a file nor a packaged config"):
        load_config(str(tmp_path / "config_otto.py"))


BROKEN = {
    "syntax": ("config = ExperimentConfig(\n    dataset_name='shop',,\n)\n", 4, "SyntaxError"),
    "name": ("\nconfig = ExperimentConfig(dataset_name=shop)\n", 4, "shop"),
    "import": ("import not_a_module\n", 3, "not_a_module"),
    "deep": ("def half(x):\n    return x / 0\n\nbad = half(1)\n", 6, "ZeroDivisionError"),
    "key": ("config = ExperimentConfig(dataset_name='shop', learn_rate=1)\n", 3, "'learn_rate'"),
    "value": ("config = ExperimentConfig(dataset_name='shop', lr=-1.0)\n", 3, "lr"),
    "type": ("config = ExperimentConfig(dataset_name='shop', seed='x')\n", 3, "seed"),
    "no dataset": ("config = ExperimentConfig(lr=1.0)\n", 3, "dataset_name"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_with_its_line(tmp_path, kind):
    body, line, word = BROKEN[kind]
    path = write(tmp_path, body)
    with pytest.raises(InputError) as error:
        load_config(str(path))
    message = str(error.value)
    assert message.startswith(f"{path}, line {line}: ")
    assert word in message


def test_an_unknown_key_in_a_file_gets_a_suggestion(tmp_path):
    path = write(tmp_path, "config = ExperimentConfig(dataset_name='shop', embeding_dim=8)\n")
    with pytest.raises(
        InputError, match=r"unknown setting 'embeding_dim'; did you mean embedding_dim\?"
    ):
        load_config(str(path))


@pytest.mark.parametrize("body", ["", "config = 3\n", "settings = {}\n"])
def test_a_file_without_a_config_is_refused(tmp_path, body):
    path = write(tmp_path, body)
    with pytest.raises(InputError, match=r"must define `config = ExperimentConfig\(\.\.\.\)`"):
        load_config(str(path))


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "binary.py"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_config(str(path))


def test_config_does_not_load_torch():
    """`tron config show` and `tron --help` answer at once."""
    code = "import sys, tron_cli.config; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


CONFIG = """from tron_cli.config import ExperimentConfig
config = ExperimentConfig(dataset_name="{name}")
"""


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_config_file_is_utf_8_in_every_locale(mark: bytes, tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_bytes(mark + CONFIG.format(name="caf\u00e9").encode())
    script = f"from tron_cli.config import load_config; print(ascii(load_config({str(file)!r})[0]))"
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", script],
        capture_output=True, text=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "caf\\xe9" in done.stdout


def test_a_config_file_that_is_not_utf_8_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_bytes(CONFIG.format(name="caf\u00e9").encode("latin-1"))
    with pytest.raises(InputError, match=r"config\.py") as error:
        load_config(str(file))
    assert "\n" not in str(error.value)


def test_sys_exit_in_a_config_file_is_an_error_with_its_message(tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text("import sys\nsys.exit('set DATA first')\n")
    with pytest.raises(InputError, match=r"config\.py, line 2: .*set DATA first"):
        load_config(str(file))


@pytest.mark.parametrize("key", ["max_epochs", "lr", "seed", "embedding_dim"])
def test_a_number_of_400_digits_is_refused(key: str) -> None:
    with pytest.raises(InputError, match=key):
        load_config("config_otto", [f"{key}={'9' * 400}"])
    with pytest.raises(InputError, match=rf"{key} must be below"):
        ExperimentConfig(**{"dataset_name": "shop", key: 10**400})
