"""Runs of experiments: made, resumed, checked, adopted from elsewhere; their result files."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy.experiments import Variant
from benchmarks.commands import ROOT, commit, hardware, tron, write_result
from tron_cli.config import config_from_dict, load_config
from tron_cli.errors import InputError

if TYPE_CHECKING:
    from tron_cli.checkpoint import Checkpoint

RESULTS = ROOT / "benchmarks" / "results" / "accuracy"


@dataclass(frozen=True)
class Made:
    """Finished model and how it was made.

    checkpoint: the best one of its run. validation: its figures; those of a final model are of the
    model that validation chose. runs: command, seconds and start (commit and hardware) of all runs
    that led to it, its own last, by label.
    """

    checkpoint: Checkpoint
    validation: dict[str, float]
    runs: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Workplace:
    """Folders of the prepared datasets and of the runs."""

    data_dir: Path
    output_dir: Path

    def run_dir(self, variant: Variant) -> Path:
        return self.output_dir / variant.label

    def started(self, variant: Variant) -> Path:
        """File that records the commit and the hardware of a run."""
        return self.output_dir / f"{variant.label}.started.json"

    def make(self, variant: Variant) -> Made:
        """Train, resume or mix a variant, after those that it is made of; keep a finished run."""
        from tron_cli.checkpoint import load_checkpoint
        from tron_cli.files import LAST

        run_dir, sources = self.run_dir(variant), [str(self.run_dir(s)) for s in variant.sources]
        words = ["train", *variant.settings]
        earlier = []
        if variant.final and variant.experiment.parts:  # it has the weight that validation chose
            earlier.append(self.make(variant.validated))
        earlier += [self.make(source) for source in variant.sources]
        if variant.experiment.parts:
            words = ["mix", *sources]
            if variant.final and earlier[0].checkpoint.knn is not None:
                words += ["--weight", str(earlier[0].checkpoint.knn["weight"])]
        elif variant.final:
            words = ["train", "--final", *sources]
        self.check(variant, run_dir)
        where = ["--data-dir", str(self.data_dir)]
        if not is_finished(run_dir):
            if (run_dir / LAST).exists():
                tron(["train", "--resume", str(run_dir), *where])
            else:
                self.output_dir.mkdir(parents=True, exist_ok=True)
                record = {"commit": commit(), "hardware": hardware()}
                self.started(variant).write_text(json.dumps(record))
                place = ["--output-dir", str(self.output_dir), "--name", variant.label]
                tron([*words, *where, *place])
        if not self.started(variant).exists():
            raise InputError(
                f"the commit of {run_dir} is not recorded; name the folder with --run-dir and its "
                "commit with --commit"
            )
        command = f"tron {' '.join(words)} --name {variant.label}"
        made = {
            "command": command.replace(str(self.output_dir), "runs"),
            "started": json.loads(self.started(variant).read_text()),
            "seconds": training_seconds(run_dir, variant.experiment.dataset),
        }
        runs = {label: each for source in earlier for label, each in source.runs.items()}
        checkpoint = load_checkpoint(run_dir)
        validation = earlier[0].validation if variant.final else checkpoint.metrics
        return Made(checkpoint, validation, {**runs, variant.label: made})

    def check(self, variant: Variant, run_dir: Path) -> None:
        """Raise InputError where a folder holds a run, but not one of the variant.

        Compared are the settings, the dataset, and the checkpoints that it was made of.
        """
        from tron_cli.checkpoint import dataset_identity, load_checkpoint
        from tron_cli.data.dataset import Dataset
        from tron_cli.data.integrity import sha256_of_file
        from tron_cli.files import best_checkpoint
        from tron_cli.training.validation import with_measures

        if not (run_dir / "config.json").exists():
            return
        differing = []
        if not variant.experiment.parts:  # a mixed model has the settings of its parts
            _, name, *overrides = variant.settings
            expected = asdict(with_measures(load_config(name, overrides)[0])[0])
            found = asdict(config_from_dict(json.loads((run_dir / "config.json").read_text())))
            # These are chosen when a run starts.
            chosen = ["optimizer"] * (expected["optimizer"] == "auto")
            chosen += ["max_batches_per_epoch"] * variant.final
            # A final model has a number of steps; at a constant rate the limit of epochs is
            # nothing to it.
            chosen += ["max_epochs"] * (variant.final and expected["lr_schedule"] == "constant")
            differing = [
                f"{key}={found[key]} instead of {value}"
                for key, value in expected.items()
                if found[key] != value and key not in chosen
            ]
        if is_finished(run_dir):
            checkpoint = load_checkpoint(run_dir)
            dataset = Dataset.open(self.data_dir / variant.experiment.dataset)
            if not dataset_identity(dataset).items() <= checkpoint.dataset.items():
                differing.append(f"it was trained on another version of {dataset.path}")
            made_of = re.findall(r'"sha256": "(\w+)"', json.dumps(checkpoint.origin))
            differing += [
                f"it was made of another checkpoint than that in {self.run_dir(source)}"
                for source in variant.sources
                if sha256_of_file(best_checkpoint(self.run_dir(source))) not in made_of
            ]
        if differing:
            raise InputError(
                f"{run_dir} is not a run of {variant.label}: {', '.join(differing[:5])}; name "
                "another folder, or change the experiment"
            )

    def adopt(self, variant: Variant, run_dir: Path, record: dict[str, str]) -> None:
        """Take a finished run from elsewhere for that of a variant, by a link to its folder.

        record: its commit and hardware. Raises InputError where it is not a run of the variant.
        """
        own = self.run_dir(variant)
        if variant.experiment.parts:
            raise InputError(f"{variant.label} is mixed of its parts; name the runs of these")
        missing = [s.label for s in variant.sources if not is_finished(self.run_dir(s))]
        if missing:
            raise InputError(f"{variant.label} was made of {missing[0]}; name its run first")
        if not is_finished(run_dir):
            raise InputError(
                f"{run_dir} holds no finished run; finish it with tron train --resume {run_dir}"
            )
        self.check(variant, run_dir)
        if own.exists() and not own.samefile(run_dir):
            raise InputError(f"there is a run in {own} already; name another --output-dir")
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if not own.exists():
            own.symlink_to(run_dir)
        self.started(variant).write_text(json.dumps(record))


def is_finished(run_dir: Path) -> bool:
    """Return True if a folder holds a run that has ended by itself, not by a signal."""
    from tron_cli.checkpoint import load_checkpoint
    from tron_cli.files import LAST
    from tron_cli.training.run import METRICS

    if not (run_dir / LAST).exists():
        return any(run_dir.glob("*.pt"))  # baselines and mixed models are written at once
    last = load_checkpoint(run_dir / LAST)
    if "final" in last.origin:
        return last.step == last.origin["final"]["steps"]
    config = json.loads((run_dir / "config.json").read_text())
    logged = json.loads((run_dir / METRICS).read_text().splitlines()[-1])
    epochs_without_gain = last.training["progress"]["epochs_without_gain"]
    return 0 < config["early_stopping_patience"] <= epochs_without_gain or (
        "validation" in logged and logged["epoch"] + 1 >= config["max_epochs"]
    )


def training_seconds(run_dir: Path, dataset: str) -> int:
    """Return the time between the lines of train.log, without those between two processes.

    A final run logs nothing at its end, which is then the time of its checkpoint's file.
    """
    from tron_cli.files import best_checkpoint

    lines = (run_dir / "train.log").read_text().splitlines()
    lines = [line for line in lines if re.match(r"\d{4}-\d\d-\d\d \d\d:", line)]
    times = [datetime.fromisoformat(line[:19]).timestamp() for line in lines]
    spent = sum(
        after - before
        for (before, after), line in zip(pairwise(times), lines[1:], strict=True)
        if f" on {dataset}: " not in line
    )
    checkpoint = best_checkpoint(run_dir)
    if checkpoint.stem.endswith("-final"):
        spent += max(0.0, checkpoint.stat().st_mtime - times[-1])
    return round(spent)


def run(variant: Variant, workplace: Workplace, *, test: bool = False) -> Path:
    """Train or resume, validate and, with `test`, test a variant; return its result file."""
    from tron_cli.data.dataset import Dataset
    from tron_cli.training.run import last_logged

    experiment, path = variant.experiment, RESULTS / f"{variant.label}.json"
    if path.exists() and "test" in json.loads(path.read_text()):
        raise InputError(f"{path} has test figures, which are read once; delete it to repeat")
    made = workplace.make(variant)
    where = ["--data-dir", str(workplace.data_dir)]
    # All events of long sessions, as in the published session-based figures.
    protocol = Dataset.open(workplace.data_dir / experiment.dataset).protocol
    whole = [] if protocol == "last-item" else ["--full-sessions"]

    def evaluated(*options: str) -> dict[str, Any]:
        report = tron(["evaluate", str(made.checkpoint.path), *options, *where])
        return {key: value for key, value in report.items() if key != "checkpoint"}

    evaluate = " ".join(["tron evaluate", f"runs/{variant.label}", *whole])
    result = {
        "experiment": variant.name,
        "final": variant.final,
        "dataset": experiment.dataset,
        "title": experiment.title,
        "commands": [*(each["command"] for each in made.runs.values()), evaluate],
        **made.runs[variant.label]["started"],
        "runs": {label: each["started"] for label, each in made.runs.items()},
        "seed": variant.seed,
        "training_seconds": sum(each["seconds"] for each in made.runs.values()),
        "steps": last_logged(workplace.run_dir(variant))[0],
        "best_checkpoint": made.checkpoint.path.name,
        "protocol": protocol,
        "validation": made.validation,
    }
    if test:
        result["test"] = evaluated(*whole)
        if experiment.one_pass:
            result["test_one_pass"] = evaluated("--one-pass")
    return write_result(path, result)
