"""Ablation in the manner of TRON's paper: negatives, sampling style, loss and top-k.

    python -m benchmarks.ablation run            # the runs without a result, in the order of RUNS
    python -m benchmarks.ablation run 16384b-ssm-top100 ce
    python -m benchmarks.ablation table          # rewrite docs/ablation.md and docs/ablation.svg

Each run is TRON's packaged configuration for Yoochoose, narrower and for two epochs, with one
choice of negatives and loss. It writes NAME.json into benchmarks/results/ablation: commands,
commit, seed, hardware, figures of the test split, peak memory, and epochs per hour. These are
hours of processor time, which other work on the machine does not change much: that of the training
without that of a training of one step per epoch, which starts and validates in the same way.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
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

RESULTS = ROOT / "benchmarks" / "results" / "ablation"
PAGE = ROOT / "docs" / "ablation.md"
PLOT = ROOT / "docs" / "ablation.svg"
BEGIN, END = "<!-- ablation: begin -->", "<!-- ablation: end -->"

DATASET = "yoochoose1_64"
CONFIG = "config_yoochoose"
EPOCHS = 2
COMMON = (
    "embedding_dim=100", "score=dot", "dropout_rate=0.05", "lr=5e-4", f"max_epochs={EPOCHS}",
)  # fmt: skip
STYLES = {"e": "eventwise", "s": "sessionwise", "b": "batchwise"}


@dataclass(frozen=True)
class Run:
    """Row of the table; topk 0: off. With loss ce all items are scored and none is drawn."""

    loss: str
    uniform: int = 0
    style: str = "b"
    in_batch: int = 0
    topk: int = 0

    @property
    def negatives(self) -> str:
        """Negatives in the paper's notation: 8192b+127s are per batch and per session."""
        if self.loss == "ce":
            return "all items"
        in_batch = f"+{self.in_batch}s" if self.in_batch else ""
        return f"{self.uniform}{self.style}{in_batch}"

    def overrides(self) -> tuple[str, ...]:
        """Return the settings that differ from the config's."""
        top = (f"topk_sampling_k={self.topk}",) if self.topk else ()
        return (
            f"loss={self.loss}",
            f"num_uniform_negatives={self.uniform}",
            f"num_batch_negatives={self.in_batch}",
            f"sampling_style={STYLES[self.style]}",
            f"topk_sampling={self.topk > 0}",
            *top,
        )


# The first are the ladder of the paper; what they leave open follows.
RUNS = {
    "1e-bce": Run("bce", 1, "e"),
    "16384b-ssm-top100": Run("ssm", 16384, "b", 127, topk=100),
    "512s-ssm": Run("ssm", 512, "s", 16),
    "8192s-ssm": Run("ssm", 8192, "s", 127),
    "8192b-ssm": Run("ssm", 8192, "b", 127),
    "16384b-ssm": Run("ssm", 16384, "b", 127),
    "512s-bce": Run("bce", 512, "s", 16),
    "8192s-bce": Run("bce", 8192, "s", 127),
    "8192s-bpr-max": Run("bpr-max", 8192, "s", 127),
    "ce": Run("ce"),
    "8192b-ssm-top100": Run("ssm", 8192, "b", 127, topk=100),
    "512b-ssm": Run("ssm", 512, "b", 16),
    "512e-ssm": Run("ssm", 512, "e", 16),
    "512s-bpr-max": Run("bpr-max", 512, "s", 16),
    "512b-bpr-max": Run("bpr-max", 512, "b", 16),
}


def run(name: str, data_dir: Path) -> Path:
    """Train and evaluate one run, and return its result file."""
    words = [
        "train", "--config", CONFIG, f"dataset_name={DATASET}", *COMMON, *RUNS[name].overrides(),
    ]  # fmt: skip
    data = ["--data-dir", str(data_dir)]
    with tempfile.TemporaryDirectory() as folder:
        where = [*data, "--output-dir", folder]
        trained, spent = measured([*words, *where, "--name", "run"])
        _, of_start = measured([*words, "max_batches_per_epoch=1", *where, "--name", "start"])
        report, _ = measured(["evaluate", trained["checkpoint"], "--full-sessions", *data])
        seed = json.loads((Path(folder) / "run" / "config.json").read_text())["seed"]
    seconds = processor_seconds(spent) - processor_seconds(of_start)
    unit = 1 if sys.platform == "darwin" else 1024
    result = {
        "experiment": name,
        "dataset": DATASET,
        "commands": [f"tron {' '.join(words)}", "tron evaluate RUN --full-sessions"],
        "commit": commit(),
        "hardware": hardware(),
        "seed": seed,
        "epochs": EPOCHS,
        "training_processor_seconds": round(seconds, 1),
        "epochs_per_hour": round(EPOCHS * 3600 / seconds, 2),
        "peak_memory_gb": round(spent.ru_maxrss * unit / 1e9, 3),
        "validation": trained["validation"],
        "test": {key: value for key, value in report.items() if key != "checkpoint"},
    }
    return write_result(RESULTS / f"{name}.json", result)


def results() -> dict[str, dict[str, Any]]:
    """Return the committed results by name, in the order of negatives, style, loss and top-k."""
    order = sorted(RUNS, key=lambda name: _order(RUNS[name]))
    files = {name: RESULTS / f"{name}.json" for name in order}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def _order(run: Run) -> tuple[bool, int, int, str, int]:
    return run.loss == "ce", run.uniform, "esb".index(run.style), run.loss, run.topk


def table() -> str:
    """Return the committed results as Markdown."""
    found = results()
    test = next(iter(found.values()))["test"]
    lines = [
        f"**{DATASET}**, {EPOCHS} epochs: {test['events']:,} test events of "
        f"{test['sessions']:,} sessions, {test['items']:,} items",
        "",
        "| negatives | loss | top-k | R@20 (std. error) | RR@20 (std. error) | epochs per hour "
        "| peak memory |",
        "|---|---|---:|---:|---:|---:|---:|",
        *(_row(RUNS[name], result) for name, result in found.items()),
    ]
    return "\n".join(lines)


def _row(run: Run, result: dict[str, Any]) -> str:
    figures = result["test"]["metrics"]
    cells = [
        run.negatives,
        run.loss,
        str(run.topk or ""),
        *(f"{figures[n]['value']:.4f} ({figures[n]['stderr']:.4f})" for n in ("R@20", "RR@20")),
        f"{result['epochs_per_hour']:.1f}",
        f"{result['peak_memory_gb']:.2f} GB",
    ]
    return "| " + " | ".join(cells) + " |"


def plot(path: Path) -> None:
    """Draw R@20 against epochs per hour into an SVG file, the same bytes for the same results."""
    import matplotlib
    from matplotlib.figure import Figure

    colours = {"ssm": "tab:blue", "bpr-max": "tab:green", "bce": "tab:red", "ce": "black"}
    markers = {"e": "^", "s": "s", "b": "o"}
    # Text as text: small files, and fonts of the reader.
    with matplotlib.rc_context({"svg.hashsalt": "ablation", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 6.5), layout="tight")
        axes = figure.subplots()
        found = results()
        places = {name: _place(result) for name, result in found.items()}
        for name, (x, y) in places.items():
            run = RUNS[name]
            axes.plot(x, y, markers[run.style], color=colours[run.loss])
            text = run.negatives + (f", top-{run.topk}" if run.topk else "")
            # On the left where another label begins close by on the right.
            crowded = any(
                1 < other / x < 1.15 and abs(up - y) < 0.01 for other, up in places.values()
            )
            offset, side = ((-6, 3), "right") if crowded else ((6, 3), "left")
            axes.annotate(text, (x, y), offset, textcoords="offset points", ha=side, fontsize=8)
        for loss in dict.fromkeys(RUNS[name].loss for name in found):
            axes.plot([], [], "o", color=colours[loss], label=loss)
        for style, marker in markers.items():
            axes.plot([], [], marker, color="grey", label=STYLES[style])
        axes.set_xscale("log")
        axes.set_xticks([20, 50, 100, 200], ["20", "50", "100", "200"])
        axes.set_xticks([30, 40, 60, 70, 80, 90], [""] * 6, minor=True)
        axes.set_xlim(18, 250)
        axes.set_xlabel("epochs per hour of processor time, one core")
        axes.set_ylabel("R@20, test")
        axes.grid(alpha=0.3, which="both")
        axes.legend(loc="lower left", fontsize=8)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _place(result: dict[str, Any]) -> tuple[float, float]:
    return result["epochs_per_hour"], result["test"]["metrics"]["R@20"]["value"]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="train and evaluate")
    run_parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}; default: all without one"
    )
    run_parser.add_argument("--data-dir", type=Path, default=ROOT / "datasets")
    commands.add_parser("table", help=f"rewrite {PAGE.name} and {PLOT.name}")
    arguments = parser.parse_args(words)
    if arguments.command == "table":
        replace_between(PAGE, BEGIN, END, table())
        plot(PLOT)
        return
    unknown = sorted(set(arguments.names) - set(RUNS))
    if unknown:
        parser.error(f"no run named {', '.join(unknown)}; there are {', '.join(RUNS)}")
    for name in arguments.names or [name for name in RUNS if name not in results()]:
        print(run(name, arguments.data_dir.resolve()), flush=True)


if __name__ == "__main__":
    main()
