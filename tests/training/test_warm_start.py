"""`tron train --init-from`: a model starts from the weights of an earlier catalogue's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import random_checkpoint
from helpers.datasets import random_sessions, tiny_settings, write_dataset
from helpers.runs import check_same_run, die_in_step, in_process, resume, start, write_config

from tron_cli.api import training
from tron_cli.checkpoint import load_checkpoint, save_checkpoint
from tron_cli.config import ExperimentConfig
from tron_cli.data.dataset import Dataset
from tron_cli.errors import InputError
from tron_cli.models.base import build_model
from tron_cli.training.step import seed_generators
from tron_cli.training.warm_start import start_from

Command = Callable[..., tuple[int, str, str]]

# The newer week lacks items 101 and 103, has new ones, and numbers the others in another order.
OLD_IDS = np.arange(101, 121)
NEW_IDS = np.array([990, 120, 119, 118, 102, 104, 105, 991, *range(106, 118), 992])
STAYING = sorted(set(OLD_IDS.tolist()) & set(NEW_IDS.tolist()))
MODELS = [
    {},
    {"output_bias": True, "reuse_item_embeddings": False},
    {"model": "gsasrec", "topk_sampling": False, "loss": "gbce", "reject_in_batch_items": False,
     "num_batch_negatives": 0, "sampling_style": "eventwise"},
    {"model": "bert4rec", "output_bias": True},
    {"score": "cosine", "learn_score_scale": True, "normalize_inputs": True},
    {"model": "gru4rec", "session_parallel": True, "sampling_style": "batchwise"},
]  # fmt: skip


@pytest.fixture
def data_dir(tmp_path: Path, rng: np.random.Generator) -> Path:
    for name, ids in (("tiny", OLD_IDS), ("newer", NEW_IDS)):
        write_dataset(
            tmp_path / "data",
            name=name,
            train=random_sessions(rng, 45, len(ids)),
            val=random_sessions(rng, 20, len(ids)),
            test=random_sessions(rng, 5, len(ids)),
            item_ids=ids,
        )
    return tmp_path / "data"


@pytest.fixture
def old(data_dir: Path, tmp_path: Path) -> Path:
    return random_checkpoint(Dataset.open(data_dir / "tiny"), tmp_path / "old.pt").path


def rows(ids: np.ndarray, item: int) -> int:
    return ids.tolist().index(item) + 1


@pytest.mark.parametrize("settings", MODELS, ids=lambda settings: settings.get("model", "sasrec"))
def test_staying_items_keep_their_rows_and_new_ones_start_as_in_a_new_model(
    settings: dict[str, Any], data_dir: Path, tmp_path: Path
) -> None:
    old = random_checkpoint(Dataset.open(data_dir / "tiny"), tmp_path / "old.pt", **settings)
    newer = Dataset.open(data_dir / "newer")
    config = ExperimentConfig(**tiny_settings(dataset_name="newer", seed=11, **settings))
    seed_generators(config.seed, step=0)
    fresh = build_model(config, newer.num_items).state_dict()
    seed_generators(config.seed, step=0)
    model = build_model(config, newer.num_items)
    record = start_from(old.path, model, config, newer)
    counts = {name: record[name] for name in ("kept_items", "new_items", "dropped_items")}
    assert counts == {"kept_items": 18, "new_items": 3, "dropped_items": 2}
    found = model.state_dict()
    tables = {"item_embedding.weight", "output_embedding.weight"}
    assert tables <= found.keys()
    for name, values in found.items():
        if name == "carried_LBD":  # sessions under way then are no sessions of this run
            assert not values.any()
            continue
        if name not in tables:
            assert torch.equal(values, old.weights[name]), name
            continue
        for item in STAYING:
            row = old.weights[name][rows(OLD_IDS, item)]
            assert torch.equal(values[rows(NEW_IDS, item)], row)
        for item in (990, 991, 992):
            assert torch.equal(values[rows(NEW_IDS, item)], fresh[name][rows(NEW_IDS, item)])
        assert torch.equal(values[0], old.weights[name][0])
        if model.mask_item is not None:
            assert torch.equal(values[model.mask_item], old.weights[name][len(OLD_IDS) + 1])


def test_a_table_that_sleeping_rows_are_behind_in_is_brought_up_to_date(
    data_dir: Path, tmp_path: Path
) -> None:
    """Last.pt of a row-sparse optimizer is read as `tron evaluate` reads it."""
    run_dir = tmp_path / "runs" / "old"
    config = write_config(tmp_path, optimizer="row_adam", max_epochs=1)
    start(config, data_dir, run_dir.parent, run_dir.name)
    expected = load_checkpoint(run_dir / "last.pt").build_model(torch.device("cpu"))
    config_new = ExperimentConfig(**tiny_settings(dataset_name="newer"))
    model = build_model(config_new, len(NEW_IDS))
    start_from(run_dir / "last.pt", model, config_new, Dataset.open(data_dir / "newer"))
    for item in STAYING:
        row = expected.item_embedding.weight[rows(OLD_IDS, item)]
        assert torch.equal(model.item_embedding.weight[rows(NEW_IDS, item)], row)


def train(data_dir: Path, config: Path, old: Path | None, name: str) -> Path:
    return start(config, data_dir, config.parent / "runs", name, init_from=old)


def test_the_run_says_counts_and_records_the_file(
    command: Command, data_dir: Path, tmp_path: Path, old: Path
) -> None:
    config = write_config(tmp_path, dataset_name="newer", max_epochs=1)
    code, out, err = command(
        "train", "--config", config, "--init-from", old, "--data-dir", data_dir,
        "--output-dir", tmp_path / "runs", "--name", "warm", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert "embeddings of 18 items are kept, 3 new, 2 of its items dropped" in err
    expected = {
        "init_from": {
            "file": str(old),
            "sha256": hashlib.sha256(old.read_bytes()).hexdigest(),
            "dataset": "tiny",
            "step": 5,
            "kept_items": 18,
            "new_items": 3,
            "dropped_items": 2,
        }
    }
    run_dir = tmp_path / "runs" / "warm"
    assert json.loads((run_dir / "origin.json").read_text()) == expected
    for file in (Path(out.strip()), run_dir / "last.pt"):
        assert load_checkpoint(file).origin == expected
    code, out, err = command("evaluate", run_dir, "--data-dir", data_dir, "--json")
    assert json.loads(out)["origin"] == expected


def test_a_resumed_run_needs_the_file_no_more(data_dir: Path, tmp_path: Path, old: Path) -> None:
    import multiprocessing

    config = write_config(tmp_path, dataset_name="newer")
    train(data_dir, config, old, "whole")
    killed = tmp_path / "runs" / "killed"
    context = multiprocessing.get_context("fork")
    assert in_process(context, die_in_step_from, 11, config, data_dir, killed, old) == -9
    old.unlink()
    assert in_process(context, resume, data_dir, killed) == 0
    check_same_run(killed, tmp_path / "runs" / "whole", same_log=False)


def die_in_step_from(step: int, config: Path, data_dir: Path, run_dir: Path, old: Path) -> None:
    import functools

    import helpers.runs as runs

    runs.train = functools.partial(training.train, init_from=old)
    die_in_step(step, config, data_dir, run_dir)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embedding_dim": 16}, ["embedding_dim=16", "embedding_dim=8"]),
        ({"num_blocks": 2}, ["num_blocks=2", "num_blocks=1"]),
        ({"sequence_length": 9}, ["sequence_length=9", "sequence_length=6"]),
        ({"positions": "none"}, ["positions=none", "positions=end"]),
        ({"model": "gru4rec"}, ["model=gru4rec", "model=sasrec"]),
        ({"output_bias": True}, ["output_bias=True", "output_bias=False"]),
        ({"reuse_item_embeddings": False}, ["reuse_item_embeddings=False", "=True"]),
        ({"model": "popular"}, ["model=popular", "fitted"]),
    ],
)
def test_settings_that_the_weights_depend_on_must_be_the_same(
    change: dict[str, Any], words: list[str], data_dir: Path, tmp_path: Path, old: Path
) -> None:
    settings = {"model": "sasrec", **change}
    if settings["model"] == "popular":
        file = tmp_path / "config.py"
        file.write_text(
            "from tron_cli.config import ExperimentConfig\n"
            "config = ExperimentConfig(dataset_name='newer', model='popular')\n"
        )
    else:
        file = write_config(tmp_path, dataset_name="newer", **settings)
    with pytest.raises(InputError) as error:
        train(data_dir, file, old, "misfit")
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value)) < 500
    assert not (tmp_path / "runs").exists()


def test_settings_of_the_training_may_differ(data_dir: Path, tmp_path: Path, old: Path) -> None:
    config = write_config(
        tmp_path, dataset_name="newer", dropout_rate=0.1, loss="bpr-max", lr=1e-3, seed=9,
        train_batch_size=16, max_epochs=1, num_uniform_negatives=8,
    )  # fmt: skip
    train(data_dir, config, old, "other")


def test_a_baseline_cannot_be_started_from(data_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "popular.py"
    file.write_text(
        "from tron_cli.config import ExperimentConfig\n"
        "config = ExperimentConfig(dataset_name='tiny', model='popular')\n"
    )
    popular = train(data_dir, file, None, "popular")
    config = write_config(tmp_path, dataset_name="newer")
    with pytest.raises(InputError, match=r"model=popular.*model=sasrec"):
        train(data_dir, config, popular, "x")


def test_a_checkpoint_of_other_items_is_refused(data_dir: Path, tmp_path: Path, old: Path) -> None:
    write_dataset(data_dir, name="other", train=[[1, 2, 3]], item_ids=np.array([7, 8, 9]))
    config = write_config(tmp_path, dataset_name="other")
    with pytest.raises(InputError, match=r"none of the 3 items .* is among the 20"):
        train(data_dir, config, old, "x")


def test_text_ids_are_matched_too(data_dir: Path, tmp_path: Path, old: Path) -> None:
    """7 and "7" are one item, as in evaluation."""
    ids = np.array(["120", "new", "101"], dtype=object)
    dataset = write_dataset(data_dir, name="text", train=[[1, 2, 3]], item_ids=ids)
    config = ExperimentConfig(**tiny_settings(dataset_name="text"))
    model = build_model(config, 3)
    record = start_from(old, model, config, dataset)
    assert (record["kept_items"], record["new_items"], record["dropped_items"]) == (2, 1, 18)
    weights = load_checkpoint(old).weights["item_embedding.weight"]
    assert torch.equal(model.item_embedding.weight[[1, 3]], weights[[20, 1]])


def test_resume_and_init_from_exclude_each_other(
    command: Command, data_dir: Path, tmp_path: Path, old: Path
) -> None:
    code, _, err = command(
        "train", "--resume", tmp_path, "--init-from", old, "--data-dir", data_dir
    )
    assert code == 2
    assert "--init-from" in err


def test_a_checkpoint_without_an_origin_still_loads(old: Path) -> None:
    content = torch.load(old, weights_only=True)
    content.pop("origin", None)
    torch.save(content, old)
    assert load_checkpoint(old).origin == {}


def test_the_optimizer_starts_anew(data_dir: Path, tmp_path: Path) -> None:
    """Warm from its own initial weights, a run is the run from scratch, bit for bit."""
    config = write_config(tmp_path)
    dataset = Dataset.open(data_dir / "tiny")
    scratch = train(data_dir, config, None, "scratch")
    settings = load_checkpoint(scratch).config
    seed_generators(settings.seed, step=0)
    start = tmp_path / "start.pt"
    checkpoint = random_checkpoint(dataset, start)
    seed_generators(settings.seed, step=0)
    save_checkpoint(
        start, config=settings, model=build_model(settings, dataset.num_items), step=0, epoch=0,
        metrics={}, dataset=checkpoint.dataset, item_ids=checkpoint.item_ids, training={},
    )  # fmt: skip
    warm = train(data_dir, config, start, "warm")
    a, b = (load_checkpoint(path).weights for path in (scratch, warm))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "settings",
    [
        {"relative_positions": True},
        {"block": "bsarec", "training_windows": "prefixes", "low_frequencies": 3},
        {"key_padding_mask": False},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_window_must_be_the_same_where_more_than_position_embeddings_depends_on_it(
    settings: dict[str, Any], data_dir: Path, tmp_path: Path
) -> None:
    tiny, newer = (Dataset.open(data_dir / name) for name in ("tiny", "newer"))
    settings = {"positions": "none", **settings}
    old = random_checkpoint(tiny, tmp_path / "old.pt", **settings).path
    settings |= {"dataset_name": "newer", "sequence_length": 9}
    config = ExperimentConfig(**tiny_settings(**settings))
    with pytest.raises(InputError, match="with sequence_length=6, but the new run has sequence_le"):
        start_from(old, build_model(config, newer.num_items), config, newer)
