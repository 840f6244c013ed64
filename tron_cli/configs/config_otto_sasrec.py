"""TRON's published baseline on OTTO: SASRec, binary cross-entropy, one eventwise negative."""

from tron_cli.config import ExperimentConfig

config = ExperimentConfig(
    dataset_name="otto",
    loss="bce",
    num_uniform_negatives=1,
    num_batch_negatives=0,
    sampling_style="eventwise",
    reject_uniform_session_items=True,
    topk_sampling=False,
    lr=1e-3,
    # A pass over the data is 101,000 steps: validate and save ten times in it.
    max_epochs=100,
    max_batches_per_epoch=10_000,
)
