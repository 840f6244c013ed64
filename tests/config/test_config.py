"""Configs: every bad value gets a sentence, and every value its origin."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import ir_measures
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


# --- values ---------------------------------------------------------------------------------------

OUT_OF_RANGE = [
    ("sequence_length", 0),
    ("embedding_dim", 0),
    ("num_heads", -1),
    ("num_blocks", 0),
    ("dropout_rate", -0.1),
    ("dropout_rate", 1.0),
    ("dropout_rate", float("nan")),
    ("bpr_penalty", -1.0),
    ("gbce_t", -0.1),
    ("gbce_t", 1.1),
    ("num_uniform_negatives", -1),
    ("num_batch_negatives", -5),
    ("topk_sampling_k", 0),
    ("train_batch_size", 0),
    ("max_epochs", 0),
    ("max_batches_per_epoch", -1),
    ("lr", 0.0),
    ("lr", -1e-3),
    ("lr", float("inf")),
    ("warmup_steps", -1),
    ("clip_norm", -1.0),
    ("overfit_batches", -1),
    ("seed", -1),
    ("early_stopping_patience", -1),
    ("limit_val_batches", 0.0),
    ("eval_batch_size", 0),
    ("recommendation_limit", 0),
    ("save_every", -1),
    ("model", "gru"),
    ("positions", "middle"),
    ("loss", "hinge"),
    ("sampling_style", "everywhere"),
    ("optimizer", "sgd"),
    ("lr_schedule", "linear"),
    ("shuffling_style", "true"),
    ("precision", "int8"),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(InputError) as error:
        config(**{name: value})
    assert name in str(error.value)
    assert str(value) in str(error.value)


WRONG_TYPE = [
    ("max_epochs", 2.0),
    ("max_epochs", "10"),
    ("max_epochs", True),
    ("seed", None),
    ("lr", "fast"),
    ("lr", True),
    ("filter_rated", 1),
    ("filter_rated", "yes"),
    ("loss", 3),
    ("dataset_name", 7),
    ("metrics", "R@20"),
]


@pytest.mark.parametrize(("name", "value"), WRONG_TYPE)
def test_a_wrong_type_is_named(name, value):
    with pytest.raises(InputError) as error:
        config(**{name: value})
    assert name in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dropout_rate", 0.0),
        ("max_batches_per_epoch", 0),
        ("save_every", 0),
        ("sequence_length", 1),
        ("limit_val_batches", 0.01),
        ("positions", "start"),
    ],
)
def test_the_edge_of_a_range_is_in_it(name, value):
    assert getattr(config(**{name: value}), name) == value


def test_a_whole_number_is_a_number():
    made = config(clip_norm=1, limit_val_batches=3)
    assert (made.clip_norm, made.limit_val_batches) == (1.0, 3.0)
    assert type(made.clip_norm) is float


@pytest.mark.parametrize(
    "style", ["shuffling_with_replacement", "shuffling_without_replacement", "no_shuffle"]
)
def test_a_shuffle_value_that_matches_nothing_is_refused(style):
    """TRON compares its README's values with none of the code's: shuffling silently stays off."""
    with pytest.raises(InputError) as error:
        config(shuffling_style=style)
    for word in ("shuffling_style", repr(style), "no_shuffling", "shuffle_without_replacement"):
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["", "a/b", "../shop", ".."])
def test_a_dataset_name_that_is_no_folder_name_is_refused(name):
    """It becomes part of the checkpoint's file name: a slash would fail after the first epoch."""
    with pytest.raises(InputError, match="dataset_name"):
        config(dataset_name=name)


def test_no_metrics_at_all_are_refused():
    with pytest.raises(InputError, match="metrics"):
        config(metrics=())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"embedding_dim": 30, "num_heads": 4}, ["embedding_dim=30", "num_heads=4"]),
        (
            {"num_uniform_negatives": 0, "num_batch_negatives": 0},
            ["num_uniform_negatives=0", "num_batch_negatives=0"],
        ),
        (
            {"num_uniform_negatives": 8, "num_batch_negatives": 3, "topk_sampling_k": 12},
            ["topk_sampling_k=12", "11 negatives"],
        ),
        ({"val_metric": "R"}, ["cutoff", "'R'"]),
        ({"metrics": ("R@20", "nDCG")}, ["cutoff", "'nDCG'"]),
        ({"metrics": ("R@0",)}, ["cutoff", "'R@0'"]),
    ],
)
def test_values_that_do_not_fit_together(values, words):
    with pytest.raises(InputError) as error:
        config(**values)
    for word in words:
        assert word in str(error.value)


def test_topk_beyond_the_negatives_matters_only_where_topk_is_on():
    config(num_uniform_negatives=1, num_batch_negatives=0, topk_sampling=False)


def test_metrics_may_be_ir_measures_objects_and_lists():
    """As gSASRec's configs have them."""
    made = config(metrics=[ir_measures.R @ 20, "nDCG@10"], val_metric=ir_measures.nDCG @ 10)
    assert made.metrics == ("R@20", "nDCG@10")
    assert made.val_metric == "nDCG@10"


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().lr = 1.0


def test_every_field_says_what_it_means():
    assert all(field.help for field in FIELDS.values())


@pytest.mark.parametrize(
    ("values", "method"),
    [
        ({}, "tron"),
        ({"topk_sampling": False}, "tron"),
        ({"sampling_style": "sessionwise"}, "sasrec"),
        ({"loss": "bce"}, "sasrec"),
    ],
)
def test_method(values, method):
    assert config(**values).method == method


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


PLAIN_UNIFORM = {
    "loss": "gbce",
    "topk_sampling": False,
    "num_batch_negatives": 0,
    "sampling_style": "eventwise",
}


@pytest.mark.parametrize(
    "change",
    [
        {"topk_sampling": True},
        {"num_batch_negatives": 3},
        {"reject_uniform_session_items": True},
        {"sampling_style": "sessionwise", "reject_uniform_session_items": True},
        {"sampling_style": "batchwise"},  # reject_in_batch_items is the default
    ],
)
def test_gbce_refuses_negatives_for_which_its_beta_does_not_hold(change):
    ExperimentConfig(dataset_name="shop", **PLAIN_UNIFORM)
    with pytest.raises(InputError, match="loss=gbce needs plain uniform negatives"):
        ExperimentConfig(dataset_name="shop", **{**PLAIN_UNIFORM, **change})
    plain = {"sampling_style": "batchwise", "reject_in_batch_items": False}
    ExperimentConfig(dataset_name="shop", **{**PLAIN_UNIFORM, **plain})


# What each loss or correction refuses, and what its sentence says to add.
CURES = [
    ({"loss": "ce"}, "num_uniform_negatives=0 num_batch_negatives=0 topk_sampling=False"),
    ({"loss": "sce", "num_uniform_negatives": 0, "topk_sampling": False, "final_activation": True},
     "num_batch_negatives=0 final_activation=False"),
    ({"loss": "gbce", "negative_sampler": "popularity"},
     "topk_sampling=False reject_in_batch_items=False num_batch_negatives=0 "
     "negative_sampler=uniform"),
    ({"logq_correction": True, "mask_collisions": False},
     "topk_sampling=False reject_in_batch_items=False mask_collisions=True"),
    ({"model": "gru4rec", "session_parallel": True, "sampling_style": "eventwise",
      "reject_uniform_session_items": True}, "reject_uniform_session_items=False"),
    ({"popularity_alpha": 0.5}, "popularity_alpha=0.75"),
    ({"negative_sampler": "popularity", "mixed_share": 0.1}, "mixed_share=0.5"),
    ({"sce_bucket_items": 100}, "sce_bucket_items=256"),
    ({"ease_l2": 3.0}, "ease_l2=100.0"),
    ({"model": "ease", "knn_neighbors": 3}, "knn_neighbors=200"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "cure"), CURES)
def test_what_does_not_fit_together_is_cured_by_what_the_sentence_says(values, cure):
    """Word for word, as a user would copy it behind the command."""
    with pytest.raises(InputError) as error:
        config(**values)
    assert str(error.value).endswith(f" add {cure}")
    config(**{**values, **parse_overrides(cure.split())})


def test_baselines_do_not_mind_what_only_networks_have():
    """So that a network's file serves with model=popular behind it."""
    for name in ("popular", "session_knn", "ease"):
        config(
            model=name, loss="gbce", num_heads=3, sce_mix=True, popularity_alpha=0.1,
            mask_probability=0.3, session_parallel=True, num_uniform_negatives=0,
            num_batch_negatives=0, logq_correction=True,
        )  # fmt: skip


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
