"""TRON XL on Yoochoose."""

from tron_cli.config import ExperimentConfig

config = ExperimentConfig(
    dataset_name="yoochoose",
    max_epochs=10,
    early_stopping_patience=2,
)
