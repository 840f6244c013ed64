"""What a name in a configuration stands for: the one place to add a model, a loss or a sampler.

Entries are "module:attribute", loaded when they are asked for, so that reading a configuration
imports neither torch nor what is not used. What is registered says by its keyword-only parameters
which settings it needs; `build` hands it these.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from tron_cli.errors import InputError

if TYPE_CHECKING:
    from tron_cli.config import ExperimentConfig

# Networks: modules with `forward(batch, rows_UD) -> hidden_ND`; see models/__init__.py.
MODELS = {
    "bert4rec": "tron_cli.models.bert4rec:BERT4Rec",
    "gru4rec": "tron_cli.models.gru4rec:GRU4Rec",
    "gsasrec": "tron_cli.models.gsasrec:GSASRec",
    "sasrec": "tron_cli.models.sasrec:SASRec",
}

# Methods without gradients, fitted at once; see baselines/base.py.
BASELINES = {
    "ease": "tron_cli.baselines.ease:EASE",
    "markov": "tron_cli.baselines.markov:Markov",
    "popular": "tron_cli.baselines.popular:Popular",
    "session_knn": "tron_cli.baselines.session_knn:SessionKNN",
    "session_popular": "tron_cli.baselines.session_popular:SessionPopular",
}

# Losses on logits of sampled items: (positive_N, negative_NK, keep_NK) -> loss_N.
LOSSES = {
    "bce": "tron_cli.losses:bce",
    "bpr": "tron_cli.losses:bpr",
    "bpr-max": "tron_cli.losses:bpr_max",
    "gbce": "tron_cli.losses:gbce",
    "ssm": "tron_cli.losses:ssm",
}

# Losses that look at the whole catalogue: (hidden_ND, table_VD, targets_N) -> loss_N.
CATALOGUE_LOSSES = {
    "ce": "tron_cli.cross_entropy:ce",
    "sce": "tron_cli.scalable_cross_entropy:sce",
}

# What negatives are drawn from: training occurrences of each item, float64 [I] -> weights [I].
SAMPLERS = {
    "uniform": "tron_cli.samplers:uniform",
    "popularity": "tron_cli.samplers:popularity",
    "mixed": "tron_cli.samplers:mixed",
}


def load(entry: str) -> Any:
    """What an entry names."""
    module, _, attribute = entry.partition(":")
    return getattr(importlib.import_module(module), attribute)


def settings_of(entry: str, config: ExperimentConfig, **more: Any) -> dict[str, Any]:
    """The settings that an entry's keyword-only parameters name, from `more` or the config.

    Raises InputError where one names neither.
    """
    values = {**{field.name: getattr(config, field.name) for field in fields(config)}, **more}
    parameters = inspect.signature(load(entry)).parameters.values()
    names = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    for name in names:
        if name not in values:
            near = difflib.get_close_matches(name, values, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(
                f"{entry} has a keyword-only parameter {name!r}, which is no setting{hint}"
            )
    return {name: values[name] for name in names}
