"""Neat text tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right; a rule under the header."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def evaluation_text(report: dict[str, Any]) -> str:
    """The table that `tron evaluate` prints, and under it all that the figures rest on."""
    metrics = report["metrics"]
    references = report.get("references", {})
    lost = any("value_with_lost_as_misses" in figure for figure in metrics.values())
    header = ["measure", "value", "std. error"]
    if lost:
        header.append("lost as misses")
    header += list(references)
    rows = []
    for name, figure in metrics.items():
        row = [name, f"{figure['value']:.4f}", _number(figure["stderr"])]
        if lost:
            row.append(f"{figure['value_with_lost_as_misses']:.4f}")
        row += [_number(references[reference].get(name)) for reference in references]
        rows.append(row)
    left_out = report["left_out"]
    facts = [
        f"protocol   {report['protocol']}, {report['split']} split of {report['dataset']}",
        f"ranked     {report['events']:,} events of {report['sessions']:,} sessions, "
        f"each among all {report['items']:,} items",
        f"ties       {report['tie_rule']}",
        f"positions  {report['positions']}",
        f"seen items {'filtered' if report['filter_rated'] else 'not filtered'}",
    ]
    if report["missed_because_filtered"]:
        facts.append(
            f"           {report['missed_because_filtered']:,} filtered targets are misses"
        )
    if left_out["earlier_events"]:
        facts.append(
            f"left out   {left_out['earlier_events']:,} events before the last of long sessions "
            "(--full-sessions predicts them)"
        )
    if left_out["sessions_beyond_limit"]:
        facts.append(f"left out   {left_out['sessions_beyond_limit']:,} sessions beyond the limit")
    if left_out["lost_predictions"]:
        count = f"{left_out['lost_predictions']:,} events whose item training lacks"
        where = (
            "counted as misses in the column named so"
            if lost
            else "--full-sessions also gives figures that count them as misses"
        )
        facts.append(f"left out   {count} ({where})")
    facts.append(f"checkpoint {report['checkpoint']}")
    return format_table(header, rows) + "\n\n" + "\n".join(facts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
