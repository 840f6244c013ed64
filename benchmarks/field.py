"""Train every model and baseline on the same data for the same epochs; write the benchmark tables.

    python -m benchmarks.field run yoochoose1_64 tron gru4rec    # prepared datasets in --data-dir
    python -m benchmarks.field table                             # rewrite the tables

A first setting each, not a tuned one: the packaged configuration with the epochs of the budget. A
run writes DATASET-METHOD.json into benchmarks/results/field: commands, commit, seed, hardware,
figures, and the processor time of training and evaluation, which other work on the machine does
not change much.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.commands import (
    ROOT,
    commit,
    hardware,
    measured,
    processor_seconds,
    replace_between,
    write_result,
)

RESULTS = ROOT / "benchmarks" / "results" / "field"
BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"

# The dataset's packaged configs, the epochs of each network, and TRON's own dropout.
DATASETS = {
    "yoochoose1_64": ("config_yoochoose", 3, 0.05),
    "diginetica": ("config_diginetica", 2, 0.2),
}
IN_README = ("yoochoose1_64",)

_CE = ("loss=ce", "num_uniform_negatives=0", "num_batch_negatives=0", "topk_sampling=False")
# Title, what follows the dataset's config in its name, and overrides.
METHODS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "tron": ("TRON", "", ()),
    "tron-ligr": (
        "TRON on LiGR blocks", "", ("block=ligr", "activation=swiglu", "feed_forward_dim=800")
    ),
    "sasrec-ce": ("SASRec, cross-entropy", "", (*_CE, "lr=1e-3")),
    "sasrec-sce": ("SASRec, SCE", "", (*_CE[1:], "loss=sce", "lr=1e-3")),
    "recbole": ("SASRec as RecBole has it, cross-entropy", "_recbole", ()),
    "gsasrec": ("gSASRec, gBCE, 16 negatives", "_gsasrec", ()),
    "sasrec-bce": ("SASRec, BCE, 1 negative", "_sasrec", ()),
    "gru4rec": ("GRU4Rec+, BPR-max", "_gru4rec", ("lr=0.1",)),
    "bert4rec": ("BERT4Rec, cross-entropy", "_bert4rec", ()),
    "session_knn": ("session-kNN (V-SKNN)", "", ("model=session_knn",)),
    "markov": ("first-order Markov", "", ("model=markov",)),
    "ease": ("EASE", "", ("model=ease",)),
    "session_popular": ("most popular in the session", "", ("model=session_popular",)),
    "popular": ("most popular", "", ("model=popular",)),
}  # fmt: skip
BASELINES = ("session_knn", "markov", "ease", "session_popular", "popular")


def run(dataset: str, method: str, data_dir: Path, output_dir: Path) -> Path:
    """Train and evaluate one method, and return its result file."""
    _, suffix, overrides = METHODS[method]
    config, epochs, dropout = DATASETS[dataset]
    budget = () if method in BASELINES else (f"max_epochs={epochs}",)
    if not suffix and budget:  # before the scores and dropout that validation chose
        budget = (*budget, "score=dot", f"dropout_rate={dropout}")
    name = f"{dataset}-{method}"
    words = [
        "train", "--config", f"{config}{suffix}", f"dataset_name={dataset}", *overrides, *budget,
    ]  # fmt: skip
    where = ["--data-dir", str(data_dir)]
    place = ["--output-dir", str(output_dir), "--name", name]
    found, of_training = measured([*words, *where, *place])
    report, of_evaluation = measured(["evaluate", found["checkpoint"], "--full-sessions", *where])
    config_file = output_dir / name / "config.json"
    result = {
        "experiment": name,
        "dataset": dataset,
        "method": method,
        "commands": [f"tron {' '.join(words)}", "tron evaluate RUN --full-sessions"],
        "commit": commit(),
        "hardware": hardware(),
        "seed": json.loads(config_file.read_text())["seed"],
        "epochs": None if method in BASELINES else epochs,
        "training_processor_seconds": round(processor_seconds(of_training), 1),
        "evaluation_processor_seconds": round(processor_seconds(of_evaluation), 1),
        "validation": found["validation"],
        "test": {key: value for key, value in report.items() if key != "checkpoint"},
    }
    return write_result(RESULTS / f"{name}.json", result)


def table(datasets: Iterable[str] = DATASETS) -> str:
    """Return the committed results as Markdown: one table per dataset, the best R@20 first."""
    blocks = []
    for dataset in datasets:
        epochs = DATASETS[dataset][1]
        results = [json.loads(path.read_text()) for path in RESULTS.glob(f"{dataset}-*.json")]
        if not results:
            continue
        results.sort(key=lambda result: -result["test"]["metrics"]["R@20"]["value"])
        test = results[0]["test"]
        lines = [
            f"**{dataset}**, {epochs} epochs: {test['events']:,} test events of "
            f"{test['sessions']:,} sessions, {test['items']:,} items",
            "",
            "| method | R@20 (std. error) | RR@20 (std. error) | nDCG@20 | training | evaluation |",
            "|---|---:|---:|---:|---:|---:|",
            *(_row(result) for result in results),
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _row(result: dict[str, Any]) -> str:
    figures = result["test"]["metrics"]
    cells = [
        METHODS[result["method"]][0],
        *(f"{figures[n]['value']:.4f} ({figures[n]['stderr']:.4f})" for n in ("R@20", "RR@20")),
        f"{figures['nDCG@20']['value']:.4f}",
        f"{result['training_processor_seconds']:,.0f} s",
        f"{result['evaluation_processor_seconds']:,.0f} s",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="train and evaluate")
    run_parser.add_argument("dataset", choices=DATASETS)
    run_parser.add_argument("methods", nargs="+", choices=METHODS)
    run_parser.add_argument("--data-dir", type=Path, default=ROOT / "datasets")
    run_parser.add_argument("--output-dir", type=Path, default=ROOT / "runs")
    commands.add_parser("table", help="rewrite the tables of README.md and docs/results.md")
    arguments = parser.parse_args()
    if arguments.command == "table":
        replace_between(ROOT / "README.md", BEGIN, END, table(IN_README))
        replace_between(ROOT / "docs" / "results.md", BEGIN, END, table())
        return
    for method in arguments.methods:
        where = (arguments.data_dir.resolve(), arguments.output_dir.resolve())
        print(run(arguments.dataset, method, *where))


if __name__ == "__main__":
    main()
