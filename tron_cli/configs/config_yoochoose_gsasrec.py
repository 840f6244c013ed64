"""gSASRec on Yoochoose: its network, gBCE with 16 negatives, at TRON's width and window."""

from tron_cli.config import ExperimentConfig

config = ExperimentConfig(
    dataset_name="yoochoose",
    model="gsasrec",
    # Its own N(0, 1) tables take long to unlearn where items are many.
    initialization="normal",
    loss="gbce",
    # Its 256 on MovieLens-1M pull all scores down for epochs here, before any is learned.
    num_uniform_negatives=16,
    num_batch_negatives=0,
    sampling_style="eventwise",
    topk_sampling=False,
    # gBCE holds for negatives drawn from all items.
    reject_in_batch_items=False,
    mask_collisions=False,
    lr=1e-3,
    max_epochs=10,
    early_stopping_patience=2,
)
