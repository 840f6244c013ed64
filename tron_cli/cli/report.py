"""Reports of `tron evaluate` and `tron compare` as text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tron_cli.errors import counted
from tron_cli.text_table import format_table


def evaluation_text(report: dict[str, Any]) -> str:
    """Return the table of `tron evaluate`, followed by lines on what its figures are based on."""
    metrics = report["metrics"]
    references = report.get("references", {})
    lost = any("value_with_lost_as_misses" in figure for figure in metrics.values())
    header = ["measure", "value", "std. error"]
    if lost:
        header += ["lost as misses", "std. error"]
    header += list(references)
    rows = []
    for name, figure in metrics.items():
        row = [name, f"{figure['value']:.4f}", _number(figure["stderr"])]
        if lost:
            row += [_number(figure[f"{key}_with_lost_as_misses"]) for key in ("value", "stderr")]
        row += [_number(references[reference].get(name)) for reference in references]
        rows.append(row)
    lost_note = "--full-sessions also gives figures that count these as misses"
    if lost:
        lost_note = "counted as misses in the column of that name"
        if all(figure["stderr_with_lost_as_misses"] is None for figure in metrics.values()):
            lost_note += "; for its error, prepare the dataset again"
    tables = [format_table(header, rows)]
    facts = _facts(report, f" ({lost_note})")
    for kind, sliced in report.get("slices", {}).items():
        tables.append(_slices_table(kind, sliced["slices"]))
        facts.append(f"{kind.ljust(10)} {sliced['definition']}")
    if "beyond_accuracy" in report:
        shown = [
            [key.replace("_", " "), _styled(value, _BEYOND_ACCURACY[key])]
            for key, value in report["beyond_accuracy"].items()
        ]
        tables.append(format_table([f"lists of {report['cutoff']}", "value"], shown))
        facts.append("lists      popularity and novelty count the training split")
    facts.append(f"checkpoint {report['checkpoint']}")
    return "\n\n".join([*tables, "\n".join(facts)])


def _slices_table(kind: str, slices: Sequence[dict[str, Any]]) -> str:
    """Make a table with a column for each slice; standard errors are in parentheses."""
    rows = [["events", *(f"{found['events']:,}" for found in slices)]]
    for name in slices[0]["metrics"]:
        figures = [found["metrics"][name] for found in slices]
        rows.append([name, *(f"{_number(f['value'])} ({_number(f['stderr'])})" for f in figures)])
    return format_table([kind, *(found["slice"] for found in slices)], rows)


def _facts(report: dict[str, Any], lost_note: str) -> list[str]:
    """Return the lines that say what the figures of a report are based on."""
    left_out = report["left_out"]
    facts = [
        f"protocol   {report['protocol']}, {report['split']} split of {report['dataset']}",
        f"ranked     {counted(report['events'], 'event')} of "
        f"{counted(report['sessions'], 'session')}, each among all {report['items']:,} items",
        f"ties       {report['tie_rule']}",
    ]
    if "positions" in report:
        facts.append(f"positions  {report['positions']}")
    facts.append(f"seen items {'filtered' if report['filter_rated'] else 'not filtered'}")
    if report["missed_because_filtered"]:
        facts.append(
            f"           misses: {counted(report['missed_because_filtered'], 'filtered target')}"
        )
    if left_out["earlier_events"]:
        facts.append(
            f"left out   {counted(left_out['earlier_events'], 'event')} before the last of "
            "long sessions (--full-sessions predicts them)"
        )
    catalogue = report.get("catalogue")
    if catalogue:
        facts.append(
            f"catalogue  matched by original id: "
            f"{counted(catalogue['only_in_checkpoint'], 'item')} only in "
            f"the checkpoint's, {catalogue['only_in_dataset']:,} only in the dataset's"
        )
    if catalogue and catalogue["events_on_unknown_items"]:
        facts.append(
            f"left out   "
            f"{counted(catalogue['events_on_unknown_items'], 'event')} on items that the "
            "checkpoint lacks, of the whole split"
        )
    if "sample" in report:
        sample = report["sample"]
        facts.append(
            f"sample     {sample['sessions']:,} of {counted(sample['of'], 'session')}, seed "
            f"{sample['seed']}; errors without a finite-population correction"
        )
    elif left_out["sessions_beyond_limit"]:
        beyond = counted(left_out["sessions_beyond_limit"], "session")
        facts.append(f"left out   {beyond} beyond the limit")
    if left_out["lost_predictions"]:
        facts.append(
            f"left out   {counted(left_out['lost_predictions'], 'event')} whose item training "
            "lacks"
            f"{lost_note}"
        )
    return facts


def comparison_text(report: dict[str, Any]) -> str:
    """Return the tables of `tron compare`, followed by lines on what they are based on."""
    models, reference = report["models"], report["reference"]
    others = [label for label in models if label != reference]
    names = list(models[reference]["metrics"])
    figures = [
        [name, *(_number(model["metrics"][name]["value"]) for model in models.values())]
        for name in names
    ]
    differences = [
        [name, *(_difference(models[label]["differences"][name]) for label in others)]
        for name in names
    ]
    tables = [
        format_table(["measure", *models], figures),
        format_table([f"difference from {reference}", *others], differences),
    ]
    if report["cutoff"]:
        beyond = [
            [
                key.replace("_", " "),
                *(_styled(model["beyond_accuracy"][key], style) for model in models.values()),
            ]
            for key, style in _BEYOND_ACCURACY.items()
        ]
        tables.append(format_table([f"lists of {report['cutoff']}", *models], beyond))
    facts = [
        f"difference ± half its {report['confidence']:.0%} interval; ~ within noise: "
        "the interval contains 0",
        f"intervals  {report['intervals']}",
        *_facts(report, ""),
    ]
    if report["cutoff"]:
        facts.append(
            "lists      popularity and novelty count the training split; intersection is with "
            f"the lists of {reference}"
        )
    width = max(map(len, models))
    facts += [f"{label.ljust(width)}  {model['checkpoint']}" for label, model in models.items()]
    return "\n\n".join([*tables, "\n".join(facts)])


_BEYOND_ACCURACY = {  # and how it is shown
    "catalogue_coverage": ".4f",
    "average_popularity": ",.1f",
    "novelty": ".3f",
    "serendipity": ".3g",
    "intersection": ".4f",
}


def _difference(difference: dict[str, Any]) -> str:
    if difference["stderr"] is None:
        return f"{difference['value']:+.4f}"
    half_width = (difference["high"] - difference["low"]) / 2
    mark = "~" if difference["within_noise"] else " "
    return f"{difference['value']:+.4f} ±{half_width:.4f} {mark}"


def _styled(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
