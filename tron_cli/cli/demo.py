"""`tron demo`: prepare, train and evaluate on generated data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tron_cli.cli.options import DATASETS, DataDir, Overrides, given_path
from tron_cli.cli.report import evaluation_text
from tron_cli.errors import InputError, RunError
from tron_cli.files import written_aside
from tron_cli.text_table import format_table

if TYPE_CHECKING:
    from tron_cli.data.dataset import Dataset

CONFIG = "config_synthetic.py"
HISTORY = 4  # events of the visitor that is shown
SHOWN = 10  # recommended items


def demo(
    overrides: Overrides = None,
    data_dir: DataDir = DATASETS,
    output_dir: Annotated[
        Path,
        typer.Option(parser=given_path, metavar="PATH", help="Folder for the run and demo.json."),
    ] = Path("runs"),
) -> None:
    """Prepare a generated shop, train TRON on it, and evaluate.

    This takes about two minutes on two cores. The command fails if the model stays below 90 % of
    the best possible R@20, because then something is wrong with the installation.
    """
    from tron_cli.api.evaluation import evaluate
    from tron_cli.api.preparation import prepare
    from tron_cli.api.training import train
    from tron_cli.config import load_config, parse_overrides
    from tron_cli.data.folder import made_with
    from tron_cli.prepare import summary

    def say(command: str) -> None:
        print(f"\n$ {command}", flush=True)

    settings = ["dataset_name=demo", *(overrides or [])]
    changes = parse_overrides(settings)
    load_config(CONFIG, changes)  # to refuse wrong settings before minutes of work
    say("tron prepare synthetic --name demo --force")
    options = {"seed": 42, "sessions": 80_000}
    path = data_dir / "demo"
    if path.exists() and not made_with(path, source="synthetic", options=options):
        raise InputError(
            f"{path} is a dataset of your own, which the demo would replace; rename its folder, or "
            "pass another --data-dir"
        )
    dataset = prepare("synthetic", data_dir=data_dir, name="demo", force=True, **options)
    summary.print_summary(dataset)
    say(f"tron train --config {CONFIG} {' '.join(settings)}")
    trained = train(CONFIG, data_dir=data_dir, output_dir=output_dir, **changes)
    best = trained.checkpoint
    print(best)
    say(f"tron evaluate {best}")
    report = evaluate(best, data_dir=data_dir).report
    print(evaluation_text(report))
    references = {
        name: {measure: {"value": value} for measure, value in figures.items()}
        for name, figures in report["references"].items()
    }
    with written_aside(output_dir / "demo.json") as file:
        json.dump({"model": report["metrics"], **references}, file, indent=2)
    print(f"\nresults: {output_dir / 'demo.json'}")
    _show_a_visitor(best, dataset, options["seed"])
    reached = report["metrics"]["R@20"]["value"] / report["references"]["best"]["R@20"]
    if reached < 0.9:
        raise RunError(
            f"the model reached {reached:.0%} of the best possible R@20 instead of 90 %: this "
            "installation does not train as it should"
        )


def _show_a_visitor(checkpoint: Path, dataset: Dataset, seed: int) -> None:
    """Print recommendations after the start of a test session beside the shop's probabilities."""
    import numpy as np

    from tron_cli.prepare.sources.synthetic import next_item_probabilities
    from tron_cli.serving.recommender import Recommender

    sessions = dataset.split("test")
    visit = sessions[int(np.argmax(sessions.lengths > HISTORY))]
    history, following = visit[:HISTORY], visit[HISTORY]
    probability_I = next_item_probabilities(seed, history)
    place_I = np.empty(len(probability_I), np.int64)
    place_I[np.argsort(-probability_I, kind="stable")] = np.arange(1, len(probability_I) + 1)
    words = " ".join(map(str, dataset.item_ids[history - 1]))
    print(f'\n$ tron recommend {checkpoint} --history "{words}" -k {SHOWN}')
    recommender = Recommender.load(checkpoint)
    (found,) = recommender.recommend([dataset.item_ids[history - 1].tolist()], k=SHOWN)
    rows, held = [], 0.0
    for place, (item, score) in enumerate(zip(found.items, found.scores, strict=True), start=1):
        index = int(np.flatnonzero(recommender.item_ids == item)[0])
        held += probability_I[index]
        probability = f"{probability_I[index]:.4f}"
        rows.append([f"{place}", f"{item}", f"{score:.2f}", probability, f"{place_I[index]:,}"])
    header = ["place", "item", "score", "true probability", "true place"]
    print(f"{format_table(header, rows)}\n")
    print(
        f"The visitor went on to item {dataset.item_ids[following - 1]}. By the shop's known "
        f"transitions, the next item is among these {SHOWN} with probability {held:.2f}; among the "
        f"{SHOWN} most probable items it is with {np.sort(probability_I)[-SHOWN:].sum():.2f}."
    )
