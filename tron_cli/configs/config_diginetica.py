"""TRON XL on Diginetica."""

from tron_cli.config import ExperimentConfig

config = ExperimentConfig(
    dataset_name="diginetica",
    # Scores higher on validation than TRON's end-aligned positions (R@20 .5227, .5215).
    positions="start",
    # TRON's dropout for this data set, which is small enough to overfit.
    dropout_rate=0.2,
    max_epochs=100,
    early_stopping_patience=2,
)
