"""Result files as tables: one per dataset, one row for all seeds of an experiment."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.accuracy.experiments import EXPERIMENTS
from benchmarks.accuracy.runs import RESULTS

BEGIN, END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"


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
