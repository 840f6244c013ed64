"""TRON on MovieLens-1M, leave-one-out, seen items filtered as the published tables do."""

from tron_cli.config import ExperimentConfig

config = ExperimentConfig(
    dataset_name="ml1m",
    # Histories are long (mean 165): gSASRec's window and width.
    sequence_length=200,
    embedding_dim=128,
    dropout_rate=0.2,
    # 3,416 items: a batch of long histories holds nearly all of them, so that rejecting its
    # items would leave nothing to draw.
    num_uniform_negatives=2048,
    num_batch_negatives=0,
    reject_in_batch_items=False,
    # So few that the loss can see them all, as the best published runs on it do.
    topk_sampling=False,
    lr=1e-3,
    max_epochs=100,
    early_stopping_patience=10,
    filter_rated=True,
    metrics=("R@1", "R@10", "nDCG@10"),
    val_metric="nDCG@10",
    recommendation_limit=10,
)
