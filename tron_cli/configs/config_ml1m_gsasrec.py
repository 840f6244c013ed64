"""gSASRec on MovieLens-1M: the published setting (arXiv 2308.07192), in gSASRec's own names."""

from tron_cli.config import GSASRecExperimentConfig

config = GSASRecExperimentConfig(
    dataset_name="ml1m",
    embedding_dim=128,
    num_heads=1,
    num_blocks=2,
    dropout_rate=0.5,
)
