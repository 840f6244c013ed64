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
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy.experiments import EXPERIMENTS, SEED, Variant
from benchmarks.accuracy.runs import Workplace, run
from benchmarks.accuracy.table import BEGIN, END, table
from benchmarks.commands import ROOT, hardware, replace_between
from tron_cli.errors import InputError


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0]
    )
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
