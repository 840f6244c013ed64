"""BERT4Rec on MovieLens-1M in the setting of arXiv 2309.07602, which compares it with SASRec."""

from tron_cli.config import ExperimentConfig

config = ExperimentConfig(
    dataset_name="ml1m",
    model="bert4rec",
    mask_probability=0.2,
    block="post-norm",
    activation="gelu",
    initialization="normal",
    sequence_length=200,
    embedding_dim=64,
    feed_forward_dim=256,
    num_heads=2,
    dropout_rate=0.1,
    loss="ce",
    num_uniform_negatives=0,
    num_batch_negatives=0,
    topk_sampling=False,
    lr=1e-3,
    max_epochs=200,
    early_stopping_patience=20,
    filter_rated=True,
    metrics=("R@1", "R@10", "nDCG@10"),
    val_metric="nDCG@10",
    recommendation_limit=10,
)
