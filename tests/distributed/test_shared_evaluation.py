"""Evaluation, comparison and recommendation that several processes share."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import random_checkpoint
from helpers.command_lines import Command, is_one_sentence
from helpers.datasets import random_sessions, write_dataset
from helpers.processes import alone, in_processes

import tron_cli.cli as command_line
from tron_cli.baselines import predict as of_baselines
from tron_cli.checkpoint import load_checkpoint
from tron_cli.data.dataset import Dataset
from tron_cli.distributed.processes import Processes
from tron_cli.errors import InputError
from tron_cli.evaluation import compare, evaluate, predict
from tron_cli.evaluation.evaluate import EvaluationOptions
from tron_cli.evaluation.sharded import divided_model
from tron_cli.prepare.reading.bad_lines import BadLines
from tron_cli.serving.bulk import RecommendOptions, recommend_sessions
from tron_cli.serving.list_files import list_writer
from tron_cli.serving.recommender import Recommender
from tron_cli.serving.session_files import SessionColumns, read_sessions

ITEMS = 60
NETWORKS: dict[str, dict[str, Any]] = {
    "sasrec": {"num_heads": 2},
    "start": {"positions": "start", "eval_batch_size": 3},
    "gru4rec": {"model": "gru4rec"},
    "bert4rec": {"model": "bert4rec"},
    "cosine": {"score": "cosine", "output_bias": True, "reuse_item_embeddings": False},
    "knn": {"model": "session_knn"},
    "popular": {"model": "popular"},
    "ease": {"model": "ease"},
}
EVERYTHING = EvaluationOptions(
    by=("length", "position", "popularity", "repeat"), cutoff=7, metrics="R@5 RR@20 nDCG@3"
)
CASES = [
    *((name, EVERYTHING) for name in NETWORKS),
    ("sasrec", dataclasses.replace(EVERYTHING, full_sessions=True, filter_rated=True)),
    ("knn", dataclasses.replace(EVERYTHING, full_sessions=True, filter_rated=True)),
    ("sasrec", EvaluationOptions(one_pass=True)),
    ("start", EvaluationOptions(protocol="last-item", split="val")),
    ("sasrec", EvaluationOptions(limit_sessions=1)),
    ("popular", EvaluationOptions(limit_sessions=1)),
    ("sasrec", EvaluationOptions(sample_sessions=20, seed=3)),
]
DIVIDED = [
    (name, dataclasses.replace(EVERYTHING, cutoff=0, table_sharding="rows", filter_rated=filtered))
    for name, filtered in (
        ("sasrec", True), ("sasrec", False), ("start", False), ("gru4rec", False),
        ("bert4rec", False), ("cosine", True),
    )
] + [
    ("start", EvaluationOptions(full_sessions=True, table_sharding="rows")),
    ("sasrec", EvaluationOptions(one_pass=True, table_sharding="rows")),
    ("sasrec", EvaluationOptions(limit_sessions=1, table_sharding="rows")),
]  # fmt: skip


def write_models(folder: Path) -> None:
    """Write a dataset whose first session is long, networks with many ties, and baselines."""
    rng = np.random.default_rng(8)
    test = [rng.integers(1, ITEMS + 1, 23).tolist(), *random_sessions(rng, 90, ITEMS, longest=11)]
    dataset = write_dataset(
        folder / "data", train=random_sessions(rng, 70, ITEMS), test=test, num_items=ITEMS,
        val=random_sessions(rng, 20, ITEMS), lost_predictions=4,
    )  # fmt: skip
    for name, changes in NETWORKS.items():
        random_checkpoint(
            dataset, folder / f"{name}.pt", with_ties=True,
            **{"eval_batch_size": 16, "recommendation_limit": 5, **changes},
        )  # fmt: skip
    lines = (
        json.dumps({"session": f"s{number}", "items": [item + 100 for item in row]})
        for number, row in enumerate([*test, [9_999]])
    )
    (folder / "sessions.jsonl").write_text("\n".join(lines))


def rank_all(processes: Processes, folder: Path) -> dict[str, Any]:
    """Return the reports of all cases and the files that were written."""
    out = folder / str(processes.count)
    out.mkdir(exist_ok=True)
    dataset, device = Dataset.open(folder / "data" / "tiny"), torch.device("cpu")
    reports = []
    for number, (name, options) in enumerate(CASES):
        if number % 2 == 0:
            files = {each: out / f"{number}.{each}" for each in ("run", "qrels")}
            options = dataclasses.replace(options, **files, per_event=out / f"{number}.csv")
        checkpoint = load_checkpoint(folder / f"{name}.pt")
        reports.append(evaluate.assess(checkpoint, dataset, options, device, processes))
    for number, (name, options) in enumerate(DIVIDED):
        options = dataclasses.replace(options, per_event=out / f"divided-{number}.csv")
        checkpoint = load_checkpoint(folder / f"{name}.pt")
        reports.append(evaluate.assess(checkpoint, dataset, options, device, processes))
    checkpoints = [load_checkpoint(folder / f"{name}.pt") for name in ("sasrec", "knn", "start")]
    reports.append(
        compare.compare(
            checkpoints, dataset, EvaluationOptions(), device, reference=1, processes=processes
        )
    )
    counts = []
    for name, size, filtered in (
        ("sasrec", 8, True),
        ("knn", 30, False),
        ("start", 99, True),
    ):
        recommender = Recommender.load(folder / f"{name}.pt")
        options = RecommendOptions(6, filtered, recommender.scope(), "skip", "popular")
        batches = read_sessions(
            folder / "sessions.jsonl", SessionColumns(), size, BadLines(skip=False)
        )
        with list_writer(
            out / f"{name}-{processes.rank}.csv", text_items=False, scores=True
        ) as write:
            found = recommend_sessions(recommender, batches, write, options, processes)
        counts.append(str(found) if processes.is_first else "")
    return {"reports": reports, "counts": counts}


def rank_in_parts(processes: Processes, folder: Path) -> dict[str, Any]:
    """Rank with more parts than there are processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "_EVENTS_AT_ONCE", 32)
        patch.setattr(of_baselines, "_ROWS_AT_ONCE", 16)
        return rank_all(processes, folder)


@pytest.mark.slow
def test_several_processes_find_what_one_finds(tmp_path: Path) -> None:
    write_models(tmp_path)
    expected = alone(rank_in_parts, tmp_path)
    assert expected["reports"][0]["events"] == expected["reports"][-1]["events"] > 300
    files = {file.name: file.read_bytes() for file in (tmp_path / "1").iterdir()}
    assert len(files) == 3 * len(CASES[::2]) + len(DIVIDED) + 3
    for count in (2, 4):
        first, *others = in_processes(count, rank_in_parts, tmp_path, tmp_path)
        assert first == expected
        assert all(other["reports"] == expected["reports"] for other in others)
        for name, content in files.items():
            assert (tmp_path / str(count) / name).read_bytes() == content, (count, name)


def test_what_processes_cannot_divide_is_refused(tmp_path: Path) -> None:
    write_models(tmp_path)
    processes, cpu = Processes(1, 4), torch.device("cpu")
    model = divided_model(load_checkpoint(tmp_path / "sasrec.pt"), cpu, processes)
    whole = load_checkpoint(tmp_path / "sasrec.pt").build_model(cpu)
    assert torch.equal(model.item_table, whole.item_table[16:32])  # 61 rows in four processes
    with pytest.raises(InputError, match="is session_knn; leave out --table-sharding"):
        divided_model(load_checkpoint(tmp_path / "knn.pt"), cpu, processes)
    dataset = Dataset.open(tmp_path / "data" / "tiny")
    options = EvaluationOptions(cutoff=3, table_sharding="rows")
    with pytest.raises(InputError, match="--run and --cutoff list the best items"):
        evaluate.assess(load_checkpoint(tmp_path / "sasrec.pt"), dataset, options, cpu)


def torchrun(count: int, *words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--", *map(str, words),
        ],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip


# A script that trains nothing: each of its calls joins the processes anew.
SCRIPT = """
import sys
import tron_cli, tron_cli.cli
from tron_cli.evaluation import predict

predict._EVENTS_AT_ONCE = 32
found = tron_cli.evaluate("sasrec.pt", data_dir="data").metrics["R@5"]
assert found == tron_cli.evaluate("sasrec.pt", data_dir="data").metrics["R@5"]
for words in (
    ["evaluate", "sasrec.pt", "--data-dir", "data", "--json"],
    ["recommend", "sasrec.pt", "--input", "sessions.jsonl", "--output", "lists.parquet"],
    ["evaluate", "nowhere.pt"],
):
    sys.argv = ["tron", *words]
    try:
        tron_cli.cli.main()
    except SystemExit as end:
        if end.code:
            raise
"""

# Rank 1 is killed while it ranks: SCRIPT WORDS...
DIES = """
import os, signal, sys
from tron_cli.cli import main
from tron_cli.evaluation import predict

def dies(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

predict._EVENTS_AT_ONCE = 32
if os.environ["RANK"] == "1":
    predict.ranked = dies
main()
"""


@pytest.mark.slow
def test_one_process_speaks_and_a_killed_one_ends_the_job(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "dies.py").write_text(DIES)
    done = torchrun(2, "script.py", folder=tmp_path)
    _, out, _ = command("evaluate", "sasrec.pt", "--data-dir", "data", "--json")
    assert done.stdout == out
    assert done.stderr.count("tron: ") == 1, done.stderr
    assert "nowhere.pt" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert done.stderr.count("92 sessions") == 1
    lists = (tmp_path / "lists.parquet").read_bytes()
    command("recommend", "sasrec.pt", "--input", "sessions.jsonl", "--output", "lists.parquet")
    assert (tmp_path / "lists.parquet").read_bytes() == lists

    done = torchrun(
        2, "dies.py", "evaluate", "sasrec.pt", "--data-dir", "data", "--run", "a.run",
        folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "tron: " in done.stderr
    assert not list(tmp_path.glob("*a.run*"))


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {
        "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }  # fmt: skip
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(command_line, "_FIRST_SPEAKS", 0.0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["prepare", "synthetic"], "tron prepare works in one process, got 2"),
        (["config", "show", "config_otto"], "tron config works in one process"),
        (["serve", "a.pt"], "tron serve works in one process"),
        (["export", "a.pt", "--format", "torch"], "tron export works in one process"),
        (["mix", "a.pt", "b.pt"], "tron mix works in one process"),
        (["similar", "a.pt", "3"], "tron similar works in one process"),
        (["recommend", "a.pt"], "name a file with --input, or leave out torchrun"),
        (["evaluate", "nowhere.pt"], "nowhere.pt"),
    ],
)
@pytest.mark.usefixtures("second_of_two")
def test_wrong_usage_under_torchrun_is_one_sentence(
    words: list[str], says: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that fails although the first one does not also says why, but late."""
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    assert says in err
    assert is_one_sentence(err)
    assert list(tmp_path.iterdir()) == []
