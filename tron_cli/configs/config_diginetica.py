"""TRON XL on Diginetica."""

from tron_cli.config import ExperimentConfig

config = ExperimentConfig(
    dataset_name="diginetica",
    # A small data set overfits: TRON's dropout for it.
    dropout_rate=0.2,
    max_epochs=100,
    early_stopping_patience=2,
)
