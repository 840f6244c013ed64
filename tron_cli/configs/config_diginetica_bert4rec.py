"""BERT4Rec on Diginetica: cross-entropy on masked items."""

from tron_cli.config import ExperimentConfig

config = ExperimentConfig(
    dataset_name="diginetica",
    model="bert4rec",
    # Leaves short sessions more events to predict from than the paper's 0.6 for short histories.
    mask_probability=0.3,
    num_heads=2,
    feed_forward_dim=800,
    activation="gelu",
    loss="ce",
    num_uniform_negatives=0,
    num_batch_negatives=0,
    topk_sampling=False,
    lr=1e-3,
    # TRON's dropout for this data set, which is small enough to overfit.
    dropout_rate=0.2,
    max_epochs=100,
    early_stopping_patience=2,
)
