"""Names of models, losses, samplers and optimizers in a configuration, and the code behind each.

Each takes one line here. Entries are loaded on demand, so that reading a configuration imports
neither torch nor unused code. The keyword-only parameters of an entry name the settings that it
needs; `settings_of` finds these.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from tron_cli.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Entry:
    """Registered model, loss, sampler or optimizer: path is "module:attribute".

    owns: settings that only this entry and other owners of them read; they are refused with all
    others. shares_table: True for models whose inputs and scores share a table by default
    (reuse_item_embeddings). masks_inputs: True for models that are trained with items masked at
    random. sparse_gradients: True for optimizers that take gradients of tables with only the rows
    that a step uses.
    """

    path: str
    owns: tuple[str, ...] = ()
    shares_table: bool = True
    masks_inputs: bool = False
    sparse_gradients: bool = False


_SCORES = ("score", "score_scale", "learn_score_scale", "normalize_inputs")
_TRANSFORMER = (
    *_SCORES, "num_heads", "key_padding_mask", "relative_positions", "initialization",
)  # fmt: skip
_BLOCKS = (
    "block", "feed_forward_dim", "activation", "attention_dropout_rate", "filter_weight",
    "low_frequencies",
)  # fmt: skip

# Networks: modules with `forward(batch, rows_UD) -> hidden_ND`; see models/base.py.
MODELS = {
    "bert4rec": Entry(
        "tron_cli.models.bert4rec:BERT4Rec",
        owns=(*_TRANSFORMER, *_BLOCKS, "prediction_head", "mask_probability"),
        masks_inputs=True,
    ),
    "gru4rec": Entry("tron_cli.models.gru4rec:GRU4Rec", owns=(*_SCORES, "session_parallel")),
    "gsasrec": Entry("tron_cli.models.gsasrec:GSASRec", owns=_TRANSFORMER, shares_table=False),
    "sasrec": Entry("tron_cli.models.sasrec:SASRec", owns=(*_TRANSFORMER, *_BLOCKS)),
}

# Methods without gradients, fitted at once; see baselines/base.py.
BASELINES = {
    "ease": Entry("tron_cli.baselines.ease:EASE", owns=("ease_l2",)),
    "markov": Entry("tron_cli.baselines.markov:Markov"),
    "popular": Entry("tron_cli.baselines.popular:Popular"),
    "session_knn": Entry(
        "tron_cli.baselines.session_knn:SessionKNN", owns=("knn_neighbors", "knn_sample_size")
    ),
    "session_popular": Entry("tron_cli.baselines.session_popular:SessionPopular"),
}

# Losses on logits of sampled items: (positive_N, negative_NK, keep_NK) -> loss_N.
LOSSES = {
    "bce": Entry("tron_cli.losses.sampled:bce"),
    "bpr": Entry("tron_cli.losses.sampled:bpr"),
    "bpr-max": Entry("tron_cli.losses.sampled:bpr_max"),
    "gbce": Entry("tron_cli.losses.sampled:gbce"),
    "ssm": Entry("tron_cli.losses.sampled:ssm"),
}

# Losses over the whole catalogue: (hidden_ND, table_VD, targets_N) -> loss_N.
CATALOGUE_LOSSES = {
    "ce": Entry("tron_cli.losses.cross_entropy:ce", owns=("label_smoothing",)),
    "sce": Entry(
        "tron_cli.losses.scalable_cross_entropy:sce",
        owns=("sce_buckets", "sce_bucket_positions", "sce_bucket_items", "sce_mix"),
    ),
}

# Distributions of negatives: training occurrences of each item, float64 [I] -> weights [I].
SAMPLERS = {
    "uniform": Entry("tron_cli.sampling.samplers:uniform"),
    "popularity": Entry("tron_cli.sampling.samplers:popularity", owns=("popularity_alpha",)),
    "mixed": Entry("tron_cli.sampling.samplers:mixed", owns=("popularity_alpha", "mixed_share")),
}

# Subclasses of torch.optim.Optimizer: (parameters, lr).
OPTIMIZERS = {
    # Training replaces it by adam or row_adam before anything else sees it.
    "auto": Entry("tron_cli.training.optim:Adam", owns=("weight_decay",)),
    "adam": Entry("tron_cli.training.optim:Adam", owns=("weight_decay",)),
    "row_adam": Entry(
        "tron_cli.training.optim:RowAdam", owns=("weight_decay",), sparse_gradients=True
    ),
    "adagrad": Entry("tron_cli.training.optim:Adagrad", sparse_gradients=True),
}

# Settings of the configuration whose value is one of these names.
REGISTERED = {
    "model": {**MODELS, **BASELINES},
    "loss": {**LOSSES, **CATALOGUE_LOSSES},
    "negative_sampler": SAMPLERS,
    "optimizer": OPTIMIZERS,
}


def load(entry: Entry) -> Any:
    """Return the class or function of an entry."""
    module, _, attribute = entry.path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def settings_of(entry: Entry, config: DataclassInstance, **more: Any) -> dict[str, Any]:
    """Return the settings that an entry's keyword-only parameters name, from `more` or the config.

    A class that passes **settings to its base class needs those of the base as well. Raises
    InputError where a parameter names neither.
    """
    values = {**{field.name: getattr(config, field.name) for field in fields(config)}, **more}
    names = _keywords(load(entry))
    for name in names:
        if name not in values:
            near = difflib.get_close_matches(name, values, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(
                f"{entry.path} has a keyword-only parameter {name!r}, which is no setting{hint}"
            )
    return {name: values[name] for name in names}


def _keywords(registered: Any) -> list[str]:
    """Return the names of keyword-only parameters."""
    parameters = inspect.signature(registered).parameters.values()
    names = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    if inspect.isclass(registered) and any(each.kind is each.VAR_KEYWORD for each in parameters):
        names += _keywords(registered.__base__)
    return names
