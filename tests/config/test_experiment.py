"""The settings of an experiment: every bad value gets a sentence."""

import dataclasses

import ir_measures
import pytest

from tron_cli.config import (
    FIELDS,
    ExperimentConfig,
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
    ("weight_decay", -0.1),
    ("label_smoothing", 1.0),
    ("ema_decay", 1.0),
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
    """gSASRec's configs have both."""
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
    ({"model": "gru4rec", "session_parallel": True, "sampling_style": "batchwise",
      "training_windows": "random"}, "training_windows=last"),
    ({"logq_correction": True, "topk_sampling": False, "reject_in_batch_items": False,
      "training_windows": "random"}, "num_batch_negatives=0"),
    ({"logq_correction": True, "topk_sampling": False, "reject_in_batch_items": False,
      "recency_half_life_days": 3, "shuffling_style": "shuffle_with_replacement"},
     "num_batch_negatives=0"),
    ({"recency_half_life_sessions": 900}, "shuffling_style=shuffle_with_replacement"),
    ({"window_stride": 3}, "training_windows=all"),
    ({"popularity_alpha": 0.5}, "popularity_alpha=0.75"),
    ({"negative_sampler": "popularity", "mixed_share": 0.1}, "mixed_share=0.5"),
    ({"sce_bucket_items": 100}, "sce_bucket_items=256"),
    ({"ease_l2": 3.0}, "ease_l2=100.0"),
    ({"label_smoothing": 0.1}, "label_smoothing=0.0"),
    ({"weight_decay": 0.1, "optimizer": "adagrad"}, "weight_decay=0.0"),
    ({"model": "ease", "knn_neighbors": 3}, "knn_neighbors=200"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "cure"), CURES)
def test_what_does_not_fit_together_is_cured_by_what_the_sentence_says(values, cure):
    """Word for word, as a user would copy it behind the command."""
    with pytest.raises(InputError) as error:
        config(**values)
    assert str(error.value).endswith(f" add {cure}")
    config(**{**values, **parse_overrides(cure.split())})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"training_windows": "all", "window_stride": 51}, "window_stride=51 exceeds sequence_le"),
        ({"training_windows": "prefixes", "model": "bert4rec"}, "training_windows=prefixes predic"),
        ({"recency_half_life_days": 1, "recency_half_life_sessions": 9}, "two measures of one age"),
    ],
)
def test_windows_that_make_no_sense(values, sentence):
    with pytest.raises(InputError, match=sentence):
        config(**values)


def test_baselines_do_not_mind_what_only_networks_have():
    """So that a network's file serves with model=popular behind it."""
    for name in ("popular", "session_knn", "ease"):
        config(
            model=name, loss="gbce", num_heads=3, sce_mix=True, popularity_alpha=0.1,
            mask_probability=0.3, session_parallel=True, num_uniform_negatives=0,
            num_batch_negatives=0, logq_correction=True,
        )  # fmt: skip
