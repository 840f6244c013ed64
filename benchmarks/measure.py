"""Timing in turns, and the figures that result."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceilings import measure_ceilings
from benchmarks.machine import circumstances, ordinary_pages
from tron_cli.text_table import format_table

REFERENCE = "reference"


@dataclass(frozen=True)
class Work:
    """Requirements of a timed piece of work, on either side.

    gflop, gb: arithmetic, and memory that must move; None where it is not a useful measure.
    events: predictions made, for a rate; None where seconds are the figure.
    """

    gflop: float | None = None
    gb: float | None = None
    events: int | None = None


def in_turns(
    sides: Mapping[str, Callable[..., object]],
    works: Iterable[tuple[Any, ...]],
    *,
    times: Mapping[str, int] | None = None,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Time each side on each piece of work (its arguments), without the first `warm_up`.

    The side named REFERENCE has the originals' kind of memory, `ordinary_pages`.
    times: how often in a row a side does it, once by default. A quick side takes several turns at
    once, as it would in use, or it would always begin with the other's data in the caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for count, work in enumerate(works):
        for name, side in sides.items():
            with ordinary_pages() if name == REFERENCE else nullcontext():
                for _ in range((times or {}).get(name, 1)):
                    _wait()
                    clock = time.perf_counter()
                    side(*work)
                    _wait()
                    if count >= warm_up:
                        seconds[name].append(time.perf_counter() - clock)
    return seconds


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def figure(
    what: str,
    tron: list[float],
    reference: list[float] | None = None,
    *,
    work: Work | None = None,
    **details: Any,
) -> dict[str, Any]:
    """Return a line of the table: medians, their ratio, the minima, and the rates reached."""
    work = work or Work()
    seconds = statistics.median(tron)
    line: dict[str, Any] = {"what": what, "tron_s": seconds, "tron_least_s": min(tron)}
    if reference:
        other = statistics.median(reference)
        line |= {
            "reference_s": other,
            "reference_least_s": min(reference),
            "ratio": other / seconds,
        }
    if work.events:
        line |= {"events": work.events, "events_per_s": work.events / seconds}
        if reference:
            line["reference_events_per_s"] = work.events / line["reference_s"]
    if work.gflop:
        line["gflop_per_s"] = work.gflop / seconds
    if work.gb:
        line["gb_per_s"] = work.gb / seconds
    return line | {"repeats": len(tron)} | details


def table(figures: list[dict[str, Any]], ceilings: dict[str, float]) -> str:
    """Format the figures; rates are compared with the machine's own where it was measured."""
    header = ["", "tron", "reference", "ratio", "GFLOP/s", "GB/s"]
    rows = []
    for line in figures:
        rate = "events_per_s" in line
        tron, reference = (
            (line["events_per_s"], line.get("reference_events_per_s"))
            if rate
            else (line["tron_s"], line.get("reference_s"))
        )
        rows.append(
            [
                line["what"],
                _shown(tron, rate),
                _shown(reference, rate),
                f"{line['ratio']:.1f}x" if "ratio" in line else "",
                _beside(line.get("gflop_per_s"), ceilings.get(line.get("ceiling", ""))),
                _beside(line.get("gb_per_s"), ceilings.get("copy_gb_per_s")),
            ]
        )
    return format_table(header, rows)


def _shown(value: float | None, rate: bool) -> str:
    if value is None:
        return ""
    return f"{value:,.0f} events/s" if rate else f"{value:.3f} s"


def _beside(value: float | None, ceiling: float | None) -> str:
    if value is None:
        return ""
    shown = f"{value:,.1f}" if value < 10 else f"{value:,.0f}"
    return shown if not ceiling else f"{shown} ({value / ceiling:.0%})"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    assert doc is not None
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--output", type=Path, help="write the results as JSON")
    return made


def report(figures: list[dict[str, Any]], output: Path | None, **more: Any) -> dict[str, Any]:
    """Print the table, and write figures, ceilings and circumstances to `output`."""
    measured = measure_ceilings()
    content = {**circumstances(), "ceilings": measured, **more, "figures": figures}
    print(table(figures, measured), flush=True)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(content, indent=2) + "\n")
    return content
