"""Training a week's model from last week's, compared with training from scratch, on Diginetica.

    python -m benchmarks.fresh_models --raw DIGINETICA [--seeds 42 43] [--output FILE]

DIGINETICA holds train_sessions.txt.gz and train_dates_derived.txt.gz (a session and a date per
line, in order of time) and test_sessions.txt.gz. The older dataset ends with 13 May 2016, the newer
one with 20 May; each is validated on the sessions that follow (7,830 of them), and the newer one is
tested on the last week. All runs of a seed share their settings.
"""

from __future__ import annotations

import gzip
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import parser
from tron_cli.api.settings import load_config
from tron_cli.api.training import TrainingResult, train
from tron_cli.checkpoint import load_checkpoint
from tron_cli.data.dataset import Dataset
from tron_cli.evaluation.evaluate import EvaluationOptions, assess
from tron_cli.ops.device import chosen_device
from tron_cli.prepare.sources.sequences import prepare_sequences

LATER_THAN = {"older": "2016-05-14", "newer": "2016-05-21"}  # the first day after training
VALIDATION = 7_830  # sessions
RUNS = ("from scratch", "from last week's model")
SHARES = (0.95, 0.99, 1.0)  # of the best figure of training from scratch
SETTINGS: dict[str, Any] = {
    "positions": "start",
    "score": "dot",
    "embedding_dim": 64,
    "dropout_rate": 0.2,
    "num_uniform_negatives": 1024,
    "topk_sampling": False,
    "lr": 1e-3,
    "max_epochs": 200,
    "max_batches_per_epoch": 200,  # steps between validations
    "early_stopping_patience": 6,
    "val_metric": "R@20",
    "metrics": ("R@20", "RR@20"),
}


def prepare(raw: Path, folder: Path) -> None:
    """Prepare FOLDER/older and FOLDER/newer."""
    sessions, days, test = (
        gzip.decompress((raw / f"{name}.txt.gz").read_bytes()).decode().splitlines()
        for name in ("train_sessions", "train_dates_derived", "test_sessions")
    )
    for name, day in LATER_THAN.items():
        end = next(line for line, date in enumerate(days) if date >= day)
        parts = {
            "train": sessions[:end],
            "val": sessions[end : end + VALIDATION],
            "test": test if name == "newer" else sessions[end + VALIDATION :],
        }
        files = {split: folder / f"{name}-{split}.txt" for split in parts}
        for split, lines in parts.items():
            files[split].write_text("\n".join(lines) + "\n")
        prepare_sequences(
            files["train"], files["test"], folder, name, val=files["val"], max_val_sessions=10**9
        )


def curve(run_dir: Path, metric: str) -> list[tuple[int, float]]:
    """Return step and figure of each validation of a run."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["validation"][metric]) for line in lines if "validation" in line]


def measure(seed: int, folder: Path) -> dict[str, Any]:
    """Train on the older dataset, then on the newer one from scratch and from these weights."""

    def run(name: str, dataset: str, init_from: Path | None = None) -> TrainingResult:
        config = load_config("config_diginetica", dataset_name=dataset, **SETTINGS)
        return train(
            config, data_dir=folder, output_dir=folder / "runs", name=f"{name}-{seed}",
            init_from=init_from, device="cpu", seed=seed,
        )  # fmt: skip

    older = run("older", "older")
    scratch, warm = run("scratch", "newer"), run("warm", "newer", older.checkpoint)
    goal = max(figure for _, figure in curve(scratch.run_dir, "R@20"))
    found: dict[str, Any] = {"seed": seed, "goal": goal, "older_step": older.step}
    origin = load_checkpoint(warm.checkpoint).origin["init_from"]
    found |= {name: origin[name] for name in ("kept_items", "new_items", "dropped_items")}
    for name, result in zip(RUNS, (scratch, warm), strict=True):
        report = assess(
            load_checkpoint(result.checkpoint), Dataset.open(folder / "newer"),
            EvaluationOptions(), chosen_device("cpu"),
        )  # fmt: skip
        found[name] = {
            "best_step": result.step,
            "best": result.metrics,
            "test": {name: figure["value"] for name, figure in report["metrics"].items()},
            "curve": curve(result.run_dir, "R@20"),
        }
    return found


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--raw", type=Path, required=True)
    options.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    arguments = options.parse_args(words)
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        prepare(arguments.raw, Path(folder))
        figures = []
        for seed in arguments.seeds:
            figures.append(measure(seed, Path(folder)))
            if arguments.output:
                content = {"settings": SETTINGS, "figures": figures}
                arguments.output.write_text(json.dumps(content) + "\n")
    print(table({"figures": figures}))


def table(content: dict[str, Any]) -> str:
    """Return the results as a table in Markdown, a line per run."""
    head = ["seed", "start", *(f"{share:.0%} of goal" for share in SHARES), "best step",
            "validation R@20", "test R@20", "test RR@20"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for each in content["figures"]:
        for name in RUNS:
            run = each[name]
            reached = (
                next(
                    (step for step, figure in run["curve"] if figure >= share * each["goal"]), None
                )
                for share in SHARES
            )
            lines.append(
                [
                    str(each["seed"]), name,
                    *("never" if step is None else f"{step:,}" for step in reached),
                    f"{run['best_step']:,}", f"{run['best']['R@20']:.4f}",
                    f"{run['test']['R@20']:.4f}", f"{run['test']['RR@20']:.4f}",
                ]
            )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
