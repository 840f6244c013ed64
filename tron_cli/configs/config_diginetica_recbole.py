"""SASRec on Diginetica as RecBole has it: post-norm, GELU, strong dropout, full cross-entropy."""

from tron_cli.config import ExperimentConfig

config = ExperimentConfig(
    dataset_name="diginetica",
    # RecBole's defaults for SASRec.
    block="post-norm",
    activation="gelu",
    initialization="normal",
    positions="start",
    embedding_dim=64,
    feed_forward_dim=256,
    num_heads=2,
    dropout_rate=0.5,
    loss="ce",
    num_uniform_negatives=0,
    num_batch_negatives=0,
    topk_sampling=False,
    # About as many predictions per step as RecBole's 2,048 histories.
    train_batch_size=512,
    lr=1e-3,
    max_epochs=100,
    early_stopping_patience=2,
)
