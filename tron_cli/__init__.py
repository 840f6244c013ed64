"""tron: train, evaluate, compare and serve session-based recommenders.

`__all__` names the public Python API, which docs/python.md shows. Its functions and classes are
imported when they are first used.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tron_cli.api.evaluation import ComparisonResult as ComparisonResult
    from tron_cli.api.evaluation import EvaluationResult as EvaluationResult
    from tron_cli.api.evaluation import compare as compare
    from tron_cli.api.evaluation import evaluate as evaluate
    from tron_cli.api.mixing import MixResult as MixResult
    from tron_cli.api.mixing import mix as mix
    from tron_cli.api.preparation import prepare as prepare
    from tron_cli.api.settings import load_config as load_config
    from tron_cli.api.shards import join_shards as join_shards
    from tron_cli.api.shards import write_shard as write_shard
    from tron_cli.api.training import TrainingResult as TrainingResult
    from tron_cli.api.training import train as train
    from tron_cli.config import ExperimentConfig as ExperimentConfig
    from tron_cli.data.dataset import Dataset as Dataset
    from tron_cli.errors import InputError as InputError
    from tron_cli.errors import RunError as RunError
    from tron_cli.serving.recommender import Recommendation as Recommendation
    from tron_cli.serving.recommender import Recommender as Recommender

# PyTorch asks for huge pages for large tensors if this is set before the first of them: random rows
# of a table are read faster, and a step's matrices cost no thousands of page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# How long idle threads of GNU OpenMP, which torch loads and which reads this then, spin before they
# sleep. Its default of 300,000 turns takes cores from other trainings on the machine; sleeping at
# once would cost a training that runs alone a quarter of its speed.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"

__version__ = "0.1.0"

__all__ = [
    "ComparisonResult",
    "Dataset",
    "EvaluationResult",
    "ExperimentConfig",
    "InputError",
    "MixResult",
    "Recommendation",
    "Recommender",
    "RunError",
    "TrainingResult",
    "compare",
    "evaluate",
    "join_shards",
    "load_config",
    "mix",
    "prepare",
    "train",
    "write_shard",
]

_MODULES = {
    "ComparisonResult": "api.evaluation",
    "Dataset": "data.dataset",
    "EvaluationResult": "api.evaluation",
    "ExperimentConfig": "config",
    "InputError": "errors",
    "MixResult": "api.mixing",
    "Recommendation": "serving.recommender",
    "Recommender": "serving.recommender",
    "RunError": "errors",
    "TrainingResult": "api.training",
    "compare": "api.evaluation",
    "evaluate": "api.evaluation",
    "join_shards": "api.shards",
    "load_config": "api.settings",
    "mix": "api.mixing",
    "train": "api.training",
    "write_shard": "api.shards",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "prepare":
        return importlib.import_module("tron_cli.prepare")  # the package is the function
    if name not in _MODULES:
        raise AttributeError(f"module 'tron_cli' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"tron_cli.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
