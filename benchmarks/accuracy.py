"""Train and evaluate on real data, and write the accuracy tables of docs/results.md.

    python -m benchmarks.accuracy run diginetica-tron-end    # prepared datasets in --data-dir
    python -m benchmarks.accuracy table                      # rewrite the tables

A run writes NAME.json into benchmarks/results/accuracy: commands, commit, seed, hardware, figures.
A run that was broken off is resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
BEGIN, END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"


@dataclass(frozen=True)
class Experiment:
    """Row of the table: a packaged config and the overrides."""

    dataset: str
    title: str
    config: str
    overrides: tuple[str, ...] = ()
    one_pass: bool = False


def _session_experiments(dataset: str, config: str, *changes: str) -> dict[str, Experiment]:
    common = (f"dataset_name={dataset}", *changes)
    tron = f"config_{config}"
    # SASRec's epochs are many, for the gain of each is small. On the parts of Yoochoose patience
    # ends them; on Diginetica a budget of one and a half times TRON's steps.
    epochs = "max_epochs=100" if config == "yoochoose" else "max_epochs=10"
    return {
        f"{dataset}-tron-end": Experiment(
            dataset, "TRON, positions=end", tron, (*common, "positions=end"), one_pass=True
        ),
        f"{dataset}-tron-start": Experiment(
            dataset, "TRON, positions=start", tron, (*common, "positions=start")
        ),
        f"{dataset}-sasrec": Experiment(
            dataset, "SASRec, BCE, 1 negative", f"config_{config}_sasrec", (*common, epochs)
        ),
    }


EXPERIMENTS = {
    # A week of sessions overfits at TRON's dropout: 0.4 is better than 0.05 on validation, for
    # SASRec too.
    **_session_experiments("yoochoose_100k", "yoochoose", "dropout_rate=0.4"),
    **_session_experiments("yoochoose1_64", "yoochoose"),
    **_session_experiments("diginetica", "diginetica"),
    "ml1m-tron-end": Experiment("ml1m", "TRON, positions=end", "config_ml1m", ("positions=end",)),
    "ml1m-tron-start": Experiment(
        "ml1m", "TRON, positions=start", "config_ml1m", ("positions=start",)
    ),
    "ml1m-sasrec": Experiment("ml1m", "SASRec, BCE, 1 negative", "config_ml1m_sasrec"),
    "beauty-bsarec": Experiment("beauty", "BSARec", "config_beauty_bsarec"),
}
_LAST_ITEM = ("ml1m", "beauty")


def run(name: str, data_dir: Path, output_dir: Path) -> Path:
    """Train or resume, evaluate one experiment, and return its result file."""
    experiment = EXPERIMENTS[name]
    run_dir = output_dir / name
    train = ["train", "--config", experiment.config, *experiment.overrides]
    # All events of long sessions, as in the published session-based figures.
    whole = [] if experiment.dataset in _LAST_ITEM else ["--full-sessions"]
    where = ["--data-dir", str(data_dir)]
    path = RESULTS / f"{name}.json"
    started = output_dir / f"{name}.started.json"
    seconds = None
    if (run_dir / "last.pt").exists():
        found = tron(["train", "--resume", str(run_dir), *where])
        if path.exists():  # trained before, and only evaluated again
            seconds = json.loads(path.read_text())["training_seconds"]
    else:
        output_dir.mkdir(parents=True, exist_ok=True)
        started.write_text(json.dumps({"commit": commit(), "hardware": hardware()}))
        clock = time.perf_counter()
        found = tron([*train, *where, "--output-dir", str(output_dir), "--name", name])
        seconds = round(time.perf_counter() - clock)

    def evaluated(*options: str) -> dict[str, Any]:
        report = tron(["evaluate", found["checkpoint"], *options, *where])
        return {key: value for key, value in report.items() if key != "checkpoint"}

    config = json.loads((run_dir / "config.json").read_text())
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    result = {
        "experiment": name,
        "dataset": experiment.dataset,
        "title": experiment.title,
        "commands": [f"tron {' '.join(train)}", f"tron {' '.join(['evaluate RUN', *whole])}"],
        **json.loads(started.read_text()),
        "seed": config["seed"],
        "training_seconds": seconds,
        "steps": json.loads(lines[-1])["step"],
        "best_checkpoint": Path(found["checkpoint"]).name,
        "validation": found["validation"],
        "test": evaluated(*whole),
    }
    if experiment.one_pass:
        result["test_one_pass"] = evaluated("--one-pass")
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def table() -> str:
    """Return the committed results as Markdown: one table per dataset."""
    files = [RESULTS / f"{name}.json" for name in EXPERIMENTS]
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    blocks = []
    for dataset in dict.fromkeys(result["dataset"] for result in results):
        rows = [result for result in results if result["dataset"] == dataset]
        blocks.append(_dataset_table(dataset, rows))
    return "\n\n".join(blocks)


def _dataset_table(dataset: str, results: list[dict[str, Any]]) -> str:
    test = results[0]["test"]
    last_item = test["protocol"] == "last-item"
    shown = ("R@10", "nDCG@10") if last_item else ("R@20", "RR@20")
    lost = test["left_out"]["lost_predictions"]
    seen = "seen items filtered" if test["filter_rated"] else "nothing filtered"
    lines = [
        f"**{dataset}**: {test['protocol']}, {test['events']:,} test events of "
        f"{test['sessions']:,} sessions, {test['items']:,} items, {seen}",
        "",
    ]
    header = [
        "model",
        *(f"{name} (std. error)" for name in shown),
        *((f"{name}, lost as misses" for name in shown) if lost else ()),
        f"validation {shown[0]}",
        "training",
    ]
    lines += [" | ".join(["", *header, ""]).strip(), "|---|" + "---:|" * (len(header) - 1)]
    for result in results:
        rows = [("", result["test"])]
        if "test_one_pass" in result:
            rows.append((", one pass", result["test_one_pass"]))
        for suffix, report in rows:
            figures = [report["metrics"][name] for name in shown]
            cells = [
                result["title"] + suffix,
                *(f"{figure['value']:.4f} ({figure['stderr']:.4f})" for figure in figures),
            ]
            if lost:
                values = [figure.get("value_with_lost_as_misses") for figure in figures]
                cells += ["" if value is None else f"{value:.4f}" for value in values]
            cells.append("" if suffix else f"{result['validation'][shown[0]]:.4f}")
            cells.append("" if suffix else _training(result))
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- `{result['commands'][0]}`" for result in results)]
    return "\n".join(lines)


def _training(result: dict[str, Any]) -> str:
    seconds = result["training_seconds"]
    spent = f", {seconds / 60:.0f} min" if seconds else ""
    return f"{result['steps']:,} steps{spent}, `{result['commit'][:9]}`, seed {result['seed']}"


def tron(words: list[str]) -> dict[str, Any]:
    """Run a tron command with --json; its log goes to our stderr."""
    command = [sys.executable, "-m", "tron_cli", *words, "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def commit() -> str:
    """Return the commit of the package, and whether files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "tron_cli")
    return git("rev-parse", "HEAD") + ("-modified" if changed else "")


def hardware() -> str:
    """Return the processor, threads and PyTorch's version."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    threads = torch.get_num_threads()
    return f"{model}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}"


def replace_between(page: Path, begin: str, end: str, text: str) -> None:
    """Put a text between two marks of a page."""
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="train and evaluate")
    run_parser.add_argument("experiments", nargs="+", choices=EXPERIMENTS)
    run_parser.add_argument("--data-dir", type=Path, default=ROOT / "datasets")
    run_parser.add_argument("--output-dir", type=Path, default=ROOT / "runs")
    commands.add_parser("table", help="rewrite the tables of docs/results.md")
    arguments = parser.parse_args()
    if arguments.command == "table":
        replace_between(ROOT / "docs" / "results.md", BEGIN, END, table())
    else:
        for name in arguments.experiments:
            print(run(name, arguments.data_dir.resolve(), arguments.output_dir.resolve()))


if __name__ == "__main__":
    main()
