"""gSASRec on Diginetica: its network, gBCE with 16 negatives, at TRON's width and window."""

from tron_cli.config import ExperimentConfig

config = ExperimentConfig(
    dataset_name="diginetica",
    model="gsasrec",
    # gSASRec's own N(0, 1) tables take long to unlearn with many items.
    initialization="normal",
    loss="gbce",
    # With the 256 of MovieLens-1M, the first epochs here only push all scores down.
    num_uniform_negatives=16,
    num_batch_negatives=0,
    sampling_style="eventwise",
    topk_sampling=False,
    # gBCE assumes negatives drawn from all items.
    reject_in_batch_items=False,
    mask_collisions=False,
    lr=1e-3,
    # TRON's dropout for this data set, which is small enough to overfit.
    dropout_rate=0.2,
    max_epochs=100,
    early_stopping_patience=2,
)
