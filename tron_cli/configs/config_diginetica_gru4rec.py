"""GRU4Rec+ on Diginetica as TRON's paper compares with it: session-parallel, BPR-max, Adagrad."""

from tron_cli.config import ExperimentConfig

config = ExperimentConfig(
    dataset_name="diginetica",
    model="gru4rec",
    # As in the original: a step is one event of each lane, and hidden states carry over.
    session_parallel=True,
    sequence_length=200,
    embedding_dim=100,
    num_blocks=1,
    dropout_rate=0.0,
    output_bias=True,
    final_activation=True,
    loss="bpr-max",
    bpr_penalty=0.5,
    num_uniform_negatives=2048,
    # One from each of the other lanes.
    num_batch_negatives=31,
    topk_sampling=False,
    train_batch_size=32,
    optimizer="adagrad",
    lr=0.2,
    max_epochs=10,
    early_stopping_patience=2,
)
