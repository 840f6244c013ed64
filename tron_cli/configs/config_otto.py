"""TRON XL on OTTO: the published setting (arXiv 2307.14906, configs/tron/otto.json)."""

from tron_cli.config import ExperimentConfig

config = ExperimentConfig(
    dataset_name="otto",
    # positions stays "end", as in TRON: the two have not been compared on this data yet.
    # A pass over the data is 101,000 steps: validate and save ten times in it.
    max_epochs=100,
    max_batches_per_epoch=10_000,
)
