"""Steps that several processes share end with the weights of one process's steps."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import pack_sessions, random_sessions, tiny_settings
from helpers.processes import alone, in_processes

from tron_cli.config import ExperimentConfig
from tron_cli.data.shares import share_of
from tron_cli.distributed.processes import Processes
from tron_cli.models.base import Model
from tron_cli.sampling.negatives import Distribution
from tron_cli.training.feed import build_feed
from tron_cli.training.optim import catch_up_all, optimizer_of
from tron_cli.training.start import new_model
from tron_cli.training.step import accumulated_step, seed_generators

ITEMS = 60
STEPS = 3
CE = {"loss": "ce", "num_uniform_negatives": 0, "num_batch_negatives": 0, "topk_sampling": False}
GBCE = {
    "gbce_t": 0.75, "topk_sampling": False, "num_batch_negatives": 0,
    "reject_in_batch_items": False, "reject_uniform_session_items": False,
}  # fmt: skip
SCE = {**CE, "loss": "sce", "sce_buckets": 5, "sce_bucket_positions": 9, "sce_bucket_items": 12}
BASE = {"dropout_rate": 0.3, "num_heads": 2, "clip_norm": 0.5, "train_batch_size": 7}

# Losses, sampling styles and optimizers, each with each.
CASES: list[dict[str, Any]] = [
    {
        "loss": loss,
        "sampling_style": style,
        "optimizer": optimizer,
        **(GBCE if loss == "gbce" else {}),
    }
    for loss, style, optimizer in itertools.product(
        ("ssm", "bce", "bpr", "bpr-max", "gbce"),
        ("batchwise", "sessionwise", "eventwise"),
        ("adam", "row_adam", "adagrad"),
    )
]
CASES += [
    {**more, "optimizer": optimizer}
    for more in (
        CE,
        SCE,
        {**SCE, "sce_mix": True, "model": "bert4rec", "train_batch_size": 1},
        {**CE, "reuse_item_embeddings": False},
        {"reuse_item_embeddings": False, "weight_decay": 0.1},
        {"accumulate_batches": 2, "sampling_style": "sessionwise"},
        {"train_batch_size": 1},
        {"model": "gsasrec", "relative_positions": True},
        {"model": "gru4rec", "num_heads": 1},
        {"model": "gru4rec", "num_heads": 1, "session_parallel": True},
        {"model": "bert4rec"},
        {"block": "bsarec", "training_windows": "prefixes"},
        {"key_padding_mask": False},
        {"logq_correction": True, "topk_sampling": False, "reject_in_batch_items": False},
        {"score": "cosine", "output_bias": True},
        {"dropout_rate": 0.0},
    )
    for optimizer in ("adam", "row_adam")
    if not (more.get("output_bias") and more.get("weight_decay"))
]


# With the rows of tables divided among the processes.
SHARDED: list[dict[str, Any]] = [
    {"table_sharding": "rows", "optimizer": optimizer, **more}
    for more in (
        {"reuse_item_embeddings": False},
        {"loss": "bce", "sampling_style": "eventwise"},
        {"loss": "bpr-max", "num_uniform_negatives": 0, "topk_sampling_k": 4},
        {"loss": "gbce", **GBCE, "sampling_style": "sessionwise"},
        CE,
        {**CE, "reuse_item_embeddings": False, "label_smoothing": 0.1},
        {**CE, "model": "bert4rec", "score": "cosine", "output_bias": True},
        {"model": "gsasrec", "initialization": "normal", "num_batch_negatives": 0},
        {"model": "gru4rec", "num_heads": 1, "accumulate_batches": 2},
        {"weight_decay": 0.1, "train_batch_size": 1},
    )
    for optimizer in ("adam", "row_adam")
]
SHARDED += [{"table_sharding": "rows", "optimizer": "adagrad"}]
SHARDED += [
    {
        "table_sharding": "rows",
        "optimizer": "adam",
        "ema_decay": 0.9,
        "weight_decay": 0.1,
        "output_bias": True,
    }
]
CASES += SHARDED


def config_of(case: dict[str, Any]) -> ExperimentConfig:
    return ExperimentConfig(**tiny_settings(**{**BASE, **case}))


def train_all(
    processes: Processes, cases: list[dict[str, Any]], dtype: torch.dtype
) -> list[dict[str, torch.Tensor]]:
    """Take some steps of each case; return the loss of each step and the weights."""
    rng = np.random.default_rng(5)
    sessions = pack_sessions(random_sessions(rng, 17, ITEMS))
    found = []
    for case in cases:
        config = config_of(case)
        model = new_model(config, ITEMS, processes).to(dtype)
        optimizer = optimizer_of(config, model)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        feed = build_feed(config, sessions, model, padded=False)
        distribution = (
            Distribution.of(
                np.arange(1.0, ITEMS + 1),
                expected_of=(config.num_uniform_negatives, np.ones(ITEMS)),
                device=torch.device("cpu"),
            )
            if config.logq_correction
            else Distribution(ITEMS)
        )
        model.train()
        losses = []
        for step in range(STEPS):
            seed_generators(config.seed, step=step + 1)
            many = range(step * config.accumulate_batches, (step + 1) * config.accumulate_batches)
            batches = [feed.batch(number) for number in many]
            if processes.count > 1:
                batches = [share_of(batch, processes.rank, processes.count) for batch in batches]
            loss = accumulated_step(
                model, optimizer, scaler, batches, config, distribution, torch.float32, processes
            )
            losses.append(processes.add_up(loss.detach().clone()))
        catch_up_all(optimizer)
        weights = {
            name: felt(name, whole_table(model, each.detach(), processes))
            for name, each in model.named_parameters()
        }
        found.append({"loss": torch.stack(losses), **weights})
    return found


def whole_table(model: Model, weights: torch.Tensor, processes: Processes) -> torch.Tensor:
    """Join the rows of a table that is divided, in the order of the processes."""
    is_divided = any(weights.data_ptr() == table.data_ptr() for table in model.divided_tables)
    return processes.gathered(weights)[0] if is_divided else weights


def felt(name: str, values: torch.Tensor) -> torch.Tensor:
    """Leave out the bias of keys: no score depends on it, and its moves follow roundings."""
    for layer, parts, key in (("query_key_value.bias", 3, 1), ("key_value.bias", 2, 0)):
        if name.endswith(f".{layer}"):
            return torch.cat([*values.chunk(parts)[:key], *values.chunk(parts)[key + 1 :]])
    return values


FEW = CASES[::7]


def train_in_both(processes: Processes, cases: list[dict[str, Any]]) -> list[Any]:
    """Start-up takes longer than the steps, so that processes take all of them."""
    return [
        train_all(processes, cases, torch.float64),
        train_all(processes, FEW if processes.count < 3 else [], torch.float32),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "cases"), [(2, CASES), (3, CASES[::15])])
def test_several_processes_take_the_steps_of_one(
    count: int, cases: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The last batches of a pass have three rows; with train_batch_size=1 one process has none."""
    expected = alone(train_in_both, cases)
    first, *others = in_processes(count, train_in_both, tmp_path, cases)
    for of_case, found, wanted, *same in zip(
        cases, first[0], expected[0], *(each[0] for each in others), strict=True
    ):
        for name, values in wanted.items():
            error = (found[name] - values).abs().max() / values.abs().max()
            assert error <= 1e-12, (of_case, name, error)
            assert all(torch.equal(other[name], found[name]) for other in same), (of_case, name)
    for of_case, found, wanted in zip(FEW, first[1], expected[1], strict=False):
        # Adam and Adagrad make of a gradient near zero, and its rounding, a move like any other.
        largest = max(values.abs().max() for name, values in wanted.items() if name != "loss")
        torch.testing.assert_close(found["loss"], wanted["loss"], rtol=1e-6, atol=0)
        for name, values in wanted.items():
            error = (found[name] - values).abs().max() / largest
            assert error <= 1e-6 or name == "loss", (of_case, name, error)
