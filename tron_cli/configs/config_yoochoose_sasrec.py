"""TRON's published baseline on Yoochoose: SASRec, binary cross-entropy, one eventwise negative."""

from tron_cli.config import ExperimentConfig

config = ExperimentConfig(
    dataset_name="yoochoose",
    loss="bce",
    num_uniform_negatives=1,
    num_batch_negatives=0,
    sampling_style="eventwise",
    reject_uniform_session_items=True,
    topk_sampling=False,
    lr=1e-3,
    max_epochs=10,
    early_stopping_patience=2,
)
