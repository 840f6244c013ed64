"""Effect of a change of the training step on accuracy: seeds before it and after it.

    python -m benchmarks.same_accuracy FOLDER --before "COMMAND" --after "COMMAND"

FOLDER holds what `tron evaluate RUN --json` printed for each run, as before-DATASET-SEED.eval.json
and after-DATASET-SEED.eval.json. The difference of two means over seeds has the standard error
sqrt(s1^2 / n1 + s2^2 / n2). Writes benchmarks/results/same_accuracy.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from tron_cli.text_table import format_table

RESULT = Path(__file__).parent / "results" / "same_accuracy.json"
SUFFIX = ".eval.json"


def compare(folder: Path) -> list[dict[str, Any]]:
    """Return figures by seed, means, difference and standard error of each dataset and measure."""
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(
        lambda: {"before": {}, "after": {}}
    )
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        side, dataset, seed = path.name.removesuffix(SUFFIX).split("-")
        for measure, figure in json.loads(path.read_text())["metrics"].items():
            found[dataset, measure][side][seed] = figure["value"]
    rows = []
    for (dataset, measure), sides in found.items():
        before, after = list(sides["before"].values()), list(sides["after"].values())
        error = math.sqrt(sum(statistics.variance(side) / len(side) for side in (before, after)))
        rows.append(
            {
                "dataset": dataset,
                "measure": measure,
                **sides,
                "mean_before": statistics.mean(before),
                "mean_after": statistics.mean(after),
                "standard_error": error,
            }
        )
    return rows


def main(words: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path)
    options.add_argument("--before", required=True, help="commit and commands of the runs before")
    options.add_argument("--after", required=True, help="commit and commands of the runs after")
    options.add_argument("--hardware", required=True)
    options.add_argument("--output", type=Path, default=RESULT)
    arguments = options.parse_args(words)
    rows = compare(arguments.folder)
    content = {name: getattr(arguments, name) for name in ("before", "after", "hardware")}
    arguments.output.write_text(json.dumps({**content, "figures": rows}, indent=2) + "\n")
    shown = []
    for row in rows:
        difference = row["mean_after"] - row["mean_before"]
        shown.append(
            [row["dataset"], row["measure"], f"{row['mean_before']:.4f}",
             f"{row['mean_after']:.4f}", f"{difference:+.4f}", f"{row['standard_error']:.4f}"]
        )  # fmt: skip
    print(
        format_table(
            ["data set", "measure", "before", "after", "difference", "its std. error"], shown
        )
    )


if __name__ == "__main__":
    main()
