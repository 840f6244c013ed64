"""Experiments by name: what is trained or mixed; their seeds and final models."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tron_cli.registry import BASELINES

SEED = 42  # of the files without a seed in their names


@dataclass(frozen=True)
class Experiment:
    """Row of the table: a packaged config and the overrides, or the parts of a mixed model.

    parts: experiments to mix, each with the seed of the mixed model or, as in NAME-seed=43, its
    own. one_pass: also read the test split in one pass, as TRON does.
    """

    dataset: str
    title: str
    config: str = ""
    overrides: tuple[str, ...] = ()
    one_pass: bool = False
    parts: tuple[str, ...] = ()


_CE = ("loss=ce", "num_uniform_negatives=0", "num_batch_negatives=0", "topk_sampling=false")
_COSINE = ("score=cosine", "score_scale=14")


def _session_experiments(
    dataset: str, config: str, dropout: str, *changes: str
) -> dict[str, Experiment]:
    """Return TRON with its own scores and a dropout, and its SASRec with other changes."""
    common = (f"dataset_name={dataset}", *changes)
    tron = f"config_{config}"
    published = (f"dataset_name={dataset}", "score=dot", f"dropout_rate={dropout}")
    if config == "yoochoose":
        published = (*published, "max_epochs=10")
    # SASRec's epochs are many, for the gain of each is small. On the parts of Yoochoose patience
    # ends them; on Diginetica a budget of one and a half times TRON's steps.
    epochs = "max_epochs=100" if config == "yoochoose" else "max_epochs=10"
    return {
        f"{dataset}-tron-end": Experiment(
            dataset, "TRON, positions=end", tron, (*published, "positions=end"), one_pass=True
        ),
        f"{dataset}-tron-start": Experiment(
            dataset, "TRON, positions=start", tron, (*published, "positions=start")
        ),
        f"{dataset}-sasrec": Experiment(
            dataset, "SASRec, BCE, 1 negative", f"config_{config}_sasrec", (*common, epochs)
        ),
    }


_BASELINES = {
    "session_knn": "session-kNN (V-SKNN)",
    "markov": "first-order Markov",
    "session_popular": "most popular in the session",
    "popular": "most popular",
}


def _with_knn(
    dataset: str, config: str, dropouts: dict[str, str], *changes: str
) -> dict[str, Experiment]:
    """Return the baselines, TRON with cosines, and mixtures with session-kNN.

    dropouts: what follows the name of a network, and its dropout; both networks are also joined.
    """
    common, knn = f"dataset_name={dataset}", f"{dataset}-session_knn"
    found = {
        f"{dataset}-{model}": Experiment(dataset, title, config, (common, f"model={model}"))
        for model, title in _BASELINES.items()
    }
    for suffix, rate in dropouts.items():
        name = f"{dataset}-tron-cosine{suffix}"
        title = f"TRON, cosine, dropout {rate}"
        settings = (common, *_COSINE, f"dropout_rate={rate}", *changes)
        found[name] = Experiment(dataset, title, config, settings)
        found[f"{name}-knn"] = Experiment(dataset, f"{title} + session-kNN", parts=(name, knn))
    two = tuple(f"{dataset}-tron-cosine{suffix}" for suffix in dropouts)
    title = "TRON, cosine, dropout 0.2 and 0.4"
    found[f"{dataset}-tron-cosine-two"] = Experiment(dataset, title, parts=two)
    found[f"{dataset}-tron-cosine-two-knn"] = Experiment(
        dataset, f"{title}, + session-kNN", parts=(*two, knn)
    )
    return found


def _classics(dataset: str, config: str) -> dict[str, Experiment]:
    """Return the other networks, in their packaged configurations where there is one.

    Those that learn more slowly than TRON have more epochs, which patience ends.
    """
    common, longer = f"dataset_name={dataset}", "max_epochs=30"
    ce = (common, *_CE, "lr=1e-3", longer)
    return {
        # Half the learning rate of TRON's paper, as in benchmarks/field.py.
        f"{dataset}-gru4rec": Experiment(
            dataset, "GRU4Rec+, BPR-max", f"{config}_gru4rec", (common, "lr=0.1", "max_epochs=10")
        ),
        f"{dataset}-bert4rec": Experiment(
            dataset, "BERT4Rec, cross-entropy", f"{config}_bert4rec", (common, longer)
        ),
        f"{dataset}-recbole": Experiment(
            dataset, "SASRec as RecBole has it", f"{config}_recbole", (common, longer)
        ),
        f"{dataset}-gsasrec": Experiment(
            dataset, "gSASRec, gBCE, 16 negatives", f"{config}_gsasrec", (common, longer)
        ),
        f"{dataset}-sasrec-ce": Experiment(
            dataset, "SASRec, cross-entropy", config, (*ce, "score=dot")
        ),
        f"{dataset}-sasrec-ce-cosine": Experiment(
            dataset, "SASRec, cross-entropy, cosine", config, (*ce, *_COSINE)
        ),
    }


def _beauty(dataset: str) -> dict[str, Experiment]:
    common = f"dataset_name={dataset}"
    tron = (common, "sequence_length=50", "dropout_rate=0.5", "train_batch_size=128")
    bsarec, knn = "config_beauty_bsarec", f"{dataset}-session_knn"
    networks = {
        "bsarec": ("BSARec", bsarec, (common,)),
        "bsarec-cosine": ("BSARec, cosine", bsarec, (common, *_COSINE)),
        # The other settings of RecBole's SASRec are BSARec's too.
        "recbole": (
            "SASRec as RecBole has it", bsarec,
            (common, "block=post-norm", "num_heads=2", "positions=start", "training_windows=last",
             "lr=1e-3"),
        ),
        # As published for Beauty 5-core: one wide layer.
        "esasrec": (
            "eSASRec, 256 negatives", "config_ml1m",
            (common, "block=ligr", "activation=swiglu", "embedding_dim=256",
             "feed_forward_dim=1024", "num_blocks=1", "positions=end", "sequence_length=50",
             "num_uniform_negatives=256", "sampling_style=eventwise", "train_batch_size=128",
             "max_epochs=200"),
        ),
        "tron": ("TRON", "config_ml1m", tron),
        "tron-cosine": ("TRON, cosine", "config_ml1m", (*tron, *_COSINE)),
        "sasrec-ce-cosine": (
            "SASRec, cross-entropy, cosine", "config_ml1m",
            (*tron, "loss=ce", "num_uniform_negatives=0", *_COSINE),
        ),
        "session_knn": (_BASELINES["session_knn"], bsarec, (common, "model=session_knn")),
    }  # fmt: skip
    joined = {
        "bsarec-knn": ("BSARec + session-kNN", ("bsarec",)),
        "tron-cosine-knn": ("TRON, cosine + session-kNN", ("tron-cosine",)),
        "bsarec-two-knn": ("BSARec, dot and cosine, + session-kNN", ("bsarec", "bsarec-cosine")),
    }
    return {
        **{f"{dataset}-{name}": Experiment(dataset, *given) for name, given in networks.items()},
        **{
            f"{dataset}-{name}": Experiment(
                dataset, title, parts=(*(f"{dataset}-{part}" for part in parts), knn)
            )
            for name, (title, parts) in joined.items()
        },
    }


# SASRec's own block with cross-entropy, as in arXiv 2309.07602.
_SASREC = (
    "dataset_name=ml1m_all", "model=gsasrec", "train_batch_size=128", "positions=end",
    "initialization=normal", "reuse_item_embeddings=true", "num_heads=1",
)  # fmt: skip
_SASREC_CE = (*_SASREC, "loss=ce", "num_uniform_negatives=0")
# What validation chose for it, beside random windows of long histories.
_LONGER = (
    "early_stopping_patience=15", "dropout_rate=0.2", "lr=0.002", "lr_schedule=cosine",
    "training_windows=random", "ema_decay=0.999", "weight_decay=0.01", "precision=bf16",
)  # fmt: skip

EXPERIMENTS = {
    # A week of sessions overfits at TRON's dropout: 0.4 is better than 0.05 on validation, for
    # SASRec too.
    **_session_experiments("yoochoose_100k", "yoochoose", "0.4", "dropout_rate=0.4"),
    **_session_experiments("yoochoose1_64", "yoochoose", "0.05"),
    **_with_knn(
        "yoochoose1_64", "config_yoochoose",
        {"-dropout=0.2": "0.2", "-dropout=0.4": "0.4"},
        "max_epochs=10",
    ),
    **_classics("yoochoose1_64", "config_yoochoose"),
    # Diginetica has too many items for it.
    "yoochoose1_64-ease": Experiment(
        "yoochoose1_64", "EASE", "config_yoochoose",
        ("dataset_name=yoochoose1_64", "model=ease"),
    ),
    **_session_experiments("diginetica", "diginetica", "0.2"),
    **_with_knn("diginetica", "config_diginetica", {"": "0.2", "-dropout": "0.4"}),
    **_classics("diginetica", "config_diginetica"),
    "ml1m-tron-end": Experiment("ml1m", "TRON, positions=end", "config_ml1m", ("positions=end",)),
    "ml1m-tron-start": Experiment(
        "ml1m", "TRON, positions=start", "config_ml1m", ("positions=start",)
    ),
    "ml1m-sasrec": Experiment("ml1m", "SASRec, BCE, 1 negative", "config_ml1m_sasrec"),
    # tron prepare ml1m --val-users all --name ml1m_all
    "ml1m_all-sasrec-ce": Experiment(
        "ml1m_all", "SASRec, cross-entropy", "config_ml1m",
        (*_SASREC_CE, "dropout_rate=0.1", "key_padding_mask=false", "max_epochs=100",
         "early_stopping_patience=8"),
    ),
    "ml1m_all-sasrec-ce-long": Experiment(
        "ml1m_all", "SASRec, cross-entropy, long training", "config_ml1m",
        (*_SASREC_CE, *_LONGER, "key_padding_mask=false", "max_epochs=120"),
    ),
    "ml1m_all-sasrec-ce-relative": Experiment(
        "ml1m_all", "SASRec, cross-entropy, relative positions", "config_ml1m",
        (*_SASREC_CE, *_LONGER, "relative_positions=true", "max_epochs=80"),
    ),
    "ml1m_all-sasrec-ce-two": Experiment(
        "ml1m_all", "SASRec, long training and relative positions, joined",
        parts=("ml1m_all-sasrec-ce-long", "ml1m_all-sasrec-ce-relative"),
    ),
    # The setting of arXiv 2309.07602, which compares it with cross-entropy.
    "ml1m_all-sasrec-bce": Experiment(
        "ml1m_all", "SASRec, BCE, 1 negative", "config_ml1m",
        (*_SASREC, "loss=bce", "num_uniform_negatives=1", "sampling_style=eventwise",
         "reject_uniform_session_items=true", "dropout_rate=0.1", "key_padding_mask=false",
         "max_epochs=300", "early_stopping_patience=20"),
    ),
    "ml1m_all-gsasrec": Experiment(
        "ml1m_all", "gSASRec, gBCE, 256 negatives", "config_ml1m_gsasrec",
        ("dataset_name=ml1m_all",),
    ),
    # The published run has 86,064 steps.
    "ml1m_all-gsasrec-short": Experiment(
        "ml1m_all", "gSASRec, gBCE, 256 negatives, 25,000 steps", "config_ml1m_gsasrec",
        ("dataset_name=ml1m_all", "max_epochs=250", "lr_schedule=cosine"),
    ),
    "ml1m_all-bert4rec": Experiment(
        "ml1m_all", "BERT4Rec, cross-entropy", "config_ml1m_bert4rec", ("dataset_name=ml1m_all",)
    ),
    # RecTools' defaults, with which its figures were published.
    "ml1m_all-bert4rec-rectools": Experiment(
        "ml1m_all", "BERT4Rec as RecTools has it", "config_ml1m_bert4rec",
        ("dataset_name=ml1m_all", "block=pre-norm", "initialization=default",
         "mask_probability=0.15", "sequence_length=100", "embedding_dim=256",
         "feed_forward_dim=1024", "num_heads=4", "dropout_rate=0.2"),
    ),
    # tron prepare sequences, as config_beauty_bsarec says; of BERT4Rec's file with
    # --lines user-item --name beauty_bert4rec
    **_beauty("beauty"),
    **_beauty("beauty_bert4rec"),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """An experiment with one seed: the model that validation chose, or its final model."""

    name: str
    seed: int = SEED
    final: bool = False

    @property
    def label(self) -> str:
        """Name of its run's folder and of its result file."""
        seed = "" if self.seed == SEED else f"-seed={self.seed}"
        return f"{self.name}{'-final' * self.final}{seed}"

    @property
    def experiment(self) -> Experiment:
        return EXPERIMENTS[self.name]

    @property
    def validated(self) -> Variant:
        return replace(self, final=False)

    @property
    def settings(self) -> list[str]:
        seed = [] if self.seed == SEED else [f"seed={self.seed}"]
        return ["--config", self.experiment.config, *self.experiment.overrides, *seed]

    @property
    def sources(self) -> list[Variant]:
        """Models whose checkpoints it is made of; a baseline has no seed."""
        if not self.experiment.parts:
            return [self.validated] * self.final
        found = []
        for part in self.experiment.parts:
            name, _, seed = part.partition("-seed=")
            is_baseline = any(f"model={each}" in EXPERIMENTS[name].overrides for each in BASELINES)
            found.append(Variant(name, SEED if is_baseline else int(seed or self.seed), self.final))
        return found
