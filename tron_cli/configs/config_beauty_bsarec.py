"""BSARec on Amazon Beauty 5-core, with the settings of its published run (arXiv 2312.10325)."""

from tron_cli.config import ExperimentConfig

config = ExperimentConfig(
    # tron prepare sequences --input beauty.txt.gz --lines user-items --val-users all --name beauty
    dataset_name="beauty",
    block="bsarec",
    filter_weight=0.7,
    low_frequencies=5,
    # Its filter sees later events, so that each prefix of a history is a row of its own.
    training_windows="prefixes",
    activation="gelu",
    initialization="normal",
    sequence_length=50,
    embedding_dim=64,
    feed_forward_dim=256,
    dropout_rate=0.5,
    loss="ce",
    num_uniform_negatives=0,
    num_batch_negatives=0,
    topk_sampling=False,
    train_batch_size=256,
    max_epochs=200,
    early_stopping_patience=10,
    filter_rated=True,
    metrics=("R@5", "R@10", "R@20", "nDCG@5", "nDCG@10", "nDCG@20"),
    val_metric="nDCG@10",
    recommendation_limit=20,
)
