"""TRON XL on Yoochoose, and where to start with session data of your own."""

from tron_cli.config import ExperimentConfig

config = ExperimentConfig(
    dataset_name="yoochoose",
    # Scores higher on validation than TRON's end-aligned positions (1/64: R@20 .7129, .7100).
    positions="start",
    # Embeddings of length one, as in NISER: R@20 / RR@20 .5283 / .1851 on Diginetica, where dot
    # products have .5227 / .1823, and about the same on a week of Yoochoose (.6464 / .3663 and
    # .6489 / .3647).
    score="cosine",
    # TRON's 0.05 overfits. Of 0.05, 0.2 and 0.4 the last is best on validation of three data sets,
    # a week and 1/64 of Yoochoose and Diginetica, so that any two would choose it for the third
    # (1/64: .7192, with 0.2 .7141). It needs more epochs.
    dropout_rate=0.4,
    max_epochs=50,
    early_stopping_patience=2,
)
