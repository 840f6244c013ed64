"""The configurations of otto-de/TRON are read with the meaning they have there."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from helpers.datasets import random_sessions, write_dataset

from tron_cli.api.training import training_device
from tron_cli.config import ExperimentConfig, load_config
from tron_cli.errors import InputError

# --- otto-de/TRON ---------------------------------------------------------------------------------

# tron/otto.json, by TRON's names and by ours.
TRON = {
    "model": "sasrec", "dataset": "otto", "hidden_size": 200, "num_layers": 2, "dropout": 0.05,
    "num_batch_negatives": 127, "num_uniform_negatives": 16384,
    "reject_uniform_session_items": False, "reject_in_batch_items": True,
    "sampling_style": "batchwise", "topk_sampling": True, "topk_sampling_k": 100, "loss": "ssm",
    "max_epochs": 10, "batch_size": 128, "max_session_length": 50, "lr": 0.0005,
    "limit_val_batches": 1.0, "accelerator": "gpu", "overfit_batches": 0,
    "share_embeddings": True, "output_bias": False, "shuffling_style": "no_shuffling",
    "optimizer": "adam",
}  # fmt: skip
OURS = {
    "model": "sasrec", "dataset_name": "otto", "embedding_dim": 200, "num_blocks": 2,
    "num_heads": 1, "dropout_rate": 0.05, "positions": "end", "num_batch_negatives": 127,
    "num_uniform_negatives": 16384, "reject_uniform_session_items": False,
    "reject_in_batch_items": True, "sampling_style": "batchwise", "topk_sampling": True,
    "topk_sampling_k": 100, "loss": "ssm", "max_epochs": 10, "max_batches_per_epoch": 0,
    "train_batch_size": 128, "sequence_length": 50, "lr": 0.0005, "limit_val_batches": 1.0,
    "overfit_batches": 0, "reuse_item_embeddings": True, "output_bias": False,
    "shuffling_style": "no_shuffling", "optimizer": "adam", "session_parallel": False,
    "final_activation": False,
}  # fmt: skip
ABSENT = object()

Changes = tuple[dict[str, Any], dict[str, Any]]


def both(**same: Any) -> Changes:
    return same, same


def joined(*changes: Changes) -> Changes:
    theirs, ours = zip(*changes, strict=True)
    return (
        {key: value for each in theirs for key, value in each.items()},
        {key: value for each in ours for key, value in each.items()},
    )


def on(dataset: str) -> Changes:
    return {"dataset": dataset}, {"dataset_name": dataset}


def dropout(rate: float) -> Changes:
    return {"dropout": rate}, {"dropout_rate": rate}


def negatives(uniform: int, batch: int | None) -> Changes:
    return both(num_uniform_negatives=uniform, num_batch_negatives=batch)


ALL_NEGATIVES = (
    {"topk_sampling": ABSENT, "topk_sampling_k": ABSENT},
    {"topk_sampling": False},
)
SESSIONWISE = joined(ALL_NEGATIVES, both(sampling_style="sessionwise"))
LARGE = joined(SESSIONWISE, negatives(8192, 127))
MCAULEY = joined(
    ALL_NEGATIVES,
    negatives(1, 0),
    both(loss="bce", lr=0.001, sampling_style="eventwise", reject_uniform_session_items=True),
)
GRU = joined(
    ALL_NEGATIVES,
    dropout(0.0),
    (
        {
            "hidden_size": 100, "num_layers": 1, "num_batch_negatives": None, "batch_size": 32,
            "max_session_length": 200, "original_gru": False,
        },
        {
            "embedding_dim": 100, "num_blocks": 1, "num_batch_negatives": 31,
            "train_batch_size": 32, "sequence_length": 200, "session_parallel": True,
        },
    ),
    both(
        model="gru4rec", num_uniform_negatives=2048, loss="bpr-max", bpr_penalty=0.5, lr=0.2,
        optimizer="adagrad", output_bias=True, final_activation=True,
    ),
)  # fmt: skip


def tron_files() -> dict[str, Changes]:
    """The changes of each of the 30 files, in TRON's names and in ours."""
    files = {
        "onex/sasrec_otto_mcauley": joined(on("onex"), MCAULEY),
        "onex/sasrec_otto_ours": on("onex"),
        "onex/sasrec_otto_status_quo": joined(on("onex"), LARGE),
    }
    penalties = {"diginetica": 0.1, "otto": 0.03, "yoochoose": 0.125}
    gru_epochs = {"diginetica": 10, "otto": 1, "yoochoose": 3}
    for data in ("diginetica", "otto", "yoochoose"):
        small = data == "diginetica"
        common = joined(on(data), both(max_epochs=100 if small else 10))
        bce = both(loss="bce")
        for uniform, batch in ((512, 16), (8192, 127)):
            name = f"experiment1/sasrec_{data}_uniform{uniform}_inbatch{batch}"
            files[name] = joined(common, LARGE, bce, negatives(uniform, batch))
        listwise = joined(common, LARGE, dropout(0.1 if small else 0.05))
        bpr_max = both(loss="bpr-max", bpr_penalty=penalties[data])
        files[f"experiment2/sasrec_{data}_bpr-max"] = joined(listwise, bpr_max)
        files[f"experiment2/sasrec_{data}_ssm"] = listwise
        topk = joined(common, dropout(0.2 if small else 0.05))
        for uniform in (8192, 16384):
            name = f"experiment3/sasrec_{data}_topk100_uniform{uniform}_inbatch127"
            files[name] = joined(topk, negatives(uniform, 127))
        files[f"standard/sasrec_{data}"] = joined(common, MCAULEY)
        files[f"standard/gru4rec_{data}"] = joined(common, GRU, both(max_epochs=gru_epochs[data]))
        files[f"tron/{data}"] = topk
    return files


FILES = tron_files()


def tron_json(theirs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**TRON, **theirs}.items() if value is not ABSENT}


def written(folder: Path, values: Any, name: str = "otto.json") -> str:
    path = folder / name
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


def load(folder: Path, *overrides: str, **theirs: Any) -> ExperimentConfig:
    return load_config(written(folder, tron_json(theirs)), overrides)[0]


def test_there_are_thirty_files():
    assert len(FILES) == 30


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_tron_is_read(tmp_path, name):
    theirs, ours = FILES[name]
    config, origins = load_config(written(tmp_path, tron_json(theirs), "its_name.json"))
    assert config == ExperimentConfig(**{**OURS, **ours})
    assert origins["dataset_name"] == origins["shuffling_style"] == "its_name.json"
    assert origins["seed"] == "default"


# Another allowed value of each key, and what it changes.
ELSEWISE: list[tuple[str, Any, dict[str, Any]]] = [
    ("dataset", "shop", {"dataset_name": "shop"}),
    ("hidden_size", 64, {"embedding_dim": 64}),
    ("num_layers", 3, {"num_blocks": 3}),
    ("dropout", 0, {"dropout_rate": 0.0}),
    ("num_batch_negatives", 7, {"num_batch_negatives": 7}),
    ("num_batch_negatives", None, {"num_batch_negatives": 127}),
    ("num_uniform_negatives", 300, {"num_uniform_negatives": 300}),
    ("reject_uniform_session_items", True, {"reject_uniform_session_items": True}),
    ("reject_in_batch_items", False, {"reject_in_batch_items": False}),
    ("sampling_style", "eventwise", {"sampling_style": "eventwise"}),
    ("topk_sampling", False, {"topk_sampling": False}),
    ("topk_sampling_k", 10, {"topk_sampling_k": 10}),
    ("topk_sampling_k", ABSENT, {"topk_sampling_k": 1000}),
    ("loss", "bce", {"loss": "bce"}),
    ("bpr_penalty", 0.25, {"bpr_penalty": 0.25}),
    ("bpr_penalty", None, {}),
    ("max_epochs", 2, {"max_epochs": 2}),
    ("batch_size", 32, {"train_batch_size": 32}),
    ("max_session_length", 20, {"sequence_length": 20}),
    ("lr", 1, {"lr": 1.0}),
    ("limit_val_batches", 0.1, {"limit_val_batches": 0.1}),
    ("limit_val_batches", 5, {"limit_val_batches": 5.0}),
    ("overfit_batches", 3, {"overfit_batches": 3}),
    ("overfit_batches", 0.0, {}),
    ("share_embeddings", False, {"reuse_item_embeddings": False}),
    ("output_bias", True, {"output_bias": True}),
    ("optimizer", "adagrad", {"optimizer": "adagrad"}),
    ("shuffling_style", "shuffle_without_replacement",
     {"shuffling_style": "shuffle_without_replacement"}),
    ("shuffling_style", "shuffle_with_replacement",
     {"shuffling_style": "shuffle_with_replacement"}),
    ("shuffling_style", "shuffling_without_replacement",
     {"shuffling_style": "shuffle_without_replacement"}),
    ("shuffling_style", "shuffling_with_replacement",
     {"shuffling_style": "shuffle_with_replacement"}),
    # TRON's SASRec does not look at them.
    ("original_gru", True, {}),
    ("final_activation", True, {}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "changes"), ELSEWISE)
def test_every_key_says_what_it_says_in_tron(tmp_path, key, value, changes):
    assert load(tmp_path, **{key: value}) == ExperimentConfig(**{**OURS, **changes})


def test_no_key_is_left_out():
    keys = {key for theirs, _ in FILES.values() for key in tron_json(theirs)}
    checked = {key for key, _, _ in ELSEWISE} | {"model", "accelerator"}  # tested below
    assert keys == checked


def test_tron_draws_eventwise_negatives_of_its_gru_sessionwise(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "tron"):
        config = load(tmp_path, **{**GRU[0], "sampling_style": "eventwise"})
    assert config.sampling_style == "sessionwise"
    assert "sessionwise" in caplog.text


def test_the_command_line_wins_in_our_names(tmp_path):
    path = written(tmp_path, tron_json({}))
    config, origins = load_config(path, ["lr=0.1", "seed=3", "positions=start"])
    assert (config.lr, config.seed, config.positions) == (0.1, 3, "start")
    assert origins["lr"] == origins["seed"] == "command line"


def test_null_follows_the_batch_size_of_the_command_line(tmp_path):
    config = load(tmp_path, "train_batch_size=64", **GRU[0])
    assert config.num_batch_negatives == 63


def test_an_override_may_repair_what_the_file_gets_wrong(tmp_path):
    config = load(tmp_path, "topk_sampling_k=5", num_uniform_negatives=10, num_batch_negatives=0)
    assert config.topk_sampling_k == 5


def test_a_note_names_what_tron_does_otherwise(tmp_path, caplog):
    """It leaves out settings that the command line has set TRON's way."""
    with caplog.at_level(logging.INFO, "tron"):
        load(tmp_path)
    for words in ("mask_collisions=False", "--one-pass", "validation split", "precision=fp16"):
        assert words in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "tron"):
        load(tmp_path, "mask_collisions=False", "precision=float32")
    assert "mask_collisions" not in caplog.text
    assert "precision" not in caplog.text
    assert "--one-pass" in caplog.text


def test_a_note_says_that_tron_itself_would_not_shuffle(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "tron"):
        load(tmp_path, shuffling_style="shuffling_with_replacement")
    assert "shuffling_with_replacement" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "tron"):
        load(tmp_path, shuffling_style="shuffle_with_replacement")
    assert "shuffl" not in caplog.text


WRONG = [
    ({"hiden_size": 64}, ["unknown key 'hiden_size'", "hidden_size"]),
    ({"embedding_dim": 64}, ["unknown key 'embedding_dim'", "TRON calls it hidden_size"]),
    ({"seed": 1}, ["unknown key 'seed'", "key=value"]),
    ({"hidden_size": "200"}, ["hidden_size must be a whole number", '"200"']),
    ({"hidden_size": 200.0}, ["hidden_size must be a whole number", "200.0"]),
    ({"hidden_size": True}, ["hidden_size must be a whole number", "true"]),
    ({"hidden_size": None}, ["hidden_size must be a whole number", "null"]),
    ({"hidden_size": 0}, ["hidden_size", "embedding_dim must be at least 1"]),
    ({"lr": -1}, ["lr must be above 0"]),
    ({"lr": "fast"}, ["lr must be a number", '"fast"']),
    ({"output_bias": 1}, ["output_bias must be true or false", "1"]),
    ({"num_batch_negatives": "all"}, ["num_batch_negatives must be a whole number or null"]),
    ({"dataset": 5}, ["dataset must be a string"]),
    ({"dataset": "../shop"}, ["dataset", "dataset_name"]),
    ({"model": "bert4rec"}, ["model must be one of sasrec, gru4rec", "'bert4rec'"]),
    ({"loss": "bpr_max"}, ["loss must be one of", "did you mean 'bpr-max'?"]),
    ({"shuffling_style": "shuffle"}, ["shuffling_style must be one of"]),
    ({"accelerator": "tpu"}, ["accelerator must be one of gpu, cpu, auto"]),
    ({"limit_val_batches": 1}, ["limit_val_batches is 1", "1.0"]),
    ({"limit_val_batches": 0}, ["limit_val_batches is 0"]),
    ({"overfit_batches": 0.5}, ["overfit_batches is 0.5"]),
    ({"dropout": ABSENT}, ["dropout missing"]),
    ({"loss": "bpr-max"}, ["bpr_penalty missing"]),
    ({"loss": "bpr-max", "bpr_penalty": None}, ["bpr_penalty missing"]),
    ({"model": "gru4rec", "original_gru": False}, ["final_activation missing"]),
    ({**GRU[0], "original_gru": True}, ["original_gru is true", "set it to false"]),
]


@pytest.mark.parametrize(("theirs", "words"), WRONG)
def test_a_mistake_is_named_by_file_and_key(tmp_path, theirs, words):
    path = written(tmp_path, tron_json(theirs))
    with pytest.raises(InputError) as error:
        load_config(path)
    for word in (path, *words):
        assert word in str(error.value)


def test_a_mistake_on_the_command_line_is_not_the_files(tmp_path):
    path = written(tmp_path, tron_json({}))
    with pytest.raises(InputError) as error:
        load_config(path, ["lr=-1"])
    assert path not in str(error.value)


BROKEN = [
    ('{\n  "model": "sasrec",\n  "lr": 0.1,,\n}', "line 3"),
    ('{"model": "sasrec"', "line 1"),
    ("", "line 1"),
    ("[1, 2]", "expected an object"),
    ('{"lr": 1, "lr": 2}', "lr is given twice"),
]


@pytest.mark.parametrize(("text", "words"), BROKEN)
def test_broken_json_is_named_by_file_and_line(tmp_path, text, words):
    path = written(tmp_path, text)
    with pytest.raises(InputError) as error:
        load_config(path)
    assert path in str(error.value)
    assert words in str(error.value)


def test_a_file_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "otto.json"
    path.write_bytes(b'{"model": "\xff\xfe"}')
    with pytest.raises(InputError, match=r"otto\.json"):
        load_config(str(path))
    path.write_text(json.dumps(tron_json({})), encoding="utf-8-sig")
    assert load_config(str(path))[0].dataset_name == "otto"


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"no/otto\.json"):
        load_config("no/otto.json")


def test_config_show_takes_a_file_of_tron(tmp_path, command):
    path = written(tmp_path, tron_json({}))
    code, out, err = command("config", "show", path, "seed=5")
    assert code == 0
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert rows["shuffling_style"] == ["no_shuffling", "otto.json"]
    assert rows["seed"] == ["5", "command", "line"]
    assert "TRON" in err
    assert "TRON" not in out


# --- running a file of TRON -----------------------------------------------------------------------

SMALL = {
    "dataset": "shop", "hidden_size": 8, "max_session_length": 6, "batch_size": 8,
    "num_uniform_negatives": 16, "num_batch_negatives": 4, "topk_sampling_k": 8, "max_epochs": 1,
}  # fmt: skip


@pytest.fixture
def trained(tmp_path, rng, command, monkeypatch):
    """Run `tron train` on a small file of TRON; what it said on stderr."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    splits = {split: random_sessions(rng, 20, 30) for split in ("train", "val", "test")}
    write_dataset(tmp_path, name="shop", num_items=30, **splits)

    def run(*options: str, **theirs: Any) -> str:
        path = written(tmp_path, tron_json({**SMALL, **theirs}))
        where = ("--data-dir", tmp_path, "--output-dir", tmp_path / "runs")
        code, out, err = command("train", "--config", path, *where, *options)
        assert code == 0, err
        assert Path(out.strip()).is_file()
        return err

    return run


def test_a_file_of_tron_trains(trained):
    assert "accelerator" not in trained(accelerator="auto")


def test_without_a_gpu_a_file_that_asks_for_one_trains_on_the_cpu_and_says_so(trained):
    assert "accelerator is gpu" in trained(accelerator="gpu")
    assert "accelerator is gpu" not in trained("--device", "cpu", accelerator="gpu")


@pytest.mark.parametrize(
    ("accelerator", "option", "expected"),
    [
        ("gpu", "auto", "cuda"),
        ("auto", "auto", "cuda"),
        ("cpu", "auto", "cpu"),
        ("gpu", "cpu", "cpu"),
    ],
)
def test_the_accelerator_says_what_device_auto_means(
    tmp_path, monkeypatch, accelerator, option, expected
):
    """On a machine with a GPU; another --device wins."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.zeros", lambda *shape, device: None)
    path = written(tmp_path, tron_json({"accelerator": accelerator}))
    assert training_device(option, path).type == expected
