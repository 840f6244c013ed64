"""Settings from the arguments of gSASRec's GSASRecExperimentConfig (arXiv 2308.07192)."""

from __future__ import annotations

from typing import Any

from tron_cli.config.experiment import FIELDS, ExperimentConfig

# gSASRec's names: the settings that they stand for.
_SETTINGS = {field.gsasrec: name for name, field in FIELDS.items() if field.gsasrec}


def GSASRecExperimentConfig(
    dataset_name: str,
    sequence_length: int = 200,
    embedding_dim: int = 256,
    train_batch_size: int = 128,
    num_heads: int = 4,
    num_blocks: int = 3,
    dropout_rate: float = 0.0,
    negs_per_pos: int = 256,
    max_epochs: int = 10000,
    max_batches_per_epoch: int = 100,
    metrics: Any = ("nDCG@10", "R@1", "R@10"),
    val_metric: Any = "nDCG@10",
    early_stopping_patience: int = 200,
    gbce_t: float = 0.75,
    filter_rated: bool = True,
    eval_batch_size: int = 512,
    recommendation_limit: int = 10,
    reuse_item_embeddings: bool = False,
    **more: Any,
) -> ExperimentConfig:
    """Return gSASRec's configuration, with its names, order and defaults.

    The rest is fixed as in its code: the gSASRec network, gBCE on uniform negatives of each
    position that may be its own target, positions counted from the end of the window, Adam at 1e-3.
    `metrics` and `val_metric` may be measures of ir_measures or their names; `more` are further
    settings of ExperimentConfig.
    """
    arguments = locals()
    return ExperimentConfig(
        **{
            "model": "gsasrec",
            "positions": "end",
            "loss": "gbce",
            "num_batch_negatives": 0,
            "sampling_style": "eventwise",
            "reject_in_batch_items": False,
            "topk_sampling": False,
            "mask_collisions": False,
            "lr": 1e-3,
            **{name: arguments[argument] for argument, name in _SETTINGS.items()},
            **more,
        }
    )
