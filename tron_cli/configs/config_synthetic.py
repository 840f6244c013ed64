"""TRON on the generated shop of `tron prepare synthetic`: a minute on two cores."""

from tron_cli.config import ExperimentConfig

config = ExperimentConfig(
    dataset_name="synthetic",
    embedding_dim=64,
    dropout_rate=0.0,
    # A small catalogue: fewer negatives, of which top-k keeps half.
    num_uniform_negatives=512,
    topk_sampling_k=300,
    lr=5e-3,
    lr_schedule="cosine",
    warmup_steps=100,
    max_epochs=4,
)
