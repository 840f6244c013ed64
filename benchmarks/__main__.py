"""`make bench`: every benchmark in turn; results go to benchmarks/results/, a table is printed.

python -m benchmarks [--full] [NAME ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import table

RESULTS = Path(__file__).parent / "results"
NAMES = ("ceilings", "training_step", "gsasrec_step", "cross_entropy", "evaluation", "prepare_otto",
         "startup", "checkpoint")  # fmt: skip


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run the benchmarks, each in its own process.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--full", action="store_true", help="more steps, all lengths at all sizes")
    arguments = parser.parse_args(words)
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(NAMES)}")
    RESULTS.mkdir(exist_ok=True)
    for name in arguments.names or NAMES:
        print(f"\n{name}", flush=True)
        full = ["--full"] if arguments.full and name == "training_step" else []
        command = [sys.executable, "-m", f"benchmarks.{name}", *full,
                   "--output", str(RESULTS / f"{name}.json")]  # fmt: skip
        subprocess.run(command, check=True)
    print("\n" + summary())


def summary() -> str:
    """Return one table of all results in benchmarks/results/."""
    figures: list[dict[str, Any]] = []
    ceilings: dict[str, float] = {}
    for name in NAMES:
        file = RESULTS / f"{name}.json"
        if not file.exists():
            continue
        content = json.loads(file.read_text())
        ceilings |= content.get("ceilings", {}) if not ceilings else {}
        figures += preparation(content) if name == "prepare_otto" else content.get("figures", [])
    return table(figures, ceilings)


def preparation(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the largest of the preparation's runs, in the form of the other figures."""
    largest = content["prepare"][-1]
    seconds = largest["mb"] / largest["mb_per_s"]
    ratio = largest["times_as_tron_does"]["mb_per_s"]
    return [
        {
            "what": f"prepare otto, {largest['mb']:,.0f} MB, {largest['mb_per_s']:,.0f} MB/s, "
            f"peak {largest['peak_memory_mb']:,.0f} MB",
            "tron_s": seconds,
            "reference_s": seconds * ratio,
            "ratio": ratio,
        }
    ]


if __name__ == "__main__":
    main()
