"""The configurations of gSASRec are read with the meaning they have there."""

from __future__ import annotations

import dataclasses
import textwrap

import pytest

from tron_cli.config import ExperimentConfig, GSASRecExperimentConfig, load_config
from tron_cli.errors import InputError


def test_a_python_config_of_gsasrec_runs_after_changing_its_import(tmp_path):
    """In the words of its ML-1M setting, with measures of ir_measures as values."""
    path = tmp_path / "config_ml1m.py"
    path.write_text(
        textwrap.dedent(
            """
            from ir_measures import R, nDCG
            from tron_cli.config import GSASRecExperimentConfig

            config = GSASRecExperimentConfig(
                dataset_name="ml1m", sequence_length=200, embedding_dim=128, num_heads=1,
                max_batches_per_epoch=100, num_blocks=2, dropout_rate=0.5, negs_per_pos=256,
                gbce_t=0.75, metrics=[nDCG @ 10, R @ 1], val_metric=nDCG @ 10,
            )
            """
        )
    )
    config, origins = load_config(str(path), ["seed=3"])
    assert config == ExperimentConfig(
        dataset_name="ml1m", model="gsasrec", sequence_length=200, embedding_dim=128, num_heads=1,
        num_blocks=2, dropout_rate=0.5, positions="end", reuse_item_embeddings=False, loss="gbce",
        gbce_t=0.75, num_uniform_negatives=256, num_batch_negatives=0, sampling_style="eventwise",
        reject_in_batch_items=False, topk_sampling=False, mask_collisions=False,
        train_batch_size=128, max_epochs=10000, max_batches_per_epoch=100, lr=1e-3,
        metrics=("nDCG@10", "R@1"), val_metric="nDCG@10", early_stopping_patience=200,
        filter_rated=True, eval_batch_size=512, recommendation_limit=10, seed=3,
    )  # fmt: skip
    assert origins["gbce_t"] == "default"
    assert origins["embedding_dim"] == "config_ml1m.py"


def test_the_defaults_are_gsasrecs():
    values = dataclasses.asdict(GSASRecExperimentConfig("shop"))
    expected = {
        "dataset_name": "shop", "sequence_length": 200, "embedding_dim": 256,
        "train_batch_size": 128, "num_heads": 4, "num_blocks": 3, "dropout_rate": 0.0,
        "num_uniform_negatives": 256, "max_epochs": 10000, "max_batches_per_epoch": 100,
        "metrics": ("nDCG@10", "R@1", "R@10"), "val_metric": "nDCG@10",
        "early_stopping_patience": 200, "gbce_t": 0.75, "filter_rated": True,
        "eval_batch_size": 512, "recommendation_limit": 10, "reuse_item_embeddings": False,
    }  # fmt: skip
    assert {key: values[key] for key in expected} == expected


def test_arguments_may_stand_in_gsasrecs_order():
    config = GSASRecExperimentConfig("shop", 20, 64, 16, 2, 1, 0.1, 8)
    assert (config.sequence_length, config.embedding_dim, config.train_batch_size) == (20, 64, 16)
    assert (config.num_heads, config.num_blocks, config.dropout_rate) == (2, 1, 0.1)
    assert config.num_uniform_negatives == 8


def test_settings_of_ours_may_join_gsasrecs():
    config = GSASRecExperimentConfig("shop", seed=9, mask_collisions=True)
    assert config.seed == 9
    assert config.mask_collisions


def test_an_unknown_argument_gets_a_hint(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "from tron_cli.config import GSASRecExperimentConfig\n"
        "config = GSASRecExperimentConfig('shop', n_heads=2)\n"
    )
    with pytest.raises(InputError, match=r"line 2: unknown setting 'n_heads'; did you mean num_h"):
        load_config(str(path))
