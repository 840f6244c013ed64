"""Runs with table_sharding=rows: ranks, checkpoints and resuming are those of one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import pack_sessions, random_sessions, tiny_settings, write_dataset
from helpers.processes import alone, in_processes

from tron_cli.checkpoint import load_checkpoint
from tron_cli.config import ExperimentConfig
from tron_cli.data.dataset import Dataset
from tron_cli.distributed.processes import Processes
from tron_cli.errors import InputError
from tron_cli.evaluation.predict import predict
from tron_cli.models.base import build_model
from tron_cli.training.loop import train
from tron_cli.training.start import new_model
from tron_cli.training.step import seed_generators

ITEMS = 60  # with row 0, 61 rows: equal parts for no number of processes
CPU = torch.device("cpu")
NETWORKS: list[dict[str, Any]] = [
    {"num_heads": 2, "output_bias": True},
    {"model": "gsasrec", "initialization": "normal"},
    {"model": "bert4rec", "score": "cosine", "reuse_item_embeddings": False},
    {"model": "gru4rec"},
]
RUNS: dict[str, dict[str, Any]] = {
    "row_adam": {"optimizer": "row_adam", "reuse_item_embeddings": False, "save_every": 4},
    "average": {"optimizer": "adam", "ema_decay": 0.9, "weight_decay": 0.1},
}


def settings(**changes: Any) -> ExperimentConfig:
    return ExperimentConfig(**tiny_settings(table_sharding="rows", **changes))


def all_ranks(processes: Processes) -> list[torch.Tensor]:
    """Return the ranks of random sessions by each network, with many ties, filtered or not."""
    sessions = pack_sessions(random_sessions(np.random.default_rng(3), 3000, ITEMS))
    found = []
    for case in NETWORKS:
        model = new_model(settings(**case), ITEMS, processes)
        shard, draws = model.shard, np.random.default_rng(4)
        for table in model.item_tables:
            # Few values, and equal rows in all parts of a table.
            rows = ITEMS + 1 + (model.mask_item is not None)
            whole = draws.integers(-2, 3, (9, table.shape[1]))[draws.integers(9, size=rows)]
            own = slice(None) if shard is None else slice(shard.first, shard.last)
            table.data.copy_(torch.from_numpy(whole / 4)[own])
        for filters in (False, True):
            ranks = predict(
                model, sessions, protocol="every-step", filter_rated=filters, rank_limit=50,
                batch_size=64, share=(processes.rank, processes.count),
            )  # fmt: skip
            columns = np.stack([ranks.session_E, ranks.event_E, ranks.rank_E], axis=1)
            rows = processes.gathered(torch.from_numpy(columns))[0].numpy()
            found.append(torch.from_numpy(rows[np.lexsort(rows.T[:2][::-1])]))
    return found


def train_runs(
    processes: Processes, data: Path, runs: Path, epochs: int, resume: bool
) -> list[dict[str, torch.Tensor]]:
    """Start runs, or resume them; return the initial rows of this process."""
    initial = []
    for name, case in RUNS.items():
        config = settings(**case, max_epochs=epochs)
        seed_generators(config.seed, step=0)
        initial.append(dict(new_model(config, 300, processes).state_dict()))
        train(
            config, Dataset.open(data), runs / name, device=CPU, resume=resume, processes=processes
        )
    return initial


def work(processes: Processes, data: Path, jobs: list[tuple[Path, int, bool]]) -> Any:
    return all_ranks(processes), [
        train_runs(processes, data, runs, epochs, resume) for runs, epochs, resume in jobs
    ]


def made_runs(folder: Path) -> dict[str, Any]:
    """Make runs of one process, of two that begin or continue, and of three that continue."""
    rng = np.random.default_rng(10)
    split = [random_sessions(rng, count, 300) for count in (45, 20)]
    data = folder / "data" / "tiny"
    write_dataset(folder / "data", train=split[0], val=split[1], num_items=300)
    for name in ("whole", "half", "two"):
        for run in RUNS:
            (folder / name / run).mkdir(parents=True)
    ranks, _ = alone(work, data, [(folder / "whole", 2, False), (folder / "half", 1, False)])
    shutil.copytree(folder / "half", folder / "from-one")
    jobs = [(folder / "two", 1, False), (folder / "from-one", 2, True)]
    (folder / "2").mkdir()
    by_two = in_processes(2, work, folder / "2", data, jobs)
    for name in ("by-one", "by-three"):
        shutil.copytree(folder / "two", folder / name)
    alone(train_runs, data, folder / "by-one", 2, True)
    (folder / "3").mkdir()
    by_three = in_processes(3, work, folder / "3", data, [(folder / "by-three", 2, True)])
    return {"ranks": ranks, "two": by_two, "three": by_three}


@pytest.mark.slow
def test_runs_with_divided_tables_are_those_of_one_process(tmp_path: Path) -> None:
    """One test, since starting processes takes longer than all that they do."""
    results = made_runs(tmp_path)
    check_ranks(results)
    check_first_weights(results)
    for resumed in ("by-one", "by-three", "from-one"):
        check_resumed(tmp_path, resumed)
    check_saves(tmp_path)


def check_ranks(results: dict[str, Any]) -> None:
    for found in (*results["two"], *results["three"]):
        for ranks, expected in zip(found[0], results["ranks"], strict=True):
            assert len(expected) > 9000
            assert torch.equal(ranks, expected)


def check_first_weights(results: dict[str, Any]) -> None:
    """The processes begin with their rows of one process's weights."""
    config = settings(**RUNS["row_adam"])
    seed_generators(config.seed, step=0)
    whole = build_model(config, 300).state_dict()
    parts = [found[1][0][0] for found in results["two"]]
    for name, weights in whole.items():
        tables = [part[name] for part in parts]
        is_table = name in ("item_embedding.weight", "output_embedding.weight")
        assert [len(table) for table in tables] == [151, 150] or not is_table
        assert torch.equal(torch.cat(tables) if is_table else tables[1], weights), name


def check_resumed(folder: Path, resumed: str) -> None:
    """The best checkpoint is one file of whole tables, which one process reads as any other."""
    for name in RUNS:
        (expected,) = (each for each in (folder / "whole" / name).glob("tron-*.pt"))
        (found,) = (each for each in (folder / resumed / name).glob("tron-*.pt"))
        assert found.name == expected.name
        models = [load_checkpoint(path).build_model(CPU) for path in (found, expected)]
        for key, weights in models[1].state_dict().items():
            if not key.endswith("query_key_value.bias"):  # a bias of keys follows its roundings
                torch.testing.assert_close(
                    models[0].state_dict()[key], weights, rtol=0, atol=1e-5, msg=key
                )


def check_saves(folder: Path) -> None:
    """The tables of the last save alone are kept, and what lacks them is refused."""
    for runs, is_divided in (("by-one", False), ("by-three", True), ("two", True)):
        for name in RUNS:
            tables = [path.name for path in (folder / runs / name).glob("tables-*")]
            last = load_checkpoint(folder / runs / name / "last.pt")
            assert tables == ([last.training["tables"]] if is_divided else [])
    with pytest.raises(InputError, match=r"lacks the item tables.*name the best checkpoint"):
        last.build_model(CPU)
    (folder / "two" / name / tables[0] / ".metadata").unlink()
    with pytest.raises(InputError, match="missing or damaged"):
        alone(train_runs, folder / "data" / "tiny", folder / "two", 2, True)


@pytest.mark.parametrize(
    ("changes", "init_from", "message"),
    [
        ({}, Path("a.pt"), "--init-from copies whole item tables"),
        (
            {"loss": "sce", "num_uniform_negatives": 0, "num_batch_negatives": 0,
             "topk_sampling": False},
            None, "loss=sce fills its buckets from the whole item table",
        ),
    ],
)  # fmt: skip
def test_what_divided_tables_cannot_do_is_refused(
    changes: dict[str, Any], init_from: Path | None, message: str, tmp_path: Path
) -> None:
    write_dataset(tmp_path, train=[[1, 2, 3]] * 9, val=[[1, 2]])
    with pytest.raises(InputError, match=message):
        train(
            settings(**changes), Dataset.open(tmp_path / "tiny"), tmp_path / "run", device=CPU,
            init_from=init_from, processes=Processes(0, 2),
        )  # fmt: skip
    assert not (tmp_path / "run").exists()
