"""TRON on the generated shop of `tron prepare synthetic`: a minute on two cores."""

from tron_cli.config import ExperimentConfig

config = ExperimentConfig(
    dataset_name="synthetic",
    embedding_dim=64,
    dropout_rate=0.0,
    # Fewer negatives for a small catalogue; top-k keeps more than half of them.
    num_uniform_negatives=512,
    topk_sampling_k=300,
    lr=5e-3,
    lr_schedule="cosine",
    warmup_steps=100,
    max_epochs=4,
)
