"""TRON on the generated shop of `tron prepare synthetic`: a minute on two cores."""

from tron_cli.config import ExperimentConfig

config = ExperimentConfig(
    dataset_name="synthetic",
    embedding_dim=64,
    num_uniform_negatives=2048,
    dropout_rate=0.0,
    lr=3e-3,
    lr_schedule="cosine",
    warmup_steps=100,
    max_epochs=2,
)
