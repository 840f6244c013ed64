"""Measured limits of this machine: matrix products, copies and gathers.

python -m benchmarks.ceilings [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.machine import circumstances
from tron_cli.ops.products import row_products
from tron_cli.text_table import format_table

SIDE = 2048  # of the square matrices: large enough for every library's best rate
COPIED = 1 << 26  # float32 values, 268 MB: far beyond any cache
GATHERED_ROWS, ROW_WIDTH = 1 << 17, 200  # rows of 800 bytes, as of a TRON table


NAMES = {
    "fp32_gflop_per_s": "float32 product, the better library, GFLOP/s",
    "fp32_mm_gflop_per_s": "float32 product, torch.mm, GFLOP/s",
    "fp32_row_products_gflop_per_s": "float32 product, tron's choice of library, GFLOP/s",
    "bf16_gflop_per_s": "bf16 product, GFLOP/s",
    "copy_gb_per_s": "copy, GB/s",
    "gather_gb_per_s": f"gather of rows of {4 * ROW_WIDTH} bytes, GB/s",
}


def measure_ceilings(
    *, side: int = SIDE, copied: int = COPIED, repeats: int = 9
) -> dict[str, float]:
    """Return the best rate of each kind in NAMES; a byte that is read and written counts twice."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    out = torch.empty(side, side)
    gflop = 2 * side**3 / 1e9
    a16, b16 = a.bfloat16(), b.bfloat16()
    out16 = torch.empty(side, side, dtype=torch.bfloat16)
    source, target = torch.ones(copied), torch.zeros(copied)
    rows = source[: copied // ROW_WIDTH * ROW_WIDTH].view(-1, ROW_WIDTH)
    ids = torch.randint(len(rows), (min(GATHERED_ROWS, len(rows)),))
    gathered = torch.empty(len(ids), ROW_WIDTH)

    def rate(amount: float, run: Callable[[], object]) -> float:
        run()
        seconds = []
        for _ in range(repeats):
            clock = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - clock)
        return amount / min(seconds)

    rates = {
        "fp32_mm_gflop_per_s": rate(gflop, lambda: torch.mm(a, b.T, out=out)),
        "fp32_row_products_gflop_per_s": rate(gflop, lambda: row_products(a, b)),
        "bf16_gflop_per_s": rate(gflop, lambda: torch.mm(a16, b16.T, out=out16)),
        "copy_gb_per_s": rate(8 * copied / 1e9, lambda: target.copy_(source)),
        "gather_gb_per_s": rate(
            8 * gathered.numel() / 1e9, lambda: torch.index_select(rows, 0, ids, out=gathered)
        ),
    }
    better = max(rates["fp32_mm_gflop_per_s"], rates["fp32_row_products_gflop_per_s"])
    return {"fp32_gflop_per_s": better, **rates}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    output = parser.parse_args(words).output
    rates = measure_ceilings()
    print(format_table(["", "best"], [[NAMES[key], f"{rates[key]:,.1f}"] for key in NAMES]))
    if output:
        content = {**circumstances(), "ceilings": rates}
        output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
