"""Train and evaluate on real data, and write the accuracy tables of docs/results.md.

    python -m benchmarks.accuracy run diginetica-tron-start            # validation figures
    python -m benchmarks.accuracy run diginetica-tron-start --final --seed 42 43 44 --test
    python -m benchmarks.accuracy run NAME --run-dir RUN --commit HASH # a finished run of NAME
    python -m benchmarks.accuracy table                                # rewrite the tables

A model is trained into --output-dir, on a dataset that was prepared into --data-dir, and writes
NAME[-final][-seed=N].json into benchmarks/results/accuracy: commands, commit, seed, hardware,
figures. A run that was broken off is resumed. The test split is read with --test alone, once: for
the configuration to report, which validation has chosen.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tron_cli.config import config_from_dict, load_config
from tron_cli.errors import InputError
from tron_cli.registry import BASELINES

if TYPE_CHECKING:
    from tron_cli.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
BEGIN, END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"
SEED = 42  # of the files without a seed in their names


@dataclass(frozen=True)
class Experiment:
    """Row of the table: a packaged config and the overrides, or the parts of a mixed model.

    parts: experiments to mix, each with the seed of the mixed model or, as in NAME-seed=43, its
    own. one_pass: also read the test split in one pass, as TRON does.
    """

    dataset: str
    title: str
    config: str = ""
    overrides: tuple[str, ...] = ()
    one_pass: bool = False
    parts: tuple[str, ...] = ()


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


_BASELINES = {
    "session_knn": "session-kNN (V-SKNN)",
    "markov": "first-order Markov",
    "session_popular": "most popular in the session",
    "popular": "most popular",
}


def _with_knn(dataset: str, config: str, dropouts: dict[str, str]) -> dict[str, Experiment]:
    """Return the baselines, TRON with cosines, and mixtures with session-kNN.

    dropouts: what follows the name of a network, and its dropout; "" is the config's. The last two
    networks are also joined.
    """
    common, knn = f"dataset_name={dataset}", f"{dataset}-session_knn"
    found = {
        f"{dataset}-{model}": Experiment(dataset, title, config, (common, f"model={model}"))
        for model, title in _BASELINES.items()
    }
    for suffix, rate in dropouts.items():
        name = f"{dataset}-tron-cosine{suffix}"
        title = f"TRON, cosine, dropout {rate}" if rate else "TRON, cosine"
        changes = (f"dropout_rate={rate}",) if rate else ()
        found[name] = Experiment(dataset, title, config, (common, *_COSINE, *changes))
        found[f"{name}-knn"] = Experiment(dataset, f"{title} + session-kNN", parts=(name, knn))
    two = tuple(f"{dataset}-tron-cosine{suffix}" for suffix in dropouts)[-2:]
    title = "TRON, cosine, dropout 0.2 and 0.4"
    found[f"{dataset}-tron-cosine-two"] = Experiment(dataset, title, parts=two)
    found[f"{dataset}-tron-cosine-two-knn"] = Experiment(
        dataset, f"{title}, + session-kNN", parts=(*two, knn)
    )
    return found


def _classics(dataset: str, config: str) -> dict[str, Experiment]:
    """Return the other networks, in their packaged configurations where there is one.

    Those that learn more slowly than TRON have more epochs, which patience ends.
    """
    common, longer = f"dataset_name={dataset}", "max_epochs=30"
    ce = (common, *_CE, "lr=1e-3", longer)
    return {
        # Half the learning rate of TRON's paper, as in benchmarks/field.py.
        f"{dataset}-gru4rec": Experiment(
            dataset, "GRU4Rec+, BPR-max", f"{config}_gru4rec", (common, "lr=0.1", "max_epochs=10")
        ),
        f"{dataset}-bert4rec": Experiment(
            dataset, "BERT4Rec, cross-entropy", f"{config}_bert4rec", (common, longer)
        ),
        f"{dataset}-recbole": Experiment(
            dataset, "SASRec as RecBole has it", f"{config}_recbole", (common, longer)
        ),
        f"{dataset}-gsasrec": Experiment(
            dataset, "gSASRec, gBCE, 16 negatives", f"{config}_gsasrec", (common, longer)
        ),
        f"{dataset}-sasrec-ce": Experiment(dataset, "SASRec, cross-entropy", config, ce),
        f"{dataset}-sasrec-ce-cosine": Experiment(
            dataset, "SASRec, cross-entropy, cosine", config, (*ce, *_COSINE)
        ),
    }


def _beauty(dataset: str) -> dict[str, Experiment]:
    common = f"dataset_name={dataset}"
    tron = (common, "sequence_length=50", "dropout_rate=0.5", "train_batch_size=128")
    bsarec, knn = "config_beauty_bsarec", f"{dataset}-session_knn"
    networks = {
        "bsarec": ("BSARec", bsarec, (common,)),
        "bsarec-cosine": ("BSARec, cosine", bsarec, (common, *_COSINE)),
        # The other settings of RecBole's SASRec are BSARec's too.
        "recbole": (
            "SASRec as RecBole has it", bsarec,
            (common, "block=post-norm", "num_heads=2", "positions=start", "training_windows=last",
             "lr=1e-3"),
        ),
        # As published for Beauty 5-core: one wide layer.
        "esasrec": (
            "eSASRec, 256 negatives", "config_ml1m",
            (common, "block=ligr", "activation=swiglu", "embedding_dim=256",
             "feed_forward_dim=1024", "num_blocks=1", "positions=end", "sequence_length=50",
             "num_uniform_negatives=256", "sampling_style=eventwise", "train_batch_size=128",
             "max_epochs=200"),
        ),
        "tron": ("TRON", "config_ml1m", tron),
        "tron-cosine": ("TRON, cosine", "config_ml1m", (*tron, *_COSINE)),
        "sasrec-ce-cosine": (
            "SASRec, cross-entropy, cosine", "config_ml1m",
            (*tron, "loss=ce", "num_uniform_negatives=0", *_COSINE),
        ),
        "session_knn": (_BASELINES["session_knn"], bsarec, (common, "model=session_knn")),
    }  # fmt: skip
    joined = {
        "bsarec-knn": ("BSARec + session-kNN", ("bsarec",)),
        "tron-cosine-knn": ("TRON, cosine + session-kNN", ("tron-cosine",)),
        "bsarec-two-knn": ("BSARec, dot and cosine, + session-kNN", ("bsarec", "bsarec-cosine")),
    }
    return {
        **{f"{dataset}-{name}": Experiment(dataset, *given) for name, given in networks.items()},
        **{
            f"{dataset}-{name}": Experiment(
                dataset, title, parts=(*(f"{dataset}-{part}" for part in parts), knn)
            )
            for name, (title, parts) in joined.items()
        },
    }


_CE = ("loss=ce", "num_uniform_negatives=0", "num_batch_negatives=0", "topk_sampling=false")
_COSINE = ("score=cosine", "score_scale=14")

# SASRec's own block with cross-entropy, as in arXiv 2309.07602.
_SASREC = (
    "dataset_name=ml1m_all", "model=gsasrec", "train_batch_size=128", "positions=end",
    "initialization=normal", "reuse_item_embeddings=true", "num_heads=1",
)  # fmt: skip
_SASREC_CE = (*_SASREC, "loss=ce", "num_uniform_negatives=0")
# What validation chose for it, beside random windows of long histories.
_LONGER = (
    "early_stopping_patience=15", "dropout_rate=0.2", "lr=0.002", "lr_schedule=cosine",
    "training_windows=random", "ema_decay=0.999", "weight_decay=0.01", "precision=bf16",
)  # fmt: skip

EXPERIMENTS = {
    # A week of sessions overfits at TRON's dropout: 0.4 is better than 0.05 on validation, for
    # SASRec too.
    **_session_experiments("yoochoose_100k", "yoochoose", "dropout_rate=0.4"),
    **_session_experiments("yoochoose1_64", "yoochoose"),
    **_with_knn(
        "yoochoose1_64", "config_yoochoose",
        {"": "", "-dropout=0.2": "0.2", "-dropout=0.4": "0.4"},
    ),
    **_classics("yoochoose1_64", "config_yoochoose"),
    # Diginetica has too many items for it.
    "yoochoose1_64-ease": Experiment(
        "yoochoose1_64", "EASE", "config_yoochoose",
        ("dataset_name=yoochoose1_64", "model=ease"),
    ),
    **_session_experiments("diginetica", "diginetica"),
    **_with_knn("diginetica", "config_diginetica", {"": "", "-dropout": "0.4"}),
    **_classics("diginetica", "config_diginetica"),
    "ml1m-tron-end": Experiment("ml1m", "TRON, positions=end", "config_ml1m", ("positions=end",)),
    "ml1m-tron-start": Experiment(
        "ml1m", "TRON, positions=start", "config_ml1m", ("positions=start",)
    ),
    "ml1m-sasrec": Experiment("ml1m", "SASRec, BCE, 1 negative", "config_ml1m_sasrec"),
    # tron prepare ml1m --val-users all --name ml1m_all
    "ml1m_all-sasrec-ce": Experiment(
        "ml1m_all", "SASRec, cross-entropy", "config_ml1m",
        (*_SASREC_CE, "dropout_rate=0.1", "key_padding_mask=false", "max_epochs=100",
         "early_stopping_patience=8"),
    ),
    "ml1m_all-sasrec-ce-long": Experiment(
        "ml1m_all", "SASRec, cross-entropy, long training", "config_ml1m",
        (*_SASREC_CE, *_LONGER, "key_padding_mask=false", "max_epochs=120"),
    ),
    "ml1m_all-sasrec-ce-relative": Experiment(
        "ml1m_all", "SASRec, cross-entropy, relative positions", "config_ml1m",
        (*_SASREC_CE, *_LONGER, "relative_positions=true", "max_epochs=80"),
    ),
    "ml1m_all-sasrec-ce-two": Experiment(
        "ml1m_all", "SASRec, long training and relative positions, joined",
        parts=("ml1m_all-sasrec-ce-long", "ml1m_all-sasrec-ce-relative"),
    ),
    # The setting of arXiv 2309.07602, which compares it with cross-entropy.
    "ml1m_all-sasrec-bce": Experiment(
        "ml1m_all", "SASRec, BCE, 1 negative", "config_ml1m",
        (*_SASREC, "loss=bce", "num_uniform_negatives=1", "sampling_style=eventwise",
         "reject_uniform_session_items=true", "dropout_rate=0.1", "key_padding_mask=false",
         "max_epochs=300", "early_stopping_patience=20"),
    ),
    "ml1m_all-gsasrec": Experiment(
        "ml1m_all", "gSASRec, gBCE, 256 negatives", "config_ml1m_gsasrec",
        ("dataset_name=ml1m_all",),
    ),
    # The published run has 86,064 steps.
    "ml1m_all-gsasrec-short": Experiment(
        "ml1m_all", "gSASRec, gBCE, 256 negatives, 25,000 steps", "config_ml1m_gsasrec",
        ("dataset_name=ml1m_all", "max_epochs=250", "lr_schedule=cosine"),
    ),
    "ml1m_all-bert4rec": Experiment(
        "ml1m_all", "BERT4Rec, cross-entropy", "config_ml1m_bert4rec", ("dataset_name=ml1m_all",)
    ),
    # RecTools' defaults, with which its figures were published.
    "ml1m_all-bert4rec-rectools": Experiment(
        "ml1m_all", "BERT4Rec as RecTools has it", "config_ml1m_bert4rec",
        ("dataset_name=ml1m_all", "block=pre-norm", "initialization=default",
         "mask_probability=0.15", "sequence_length=100", "embedding_dim=256",
         "feed_forward_dim=1024", "num_heads=4", "dropout_rate=0.2"),
    ),
    # tron prepare sequences, as config_beauty_bsarec says; of BERT4Rec's file with
    # --lines user-item --name beauty_bert4rec
    **_beauty("beauty"),
    **_beauty("beauty_bert4rec"),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """An experiment with one seed: the model that validation chose, or its final model."""

    name: str
    seed: int = SEED
    final: bool = False

    @property
    def label(self) -> str:
        """Name of its run's folder and of its result file."""
        seed = "" if self.seed == SEED else f"-seed={self.seed}"
        return f"{self.name}{'-final' * self.final}{seed}"

    @property
    def experiment(self) -> Experiment:
        return EXPERIMENTS[self.name]

    @property
    def validated(self) -> Variant:
        return replace(self, final=False)

    @property
    def settings(self) -> list[str]:
        seed = [] if self.seed == SEED else [f"seed={self.seed}"]
        return ["--config", self.experiment.config, *self.experiment.overrides, *seed]

    @property
    def sources(self) -> list[Variant]:
        """Models whose checkpoints it is made of; a baseline has no seed."""
        if not self.experiment.parts:
            return [self.validated] * self.final
        found = []
        for part in self.experiment.parts:
            name, _, seed = part.partition("-seed=")
            is_baseline = any(f"model={each}" in EXPERIMENTS[name].overrides for each in BASELINES)
            found.append(Variant(name, SEED if is_baseline else int(seed or self.seed), self.final))
        return found


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
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def table() -> str:
    """Return the committed results as Markdown: one table per dataset."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    known = [experiment.dataset for experiment in EXPERIMENTS.values()]
    blocks = []
    for dataset in dict.fromkeys([*known, *(result["dataset"] for result in results)]):
        found = [result for result in results if result["dataset"] == dataset]
        if found:
            blocks.append(_dataset_table(dataset, found))
    return "\n\n".join(blocks)


def _dataset_table(dataset: str, results: list[dict[str, Any]]) -> str:
    tests = [result["test"] for result in results if "test" in result]
    protocol = tests[0]["protocol"] if tests else results[0]["protocol"]
    shown = ("R@10", "nDCG@10") if protocol == "last-item" else ("R@20", "RR@20")
    title, lost = f"**{dataset}**: {protocol}", 0
    if tests:
        lost = tests[0]["left_out"]["lost_predictions"]
        title += (
            f", {tests[0]['events']:,} test events of {tests[0]['sessions']:,} sessions, "
            f"{tests[0]['items']:,} items, "
            f"{'seen items' if tests[0]['filter_rated'] else 'nothing'} filtered"
        )
    header = [
        "model",
        *(f"{name} (std. error)" for name in shown),
        *((f"{name}, lost as misses" for name in shown) if lost else ()),
        f"validation {shown[0]}", "steps", "hours", "seeds", "commit",
    ]  # fmt: skip
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for result in results:
        key = result["experiment"], result.get("final", False)
        groups.setdefault(key, []).append(result)
    # A row is of the seeds that were tested, unless none was.
    rows = [[each for each in group if "test" in each] or group for group in groups.values()]
    rows.sort(key=lambda row: _place(row, shown[1]))
    lines = [title, "", f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    commands: dict[str, None] = {}
    for row in rows:
        lines += (f"| {' | '.join(cells)} |" for cells in _cells(row, shown, bool(lost)))
        first = min(row, key=lambda result: result["seed"])
        commands |= dict.fromkeys(first["commands"][:-1])
    return "\n".join([*lines, "", *(f"- `{command}`" for command in commands)])


def _place(row: list[dict[str, Any]], measure: str) -> tuple[bool, float]:
    """Return the key by which rows are sorted: by test figures, then by those of validation."""
    tested = "test" in row[0]
    values = (
        each["test"]["metrics"][measure]["value"] if tested else each["validation"][measure]
        for each in row
    )  # fmt: skip
    return not tested, -statistics.mean(values)


def _cells(row: list[dict[str, Any]], shown: Sequence[str], lost: bool) -> Iterator[list[str]]:
    """Yield the cells of an experiment's line and, where it was tested in one pass, of another."""
    title = row[0]["title"] + ", final" * row[0].get("final", False)
    seconds, steps = ([each[key] for each in row] for key in ("training_seconds", "steps"))
    described = [
        _mean([each["validation"][shown[0]] for each in row]),
        f"{statistics.mean(steps):,.0f}" if any(steps) else "",
        "" if None in seconds else f"{statistics.mean(seconds) / 3600:.2f}",
        ", ".join(str(seed) for seed in sorted(each["seed"] for each in row)),
        ", ".join(dict.fromkeys(f"`{each['commit'][:9]}`" for each in row)),
    ]
    for kind, suffix in (("test", ""), ("test_one_pass", ", one pass")):
        tests = [each[kind]["metrics"] for each in row if kind in each]
        if suffix and not tests:
            continue
        figures = [[test[name] for test in tests] for name in shown]
        cells = [
            _mean([each["value"] for each in every], [each["stderr"] for each in every])
            for every in figures
        ]
        if lost:
            key = "value_with_lost_as_misses"
            cells += [_mean([each[key] for each in every if key in each]) for every in figures]
        yield [title + suffix, *cells, *([""] * len(described) if suffix else described)]


def _mean(values: list[float], stderr: Sequence[float] = ()) -> str:
    """Return the one value with its standard error, or the mean and spread of several."""
    if len(values) > 1:
        return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
    return "–" if not values else f"{values[0]:.4f}" + "".join(f" ({each:.4f})" for each in stderr)


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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="train and validate; test with --test")
    run_parser.add_argument("experiments", nargs="+", choices=EXPERIMENTS, metavar="NAME")
    run_parser.add_argument("--seed", type=int, nargs="+", default=[SEED])
    run_parser.add_argument(
        "--final", action="store_true", help="train on the validation sessions too, afterwards"
    )
    run_parser.add_argument("--test", action="store_true", help="read the test split")
    run_parser.add_argument("--run-dir", type=Path, help="finished run of the experiment")
    run_parser.add_argument("--commit", help="of --run-dir")
    run_parser.add_argument("--hardware", help="of --run-dir; default: this machine's")
    run_parser.add_argument("--data-dir", type=Path, default=ROOT / "datasets")
    run_parser.add_argument("--output-dir", type=Path, default=ROOT / "runs")
    commands.add_parser("table", help="rewrite the tables of docs/results.md")
    given = parser.parse_args(arguments)
    if given.command == "table":
        replace_between(ROOT / "docs" / "results.md", BEGIN, END, table())
        return
    workplace = Workplace(given.data_dir.resolve(), given.output_dir.resolve())
    variants = [
        Variant(name, seed, given.final) for name in given.experiments for seed in given.seed
    ]
    try:
        if given.run_dir is not None:
            if len(variants) != 1 or given.commit is None:
                raise InputError(
                    "--run-dir needs one NAME, one --seed, and the --commit of the run"
                )
            record = {"commit": given.commit, "hardware": given.hardware or hardware()}
            workplace.adopt(variants[0], given.run_dir.resolve(), record)
        for variant in variants:
            print(run(variant, workplace, test=given.test))
    except InputError as error:
        run_parser.error(str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # tron has said why


if __name__ == "__main__":
    main()
