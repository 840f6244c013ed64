"""TRON's SASRec baseline on MovieLens-1M: binary cross-entropy, one eventwise negative."""

from tron_cli.config import ExperimentConfig

config = ExperimentConfig(
    dataset_name="ml1m",
    # The network and the batch of config_ml1m.
    sequence_length=200,
    embedding_dim=64,
    dropout_rate=0.2,
    train_batch_size=32,
    loss="bce",
    num_uniform_negatives=1,
    num_batch_negatives=0,
    sampling_style="eventwise",
    reject_uniform_session_items=True,
    topk_sampling=False,
    lr=1e-3,
    max_epochs=100,
    early_stopping_patience=10,
    filter_rated=True,
    metrics=("R@1", "R@10", "nDCG@10"),
    val_metric="nDCG@10",
    recommendation_limit=10,
)
