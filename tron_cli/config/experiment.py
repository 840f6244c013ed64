"""Settings of an experiment: one frozen, typed, validated dataclass.

Names are gSASRec's where it has one and TRON's for the rest. Each setting is declared once, at its
field; errors, `tron config show --explain` and docs/configuration.md come from the declarations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tron_cli.config.plugins import GROUPS, label, registered_name
from tron_cli.config.setting import Setting, setting, settings_of_class
from tron_cli.data.dataset import DATASET_NAME
from tron_cli.errors import InputError
from tron_cli.registry import BASELINES, CATALOGUE_LOSSES, MODELS, OPTIMIZERS, REGISTERED


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Settings that decide what is trained and how; the defaults are TRON's, for sessions."""

    # fmt: off
    # Short keywords share lines: the range in one, the names in other tools in the next.
    dataset_name: str = setting(
        section="Dataset",
        help="folder of the prepared dataset in --data-dir",
        tron="dataset", gsasrec="dataset_name", recbole="dataset",
    )

    model: str = setting(
        "sasrec",
        section="Model",
        help="network (sasrec is TRON's backbone), baseline, or a class of your own as "
        "mine.py:Name",
        choices=REGISTERED["model"],
        tron="model", recbole="model", rectools="SASRecModel",
    )
    sequence_length: int = setting(
        50,
        help="the model sees this many of a session's last events",
        unit="events", low=1,
        tron="max_session_length", gsasrec="sequence_length", recbole="MAX_ITEM_LIST_LENGTH",
        rectools="session_max_len",
    )
    embedding_dim: int = setting(
        200,
        help="width of embeddings and hidden states",
        low=1,
        tron="hidden_size", gsasrec="embedding_dim", recbole="hidden_size", rectools="n_factors",
    )
    num_heads: int = setting(
        1,
        help="attention heads; must divide embedding_dim",
        low=1,
        gsasrec="num_heads", recbole="n_heads", rectools="n_heads",
    )
    num_blocks: int = setting(
        2,
        help="layers of the network",
        low=1,
        tron="num_layers", gsasrec="num_blocks", recbole="n_layers", rectools="n_blocks",
    )
    dropout_rate: float = setting(
        0.05,
        help="dropout probability",
        low=0, below=1,
        tron="dropout", gsasrec="dropout_rate", recbole="hidden_dropout_prob",
        rectools="dropout_rate",
    )
    positions: str = setting(
        "end",
        help="transformers: count positions from the end of the window, as TRON and SASRec do "
        "(end), or from its oldest event (start), or use no position embeddings (none)",
        choices=("end", "start", "none"),
        rectools="use_pos_emb",
    )
    relative_positions: bool = setting(
        False,
        help="learn a bias of the attention scores for each layer, head and distance between two "
        "events, as in T5 and HSTU, beside the embeddings of positions",
    )
    key_padding_mask: bool = setting(
        True,
        help="False lets events attend to the padding in front of a short history, "
        "RecTools' default for SASRec",
        rectools="use_key_padding_mask",
    )
    block: str = setting(
        "pre-norm",
        help="TRON's layers on scaled embeddings (pre-norm), these with gated "
        "residuals (ligr), RecBole's layers (post-norm), or these with a filter beside attention "
        "(bsarec)",
        choices=("pre-norm", "post-norm", "ligr", "bsarec"),
    )
    filter_weight: float = setting(
        0.7,
        help="block=bsarec: weight of the filter (alpha), beside 1 - filter_weight of attention",
        low=0, high=1,
    )
    low_frequencies: int = setting(
        5,
        help="block=bsarec: how many of the sequence_length frequencies of a window, from 0 "
        "upwards, the filter passes unchanged (c); odd, since all but 0 are pairs",
        low=1,
    )
    feed_forward_dim: int = setting(
        0,
        help="inner width of the feed-forward networks; 0: embedding_dim",
        low=0,
        recbole="inner_size",
    )
    activation: str = setting(
        "relu",
        help="activation of the feed-forward networks",
        choices=("relu", "gelu", "swiglu"),
        recbole="hidden_act",
    )
    attention_dropout_rate: float | None = setting(
        None,
        help="dropout probability of the attention weights; None: dropout_rate",
        low=0, below=1,
        recbole="attn_dropout_prob",
    )
    initialization: str = setting(
        "default",
        help="as in the original (default), or N(0, 0.02) for all matrices and "
        "tables, as in RecBole (normal)",
        choices=("default", "normal"),
        recbole="initializer_range",
    )
    reuse_item_embeddings: bool | None = setting(
        None,
        help="score with the input embeddings rather than a separate table; None: as the model is "
        "published, which is a separate table for gsasrec only",
        tron="share_embeddings", gsasrec="reuse_item_embeddings",
    )
    output_bias: bool = setting(
        False, help="learn a bias for each item, added to its score", tron="output_bias"
    )
    score: str = setting(
        "dot",
        help="score an item by the product of its embedding and the hidden state (dot), or of both "
        "scaled to a length of one, times score_scale (cosine), as in NISER",
        choices=("dot", "cosine"),
        rectools="distance",
    )
    score_scale: float = setting(
        14.0,
        help="factor of the scores with score=cosine; 12 to 16 in NISER",
        above=0,
    )
    learn_score_scale: bool = setting(
        False, help="learn this factor, which begins as score_scale"
    )
    normalize_inputs: bool = setting(
        False,
        help="scale the embeddings of the inputs to a length of one, as NISER does too",
    )
    prediction_head: bool = setting(
        False,
        help="a linear layer, GELU and LayerNorm between the transformer and the scores, "
        "as in the original, which has output_bias as well",
    )
    mask_probability: float = setting(
        0.15,
        help="share of the events that a training step hides",
        above=0, high=1,
        recbole="mask_ratio", rectools="mask_prob",
    )
    session_parallel: bool = setting(
        False,
        help="a step is one event of each of train_batch_size sessions, whose states are "
        "carried from step to step, as in the original",
    )

    knn_neighbors: int = setting(
        200,
        section="Baselines",
        help="number of most similar sessions, whose items are scored",
        unit="sessions", low=1,
    )
    knn_sample_size: int = setting(
        2500,
        help="number of latest sessions that share an item with the history; the most similar "
        "are chosen among these",
        unit="sessions", low=1, high=1_000_000,
    )
    ease_l2: float = setting(
        100.0,
        help="weight of the L2 penalty",
        above=0,
        recbole="reg_weight", rectools="regularization",
    )

    loss: str = setting(
        "ssm",
        section="Loss and negatives",
        help="training loss, or a function of your own as mine.py:name",
        choices=REGISTERED["loss"],
        tron="loss", recbole="loss_type", rectools="loss",
    )
    gbce_t: float = setting(
        0.75,
        help="gbce: how much of the overconfidence of sampling to undo; 0: none, 1: all",
        low=0, high=1,
        gsasrec="gbce_t",
    )
    bpr_penalty: float = setting(
        0.0, help="bpr-max: weight of the penalty on scores", low=0, tron="bpr_penalty"
    )
    final_activation: bool = setting(
        False,
        help="apply ELU (alpha 0.5) to the logits that the loss sees, as in GRU4Rec+",
        tron="final_activation",
    )
    logq_correction: bool = setting(
        False, help="ssm: correct for how often each negative is drawn, which estimates ce"
    )
    label_smoothing: float = setting(
        0.0,
        help="share of the target's weight that is spread evenly over all items",
        low=0, below=1,
    )
    sce_buckets: int = setting(
        0,
        help="buckets per step; 0: twice the square root of the step's positions",
        unit="buckets", low=0,
    )
    sce_bucket_positions: int = setting(
        0,
        help="positions per bucket; 0: twice the square root of the step's positions",
        unit="positions", low=0,
    )
    sce_bucket_items: int = setting(
        256,
        help="items per bucket, with which its positions are compared",
        unit="items", low=1,
    )
    sce_mix: bool = setting(
        False,
        help="choose buckets along random mixtures of the hidden states, not along random "
        "directions",
    )
    num_uniform_negatives: int = setting(
        16384,
        help="negatives per event, session or batch (sampling_style), drawn by negative_sampler",
        unit="negatives", low=0,
        tron="num_uniform_negatives", gsasrec="negs_per_pos",
        recbole="train_neg_sample_args.sample_num", rectools="n_negatives",
    )
    negative_sampler: str = setting(
        "uniform",
        help="distribution of these negatives; mixed: a share of them by popularity; or a function "
        "of your own as mine.py:name",
        choices=REGISTERED["negative_sampler"],
        recbole="train_neg_sample_args.distribution",
    )
    popularity_alpha: float = setting(
        0.75,
        help="exponent of an item's training occurrences",
        low=0,
        recbole="train_neg_sample_args.alpha",
    )
    mixed_share: float = setting(
        0.5, help="share of the draws by popularity", low=0, high=1
    )
    num_batch_negatives: int = setting(
        127,
        help="further negatives per session, drawn from the other sessions of the batch",
        unit="negatives", low=0,
        tron="num_batch_negatives",
    )
    sampling_style: str = setting(
        "batchwise",
        help="draw one set of uniform negatives per event, per session or per batch",
        choices=("eventwise", "sessionwise", "batchwise"),
        tron="sampling_style",
    )
    reject_uniform_session_items: bool = setting(
        False,
        help="eventwise, sessionwise: never draw inputs of the same session as uniform negatives",
        tron="reject_uniform_session_items",
    )
    reject_in_batch_items: bool = setting(
        True,
        help="draw in-batch negatives from other sessions only; batchwise, without "
        "session_parallel: never draw inputs of the batch as uniform negatives",
        tron="reject_in_batch_items",
    )
    topk_sampling: bool = setting(
        True, help="train on the highest-scored negatives only", tron="topk_sampling"
    )
    topk_sampling_k: int = setting(
        100,
        help="negatives that topk_sampling keeps",
        unit="negatives", low=1,
        tron="topk_sampling_k",
    )
    mask_collisions: bool = setting(
        True, help="a position's own target is never its negative (TRON: False)"
    )

    training_windows: str = setting(
        "last",
        section="Training windows",
        help="rows of training: the last sequence_length + 1 events of each session (last), as "
        "many at a place drawn anew each time (random), windows that cover the session (all), or "
        "each event but the first as the only target after up to sequence_length events "
        "(prefixes)",
        choices=("last", "random", "all", "prefixes"),
    )
    window_stride: int = setting(
        0,
        help="training_windows=all: events from the end of a window to the end of the next; 0: "
        "sequence_length, with which each event is a target once",
        unit="events", low=0,
    )

    train_batch_size: int = setting(
        128,
        section="Optimization",
        help="sessions per batch, or windows of them (training_windows)",
        unit="sessions", low=1,
        tron="batch_size", gsasrec="train_batch_size", recbole="train_batch_size",
        rectools="batch_size",
    )
    accumulate_batches: int = setting(
        1,
        help="batches per step, which follows the gradient of the mean loss over all of them",
        unit="batches", low=1,
    )
    max_epochs: int = setting(
        10,
        help="maximum number of epochs",
        unit="epochs", low=1,
        tron="max_epochs", gsasrec="max_epochs", recbole="epochs", rectools="epochs",
    )
    max_batches_per_epoch: int = setting(
        0,
        help="maximum number of steps per epoch, that is, between validations; the next epoch "
        "continues where this one ended; 0: all sessions",
        unit="steps", low=0,
        gsasrec="max_batches_per_epoch",
    )
    optimizer: str = setting(
        "auto",
        help="row_adam gives adam's weights at the cost of the rows that a step uses, for large "
        "tables; auto: the faster of the two, which the log names",
        choices=REGISTERED["optimizer"],
        tron="optimizer", recbole="learner",
    )
    lr: float = setting(
        5e-4,
        help="peak learning rate",
        above=0,
        tron="lr", recbole="learning_rate", rectools="lr",
    )
    lr_schedule: str = setting(
        "constant",
        help="learning rate after the warm-up: constant, or a cosine to 0",
        choices=("constant", "cosine"),
    )
    warmup_steps: int = setting(
        0, help="linear warm-up of the learning rate", unit="steps", low=0
    )
    weight_decay: float = setting(
        0.0,
        help="decoupled weight decay (AdamW): each step multiplies matrices and embeddings, but "
        "not biases and norms, with 1 - lr * weight_decay",
        low=0,
    )
    clip_norm: float = setting(
        0.0,
        help="maximum norm of the gradient; 0: no clipping",
        low=0,
        recbole="clip_grad_norm",
    )
    ema_decay: float = setting(
        0.0,
        help="evaluate and keep an average of the weights: after each step, ema_decay times the "
        "average so far plus 1 - ema_decay times the weights; 0: no average",
        low=0, below=1,
    )
    shuffling_style: str = setting(
        "shuffle_without_replacement",
        help="order of the training sessions",
        choices=("no_shuffling", "shuffle_without_replacement", "shuffle_with_replacement"),
        tron="shuffling_style", recbole="shuffle",
    )
    recency_half_life_days: float = setting(
        0.0,
        help="draw a session whose last event is this much older than the latest one half as "
        "often; 0: all as often",
        unit="days", low=0,
    )
    recency_half_life_sessions: int = setting(
        0,
        help="the same by order, for training sessions without times: draw a session with this "
        "many after it half as often; 0: all as often",
        unit="sessions", low=0,
    )
    overfit_batches: int = setting(
        0,
        help="train and validate on the first batches only; 0: off",
        unit="batches", low=0,
        tron="overfit_batches",
    )
    precision: str = setting(
        "auto",
        help="training arithmetic; auto: float32 on CPU, on CUDA bf16 where supported, else fp16",
        choices=("auto", "float32", "bf16", "fp16"),
        recbole="enable_amp",
    )
    cuda_graphs: bool = setting(
        True,
        help="on CUDA, without fp16: record the step of each batch size once, then replay it",
    )
    table_sharding: str = setting(
        "none",
        help="under torchrun: each process holds the whole item tables (none), or an equal part of "
        "their rows and of the optimizer's state of these (rows)",
        choices=("none", "rows"),
    )
    seed: int = setting(42, help="seed of all random numbers", low=0, recbole="seed")

    metrics: tuple[str, ...] = setting(
        ("R@5", "R@10", "R@20", "RR@5", "RR@10", "RR@20", "nDCG@10", "nDCG@20"),
        section="Evaluation",
        help="measures to report, named as in ir-measures, each with a cutoff",
        gsasrec="metrics", recbole="metrics, topk",
    )
    val_metric: str = setting(
        "R@20",
        help="measure that chooses the best checkpoint",
        gsasrec="val_metric", recbole="valid_metric",
    )
    early_stopping_patience: int = setting(
        0,
        help="stop training after this many epochs without a better val_metric; 0: never",
        unit="epochs", low=0,
        gsasrec="early_stopping_patience", recbole="stopping_step",
    )
    limit_val_batches: float = setting(
        1.0,
        help="validation sessions to use, evenly spaced over the split: a share up to 1.0, above "
        "it a number of batches of train_batch_size sessions",
        above=0,
        tron="limit_val_batches",
    )
    eval_batch_size: int = setting(
        512,
        help="histories per forward pass in evaluation",
        unit="histories", low=1,
        gsasrec="eval_batch_size", recbole="eval_batch_size", rectools="recommend_batch_size",
    )
    filter_rated: bool = setting(
        False,
        help="never recommend items of the history",
        gsasrec="filter_rated", recbole="not repeatable", rectools="filter_viewed",
    )
    recommendation_limit: int = setting(
        20,
        help="items per prediction in a run file",
        unit="items", low=1,
        gsasrec="recommendation_limit", rectools="k",
    )

    save_minutes: float = setting(
        10.0,
        section="Saving",
        help="time between writes of last.pt within an epoch; 0: no writes by time",
        unit="minutes", low=0,
    )
    save_every: int = setting(
        0,
        help="steps between writes of last.pt within an epoch; 0: no writes by step",
        unit="steps", low=0,
    )

    # fmt: on

    def __post_init__(self) -> None:
        # Lists and ir-measures objects (as gSASRec's configs have them) become tuples of names.
        if isinstance(self.metrics, list | tuple):
            object.__setattr__(self, "metrics", tuple(str(name) for name in self.metrics))
        object.__setattr__(self, "val_metric", str(self.val_metric))
        for name, declared in FIELDS.items():
            value = declared.typed(getattr(self, name))
            if name in GROUPS:
                value = registered_name(name, value, FIELDS)
            object.__setattr__(self, name, value)
            declared.check(value)
        self._check_together()

    def _check_together(self) -> None:
        if not re.fullmatch(DATASET_NAME, self.dataset_name):
            raise InputError(
                f"dataset_name must be the name of a folder in --data-dir (letters, digits, _ . + "
                f"and -), got {self.dataset_name!r}"
            )
        if not self.metrics:
            raise InputError("metrics must name at least one measure, such as R@20")
        self._check_effects()
        if not self.is_baseline:
            self._check_model()
            self._check_optimizer()
            self._check_windows()
            self._check_loss()
        for measure in (*self.metrics, self.val_metric):
            if not re.fullmatch(r"[A-Za-z_]+(\(.*\))?@[1-9][0-9]*", measure):
                raise InputError(
                    f"metrics and val_metric need a measure with a cutoff such as nDCG@10, "
                    f"not {measure!r}"
                )

    def _check_effects(self) -> None:
        """Refuse what is set without an effect; what only networks have may stand by a baseline."""
        for key, entries in REGISTERED.items():
            choice = getattr(self, key)
            without_effect = {name for entry in entries.values() for name in entry.owns}
            without_effect -= set(entries[choice].owns)
            for name in (name for name in FIELDS if name in without_effect):
                value, default = getattr(self, name), FIELDS[name].default
                owners = [other for other, entry in entries.items() if name in entry.owns]
                if value == default or (self.is_baseline and BASELINES.keys().isdisjoint(owners)):
                    continue
                raise InputError(
                    f"{name}={value} is a setting of {key}={' or '.join(owners)} and has no effect "
                    f"on {key}={choice}; leave it out, or add {name}={default}"
                )

    def _check_model(self) -> None:
        """Refuse settings of the network that make no sense together."""
        if self.embedding_dim % self.num_heads:
            raise InputError(
                f"embedding_dim={self.embedding_dim} is not a multiple of "
                f"num_heads={self.num_heads}; change one of them"
            )
        if self.score == "dot":
            self._need(
                "score=dot has no scale, unlike score=cosine",
                {name: FIELDS[name].default for name in ("score_scale", "learn_score_scale")},
            )
        if self.relative_positions:
            self._need(
                "relative_positions=True has no distance to the padding in front of a history",
                {"key_padding_mask": True},
            )
        self._check_filter()
        if self.session_parallel and self.sampling_style != "batchwise":
            self._need(
                "session_parallel=True shows one event of a session a step, so that its others "
                "cannot be rejected",
                {"reject_uniform_session_items": False},
            )

    def _check_filter(self) -> None:
        """Refuse settings of BSARec's filter without it, and what does not go with it."""
        if self.block != "bsarec":
            self._need(
                f"block={self.block} has no filter",
                {name: FIELDS[name].default for name in ("filter_weight", "low_frequencies")},
            )
            return
        self._need(
            "block=bsarec sees all of a row, so that only the event after it can be predicted",
            {"model": "sasrec", "training_windows": "prefixes"},
        )
        if self.low_frequencies % 2 == 0 or self.low_frequencies > self.sequence_length:
            raise InputError(
                f"low_frequencies={self.low_frequencies} must be odd and at most sequence_length="
                f"{self.sequence_length}: the frequency 0, and pairs of others; change it"
            )

    def _check_optimizer(self) -> None:
        """Refuse settings of the optimizer that make no sense together."""
        if self.lr * self.weight_decay >= 0.1:
            raise InputError(
                f"lr={self.lr:g} and weight_decay={self.weight_decay:g} would take a tenth or more "
                "off the weights in each step (lr * weight_decay); lower one of them"
            )
        if not OPTIMIZERS[self.optimizer].sparse_gradients:
            return
        if self.weight_decay and self.output_bias:
            self._need(
                "weight_decay spares the biases of output_bias=True, but sparse optimizers would "
                "decay them with the rows of their items",
                {"optimizer": "adam"},
            )
        if self.ema_decay:
            self._need(
                "ema_decay averages all rows of a table in each step, and sparse optimizers update "
                "only those looked up",
                {"optimizer": "adam"},
            )

    def _check_windows(self) -> None:
        """Refuse windows that make no sense with each other or with the model."""
        kind = self.training_windows
        if self.window_stride and kind != "all":
            raise InputError(
                f"window_stride={self.window_stride} is a setting of training_windows=all and has "
                f"no effect on training_windows={kind}; leave it out, or add training_windows=all"
            )
        if self.window_stride > self.sequence_length:
            raise InputError(
                f"window_stride={self.window_stride} exceeds sequence_length="
                f"{self.sequence_length}, so that events between the windows would never be "
                "targets; lower it"
            )
        if self.session_parallel:
            self._need(
                "session_parallel=True goes through sessions event by event",
                {"training_windows": "last"},
            )
        if self.recency_half_life_days and self.recency_half_life_sessions:
            raise InputError(
                "recency_half_life_days and recency_half_life_sessions are two measures of one "
                "age; leave one of them out"
            )
        if self.has_recency:
            self._need(
                "recency_half_life_days and recency_half_life_sessions draw sessions with "
                "replacement",
                {"shuffling_style": "shuffle_with_replacement"},
            )
        if kind == "prefixes" and MODELS[self.model].masks_inputs:
            raise InputError(
                f"training_windows=prefixes predicts the last event of a row alone, but model="
                f"{self.model} hides events anywhere; use training_windows=all or random"
            )

    def _check_loss(self) -> None:
        """Refuse a loss and negatives that make no sense together."""
        negatives = self.num_uniform_negatives + self.num_batch_negatives
        if self.loss in CATALOGUE_LOSSES:
            self._need(
                f"loss={self.loss} compares with the whole catalogue and draws no negatives",
                {
                    "num_uniform_negatives": 0,
                    "num_batch_negatives": 0,
                    "topk_sampling": False,
                    "final_activation": False,
                    "logq_correction": False,
                },
            )
            return
        if negatives == 0:
            raise InputError(
                "num_uniform_negatives=0 and num_batch_negatives=0 leave no negatives; "
                f"loss={self.loss} needs at least one"
            )
        if self.topk_sampling and self.topk_sampling_k > negatives:
            raise InputError(
                f"topk_sampling_k={self.topk_sampling_k} exceeds the {negatives} negatives "
                "(num_uniform_negatives + num_batch_negatives); lower it"
            )
        all_as_drawn: dict[str, Any] = {"topk_sampling": False, "final_activation": False}
        if self.num_uniform_negatives:
            batchwise = self.sampling_style == "batchwise"
            rejects = "reject_in_batch_items" if batchwise else "reject_uniform_session_items"
            all_as_drawn[rejects] = False
        if self.loss == "gbce":
            # Its beta holds for negatives drawn uniformly from all items, and all used.
            self._need(
                "loss=gbce needs plain uniform negatives",
                {**all_as_drawn, "num_batch_negatives": 0, "negative_sampler": "uniform"},
            )
        if self.logq_correction:
            if self.loss != "ssm":
                raise InputError(
                    f"logq_correction=True corrects loss=ssm, not loss={self.loss}; set it to False"
                )
            # How many of an item to expect is known only where nothing is rejected or chosen. A
            # target among the negatives would be in the sum twice.
            self._need(
                "logq_correction needs all negatives as they were drawn, but for the target",
                {**all_as_drawn, "mask_collisions": True},
            )
            if self.training_windows == "random" or self.has_recency:
                self._need(
                    "logq_correction cannot expect in-batch negatives of windows drawn at random "
                    "or by recency",
                    {"num_batch_negatives": 0},
                )
            if MODELS[self.model].masks_inputs:
                self._need(
                    f"logq_correction cannot expect in-batch negatives that model={self.model} "
                    "masks at random",
                    {"num_batch_negatives": 0},
                )

    def _need(self, reason: str, values: dict[str, Any]) -> None:
        """Raise an InputError that names the settings of other values, and what to add."""
        wrong = [name for name, value in values.items() if getattr(self, name) != value]
        if wrong:
            raise InputError(
                f"{reason}, but got {', '.join(f'{name}={getattr(self, name)}' for name in wrong)};"
                f" add {' '.join(f'{name}={values[name]}' for name in wrong)}"
            )

    @property
    def is_baseline(self) -> bool:
        """True if the model is fitted at once, without gradients."""
        return self.model in BASELINES

    @property
    def has_recency(self) -> bool:
        """True if later sessions are drawn more often."""
        return bool(self.recency_half_life_days or self.recency_half_life_sessions)

    @property
    def shares_table(self) -> bool:
        """True if inputs and scores have one table: reuse_item_embeddings, resolved."""
        if self.reuse_item_embeddings is None:
            return REGISTERED["model"][self.model].shares_table
        return self.reuse_item_embeddings

    @property
    def method(self) -> str:
        """Name of what is trained: tron for SASRec with a listwise loss on shared negatives.

        bsarec is SASRec with BSARec's block. It may be part of a file's name.
        """
        if self.block == "bsarec":
            return "bsarec"
        is_tron = (self.model, self.loss, self.sampling_style) == ("sasrec", "ssm", "batchwise")
        return "tron" if is_tron else label(self.model)


FIELDS: dict[str, Setting] = settings_of_class(ExperimentConfig)
