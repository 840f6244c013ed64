"""One frozen, typed, validated configuration; where it comes from and how it is overridden.

Defaults < a Python file that exposes `config = ExperimentConfig(...)` < key=value words on the
command line. Names are gSASRec's where it has one and TRON's for the rest.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tron_cli.config import peers
from tron_cli.data.dataset import DATASET_NAME
from tron_cli.errors import InputError, described, place_of
from tron_cli.plugins import GROUPS, check_named, label, registered_name
from tron_cli.registry import (
    BASELINES,
    CATALOGUE_LOSSES,
    LOSSES,
    MODELS,
    OPTIMIZERS,
    REGISTERED,
    SAMPLERS,
)

CONFIGS_DIR = Path(__file__).parents[1] / "configs"

log = logging.getLogger("tron")


def _setting(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A field with its meaning, unit and range; low and high belong to it, above and below not."""
    metadata = {
        "doc": doc,
        "low": low,
        "high": high,
        "above": above,
        "below": below,
        "choices": choices,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything that decides what is trained; defaults are TRON's setting for sessions."""

    dataset_name: str = dataclasses.field(
        metadata={"doc": "folder of the prepared dataset in --data-dir"}
    )

    # Model
    model: str = _setting(
        "sasrec",
        "network, of which sasrec is TRON's backbone; or a baseline; or a class of your own as "
        "mine.py:Name",
        choices=(*MODELS, *BASELINES),
    )
    sequence_length: int = _setting(50, "last events of a session that the model sees", low=1)
    embedding_dim: int = _setting(200, "width of embeddings and hidden states", low=1)
    num_heads: int = _setting(1, "attention heads; divides embedding_dim", low=1)
    num_blocks: int = _setting(2, "transformer layers", low=1)
    dropout_rate: float = _setting(0.05, "dropout probability", low=0, below=1)
    positions: str = _setting(
        "end",
        "what position 0 means: the oldest event of the window (start), or places counted from "
        "the end of the window as TRON and SASRec do (end); none: no position embeddings",
        choices=("end", "start", "none"),
    )
    key_padding_mask: bool = _setting(
        True,
        "transformers: False lets events attend to the padding in front of a short history, as "
        "SASRec does in RecTools",
    )
    block: str = _setting(
        "pre-norm",
        "sasrec, bert4rec: TRON's layers on scaled embeddings (pre-norm), these with gated "
        "residuals (ligr), or RecBole's (post-norm)",
        choices=("pre-norm", "post-norm", "ligr"),
    )
    feed_forward_dim: int = _setting(
        0, "sasrec, bert4rec: inner width of the feed-forward networks; 0: embedding_dim", low=0
    )
    activation: str = _setting(
        "relu", "sasrec, bert4rec: of the feed-forward networks", choices=("relu", "gelu", "swiglu")
    )
    attention_dropout_rate: float | None = _setting(
        None,
        "sasrec, bert4rec: dropout of the attention weights; None: dropout_rate",
        low=0,
        below=1,
    )
    initialization: str = _setting(
        "default",
        "transformers: that of the original (default), or N(0, 0.02) for all matrices and tables "
        "as in RecBole (normal)",
        choices=("default", "normal"),
    )
    reuse_item_embeddings: bool | None = _setting(
        None,
        "score with the input embeddings instead of a table of their own; None: the model's own "
        "way, which is a separate table for gsasrec only",
    )
    output_bias: bool = _setting(False, "one learned bias an item, added to its score")
    prediction_head: bool = _setting(
        False,
        "bert4rec: a linear layer, GELU and LayerNorm between the transformer and the scores, as "
        "in the original, which has output_bias as well",
    )
    mask_probability: float = _setting(
        0.15, "bert4rec: share of the events that a training step hides", above=0, high=1
    )
    session_parallel: bool = _setting(
        False,
        "gru4rec: a step is one event of each of train_batch_size sessions, whose states are "
        "carried from step to step, as in the original",
    )

    # Baselines
    knn_neighbors: int = _setting(200, "session_knn: most similar sessions that vote", low=1)
    knn_sample_size: int = _setting(
        2500,
        "session_knn: latest sessions with an item of the history that it looks at",
        low=1,
        high=1_000_000,
    )
    ease_l2: float = _setting(100.0, "ease: weight of the penalty on its weights", above=0)

    # Loss and negatives
    loss: str = _setting("ssm", "training loss", choices=(*LOSSES, *CATALOGUE_LOSSES))
    gbce_t: float = _setting(
        0.75,
        "how far gbce undoes the overconfidence of sampling: 0 not at all, 1 fully",
        low=0,
        high=1,
    )
    bpr_penalty: float = _setting(0.0, "weight of bpr-max's score penalty", low=0)
    final_activation: bool = _setting(
        False, "ELU (alpha 0.5) on the logits that the loss sees, as in GRU4Rec+"
    )
    logq_correction: bool = _setting(
        False, "ssm: correct for how often each negative is drawn, which estimates ce"
    )
    sce_buckets: int = _setting(
        0, "sce: buckets a step; 0: twice the root of the step's positions", low=0
    )
    sce_bucket_positions: int = _setting(
        0, "sce: positions in a bucket; 0: twice the root of the step's positions", low=0
    )
    sce_bucket_items: int = _setting(
        256, "sce: items in a bucket, with which its positions are compared", low=1
    )
    sce_mix: bool = _setting(
        False, "sce: buckets lie along random mixtures of the hidden states, not at random"
    )
    num_uniform_negatives: int = _setting(
        16384, "negatives an event, session or batch, drawn as negative_sampler says", low=0
    )
    negative_sampler: str = _setting(
        "uniform",
        "distribution of these negatives; mixed: a share of them by popularity",
        choices=tuple(SAMPLERS),
    )
    popularity_alpha: float = _setting(
        0.75, "popularity, mixed: exponent of an item's training occurrences", low=0
    )
    mixed_share: float = _setting(0.5, "mixed: share drawn by popularity", low=0, high=1)
    num_batch_negatives: int = _setting(
        127, "negatives a session, drawn from the other sessions of the batch", low=0
    )
    sampling_style: str = _setting(
        "batchwise",
        "what shares one set of uniform negatives",
        choices=("eventwise", "sessionwise", "batchwise"),
    )
    reject_uniform_session_items: bool = _setting(
        False, "eventwise, sessionwise: no uniform negative is an input of the same session"
    )
    reject_in_batch_items: bool = _setting(
        True,
        "in-batch negatives come from other sessions only; batchwise, without session_parallel: "
        "and no uniform negative is an input of the batch",
    )
    topk_sampling: bool = _setting(True, "train on the highest-scored negatives only")
    topk_sampling_k: int = _setting(100, "negatives that top-k sampling keeps", low=1)
    mask_collisions: bool = _setting(
        True, "a position's own target is never its negative (TRON: False)"
    )

    # Optimization
    train_batch_size: int = _setting(128, "sessions a step", low=1)
    max_epochs: int = _setting(10, "epochs at most", low=1)
    max_batches_per_epoch: int = _setting(0, "steps an epoch at most; 0: all sessions", low=0)
    optimizer: str = _setting(
        "auto",
        "optimizer; row_adam is adam at the cost of the rows that a step touches; auto: whichever "
        "of the two is faster for the table",
        choices=tuple(OPTIMIZERS),
    )
    lr: float = _setting(5e-4, "learning rate at its highest", above=0)
    lr_schedule: str = _setting(
        "constant", "after the warm-up: constant, or cosine to 0", choices=("constant", "cosine")
    )
    warmup_steps: int = _setting(0, "steps of linear warm-up of the learning rate", low=0)
    clip_norm: float = _setting(0.0, "largest norm of the gradient; 0: not clipped", low=0)
    shuffling_style: str = _setting(
        "shuffle_without_replacement",
        "order of the training sessions",
        choices=("no_shuffling", "shuffle_without_replacement", "shuffle_with_replacement"),
    )
    overfit_batches: int = _setting(
        0, "train and validate on this many first batches only; 0: off", low=0
    )
    precision: str = _setting(
        "auto",
        "training arithmetic; auto: float32 on CPU, bf16 on CUDA where it exists, else fp16",
        choices=("auto", "float32", "bf16", "fp16"),
    )
    cuda_graphs: bool = _setting(
        True, "on CUDA, without fp16: record the step of each size of batch once, then replay it"
    )
    seed: int = _setting(42, "seed of everything random", low=0)

    # Evaluation
    metrics: tuple[str, ...] = _setting(
        ("R@5", "R@10", "R@20", "RR@5", "RR@10", "RR@20", "nDCG@10", "nDCG@20"),
        "measures to report, in ir-measures' names, each with a cutoff",
    )
    val_metric: str = _setting("R@20", "measure that chooses the best checkpoint")
    early_stopping_patience: int = _setting(
        0, "epochs without a better val_metric before training stops; 0: never", low=0
    )
    limit_val_batches: float = _setting(
        1.0,
        "validation sessions, evenly spaced over the split: a share up to 1.0, above it a number "
        "of batches of train_batch_size",
        above=0,
    )
    eval_batch_size: int = _setting(512, "histories a forward pass in evaluation", low=1)
    filter_rated: bool = _setting(False, "never recommend items of the same history")
    recommendation_limit: int = _setting(20, "items a prediction in a run file", low=1)

    # Bookkeeping
    save_minutes: float = _setting(
        10.0, "minutes between writes of last.pt within an epoch; 0: none by the clock", low=0
    )
    save_every: int = _setting(
        0, "steps between writes of last.pt within an epoch; 0: none by the count", low=0
    )

    def __post_init__(self) -> None:
        # Lists and ir-measures objects (as gSASRec's configs have them) become tuples of names.
        if isinstance(self.metrics, list | tuple):
            object.__setattr__(self, "metrics", tuple(str(name) for name in self.metrics))
        if not isinstance(self.val_metric, str):
            object.__setattr__(self, "val_metric", str(self.val_metric))
        for field in dataclasses.fields(self):
            value = _checked_type(field.name, getattr(self, field.name))
            if field.name in GROUPS:
                value = registered_name(field.name, value, FIELDS)
            object.__setattr__(self, field.name, value)
            _check_range(field, value)
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
        if self.session_parallel and self.sampling_style != "batchwise":
            self._need(
                "session_parallel=True shows one event of a session a step, so that its others "
                "cannot be rejected",
                {"reject_uniform_session_items": False},
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
    def shares_table(self) -> bool:
        """True if inputs and scores have one table: reuse_item_embeddings, resolved."""
        if self.reuse_item_embeddings is None:
            return REGISTERED["model"][self.model].shares_table
        return self.reuse_item_embeddings

    @property
    def method(self) -> str:
        """Name of what is trained: tron for SASRec with a listwise loss on shared negatives.

        It may be part of a file's name.
        """
        is_tron = (self.model, self.loss, self.sampling_style) == ("sasrec", "ssm", "batchwise")
        return "tron" if is_tron else label(self.model)


FIELDS = {field.name: field for field in dataclasses.fields(ExperimentConfig)}
_TYPES = typing.get_type_hints(ExperimentConfig)

# What people type who come from TRON, gSASRec, RecBole or RecTools.
_NAMES_ELSEWHERE = {
    "MAX_ITEM_LIST_LENGTH": "sequence_length",
    "attn_dropout_prob": "attention_dropout_rate",
    "alpha": "popularity_alpha",
    "clip_grad_norm": "clip_norm",
    "distribution": "negative_sampler",
    "enable_amp": "precision",
    "filter_viewed": "filter_rated",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout_rate",
    "initializer_range": "initialization",
    "inner_size": "feed_forward_dim",
    "k": "recommendation_limit",
    "learner": "optimizer",
    "loss_type": "loss",
    "mask_prob": "mask_probability",
    "mask_ratio": "mask_probability",
    "recommend_batch_size": "eval_batch_size",
    "reg_weight": "ease_l2",
    "regularization": "ease_l2",
    "repeatable": "filter_rated",
    "shuffle": "shuffling_style",
    "stopping_step": "early_stopping_patience",
    "topk": "metrics",
    "use_key_padding_mask": "key_padding_mask",
    "use_pos_emb": "positions",
    "train_neg_sample_args": "num_uniform_negatives",
    "valid_metric": "val_metric",
    "accelerator": "--device",
    "batch_size": "train_batch_size",
    "dataset": "dataset_name",
    "dropout": "dropout_rate",
    "epochs": "max_epochs",
    "hidden_size": "embedding_dim",
    "learning_rate": "lr",
    "max_session_length": "sequence_length",
    "n_blocks": "num_blocks",
    "n_factors": "embedding_dim",
    "n_heads": "num_heads",
    "n_layers": "num_blocks",
    "n_negatives": "num_uniform_negatives",
    "negs_per_pos": "num_uniform_negatives",
    "num_layers": "num_blocks",
    "session_max_len": "sequence_length",
    "share_embeddings": "reuse_item_embeddings",
}


def load_config(
    name: str, overrides: Sequence[str] = ()
) -> tuple[ExperimentConfig, dict[str, str]]:
    """Resolve a config file and key=value overrides.

    `name` is a path to a Python file or to one of otto-de/TRON's JSON files, or else the name of a
    packaged config (with or without `.py`). Returns the config and, for each field, where its value
    comes from. Raises InputError.
    """
    path = _find_config(name)
    changes = parse_overrides(overrides)
    if path.suffix == ".json":
        config, named = _from_tron(path, changes)
    else:
        from_file = _execute(path)
        config = dataclasses.replace(from_file, **changes)
        named = {key for key in FIELDS if getattr(from_file, key) != FIELDS[key].default}
    origins = {key: path.name if key in named else "default" for key in FIELDS}
    return config, {**origins, **dict.fromkeys(changes, "command line")}


def requested_accelerator(name: str) -> str:
    """gpu, cpu or auto: where a config is to be trained; only TRON's JSON files say so."""
    path = _find_config(name)
    return peers.tron_accelerator(path) if path.suffix == ".json" else "auto"


def GSASRecExperimentConfig(*values: Any, **named_values: Any) -> ExperimentConfig:
    """gSASRec's configuration, with its names, order and defaults: see peers.gsasrec_settings."""
    return ExperimentConfig(**peers.gsasrec_settings(*values, **named_values))


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`["lr=1e-3", "metrics=R@20,nDCG@10"]` -> {"lr": 0.001, "metrics": ("R@20", "nDCG@10")}."""
    changes: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise InputError(f"expected key=value after the options, got {word!r}")
        _check_key(key)
        if key in changes:
            raise InputError(f"{key} is given twice on the command line; keep one")
        changes[key] = _parse_value(key, text)
    return changes


def config_from_dict(values: Mapping[str, Any]) -> ExperimentConfig:
    """Return the inverse of `dataclasses.asdict`, for configs stored in checkpoints.

    Raises UnnamedCodeError where it needs code from outside that nobody has named.
    """
    check_named(values)
    for key in values:
        _check_key(key)
    return ExperimentConfig(**values)


def packaged_configs() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(path.stem for path in CONFIGS_DIR.glob("config_*.py"))


def _find_config(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    packaged = CONFIGS_DIR / f"{name.removesuffix('.py')}.py"
    if path.name == name and packaged.is_file():
        return packaged
    near = difflib.get_close_matches(name.removesuffix(".py"), packaged_configs(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"packaged are {', '.join(packaged_configs())}"
    raise InputError(f"no config {name!r}: neither a file nor a packaged config; {hint}")


def _from_tron(path: Path, changes: dict[str, Any]) -> tuple[ExperimentConfig, set[str]]:
    """The config of one of TRON's JSON files, and the settings that it decides."""
    settings, notes = peers.tron_settings(path, changes)
    try:
        config = ExperimentConfig(**{**settings, **changes})
    except InputError as error:
        raise peers.blame(path, error, changes) from error
    for note in notes:
        log.info("%s: %s", path.name, note)
    log.info("%s: what tron does otherwise, and TRON's way:", path.name)
    for difference in peers.differences_from_tron(config):
        log.info("  %s", difference)
    return config, set(settings)


def _execute(path: Path) -> ExperimentConfig:
    scope: dict[str, Any] = {"__name__": "tron_config", "__file__": str(path)}
    try:
        # From bytes Python reads UTF-8, whatever the locale, with or without a byte order mark.
        with redirect_stdout(sys.stderr):  # stdout is for results
            exec(compile(path.read_bytes(), str(path), "exec"), scope)
    except (Exception, SystemExit) as error:
        raise InputError(f"{place_of(path, error)}: {_reason(error)}") from error
    config = scope.get("config")
    if not isinstance(config, ExperimentConfig):
        raise InputError(f"{path} must define `config = ExperimentConfig(...)`, got {config!r}")
    return config


def _reason(error: BaseException) -> str:
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown:
        return _unknown_key(unknown.group(1))
    return described(error)


def _unknown_key(key: str) -> str:
    near = [_NAMES_ELSEWHERE[key]] if key in _NAMES_ELSEWHERE else []
    near = near or difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.75)
    hint = f"; did you mean {near[0]}?" if near else "; `tron config show` lists them all"
    return f"unknown setting {key!r}{hint}"


def _check_key(key: str) -> None:
    if key not in FIELDS:
        raise InputError(_unknown_key(key))


def _kind(name: str) -> tuple[Any, bool]:
    """Type of a setting, and whether it may be None."""
    kind = _TYPES[name]
    if isinstance(kind, types.UnionType):
        return typing.get_args(kind)[0], True
    return kind, False


def _parse_value(key: str, text: str) -> Any:
    kind, may_be_none = _kind(key)
    if may_be_none and text.lower() == "none":
        return None
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
    except (KeyError, ValueError):
        raise InputError(_wrong_type(key, repr(text))) from None
    if kind is str:
        return text
    return tuple(part for part in re.split(r"[,\s]+", text) if part)


def _checked_type(name: str, value: Any) -> Any:
    kind, may_be_none = _kind(name)
    if may_be_none and value is None:
        return None
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise InputError(f"{name} must be below 2**63, got a number of {value.bit_length()} bits")
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, types.GenericAlias):
        if isinstance(value, tuple):
            return value
    elif type(value) is kind:
        return value
    raise InputError(_wrong_type(name, repr(value)))


def _wrong_type(name: str, shown: str) -> str:
    kinds = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "a text",
    }
    kind, may_be_none = _kind(name)
    expected = kinds.get(kind, "a list of measures") + (" or None" if may_be_none else "")
    return f"{name} must be {expected}, got {shown}"


def _check_range(field: dataclasses.Field[Any], value: Any) -> None:
    if value is None:
        return
    limits = field.metadata
    choices = REGISTERED.get(field.name, limits.get("choices"))
    if choices:
        if value not in choices:
            near = difflib.get_close_matches(value, choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"{field.name} must be one of {', '.join(choices)}, got {value!r}{hint}"
            )
        return
    bounds = (
        ("at least", limits.get("low"), lambda v, b: v >= b),
        ("at most", limits.get("high"), lambda v, b: v <= b),
        ("above", limits.get("above"), lambda v, b: v > b),
        ("below", limits.get("below"), lambda v, b: v < b),
    )
    for words, bound, holds in bounds:
        if bound is not None and not (math.isfinite(value) and holds(value, bound)):
            finite = "" if math.isfinite(value) else "finite and "
            raise InputError(f"{field.name} must be {finite}{words} {bound}, got {value}")
