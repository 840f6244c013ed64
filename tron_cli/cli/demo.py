"""`tron demo`: prepare, train and evaluate on generated data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tron_cli.cli.options import DATASETS, DataDir, Overrides
from tron_cli.cli.report import evaluation_text
from tron_cli.errors import InputError, RunError
from tron_cli.files import written_aside

CONFIG = "config_synthetic.py"


def demo(
    overrides: Overrides = None,
    data_dir: DataDir = DATASETS,
    output_dir: Annotated[Path, typer.Option(help="Folder for the run and demo.json.")] = Path(
        "runs"
    ),
) -> None:
    """Prepare a generated shop, train TRON on it, and evaluate.

    This takes about two minutes on two cores. The command fails if the model stays below 90 % of
    the best possible R@20, because then something is wrong with the installation.
    """
    from tron_cli.api.evaluation import evaluate
    from tron_cli.api.training import train
    from tron_cli.config import load_config, parse_overrides
    from tron_cli.data.folder import made_with
    from tron_cli.evaluation.reference import reference_figures
    from tron_cli.prepare import summary
    from tron_cli.prepare.sources.synthetic import prepare_synthetic

    def say(command: str) -> None:
        print(f"\n$ {command}", flush=True)

    settings = ["dataset_name=demo", *(overrides or [])]
    changes = parse_overrides(settings)
    load_config(CONFIG, changes)  # refuses wrong settings before minutes of work
    say("tron prepare synthetic --name demo --force")
    options = {"seed": 42, "sessions": 80_000}
    path = data_dir / "demo"
    if path.exists() and not made_with(path, source="synthetic", options=options):
        raise InputError(
            f"{path} is a dataset of your own, which the demo would replace; rename its folder, or "
            "pass another --data-dir"
        )
    dataset = prepare_synthetic(data_dir, "demo", reference_figures, force=True, **options)
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
    reached = report["metrics"]["R@20"]["value"] / report["references"]["best"]["R@20"]
    if reached < 0.9:
        raise RunError(
            f"the model reached {reached:.0%} of the best possible R@20 instead of 90 %: this "
            "installation does not train as it should"
        )
