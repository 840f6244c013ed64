"""`make bench`: every benchmark in turn; results go to benchmarks/results/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    RESULTS.mkdir(exist_ok=True)
    for module in ("training_step", "prepare_otto"):
        print(f"\n{module}", flush=True)
        output = RESULTS / f"{module}.json"
        subprocess.run(
            [sys.executable, "-m", f"benchmarks.{module}", "--output", str(output)], check=True
        )


main()
