"""Options that several commands share, and groups of options as dataclasses."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

DATASETS = Path("datasets")
CONFIG_HELP = "A Python config, one of otto-de/TRON's JSON files, or the name of a packaged config."


def _add_plugins(references: list[str] | None) -> list[str] | None:
    from tron_cli.config.plugins import add_plugin

    for reference in references or []:
        add_plugin(reference)
    return references


DataDir = Annotated[Path, typer.Option("--data-dir", help="Folder of the prepared datasets.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="Settings that override the config."),
]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        callback=_add_plugins,
        metavar="FILE.py:NAME",
        help="Load code from outside tron (or package.module:NAME) that a checkpoint needs.",
    ),
]


@dataclasses.dataclass(frozen=True)
class PredictedEvents:
    """Options of `tron evaluate` and `tron compare`: events, histories, measures."""

    split: Annotated[Literal["test", "val"], typer.Option(help="Split to evaluate on.")] = "test"
    protocol: Annotated[
        Literal["every-step", "last-item"] | None,
        typer.Option(help="Events of a session to predict; default: the dataset's protocol."),
    ] = None
    metrics: Annotated[
        str | None,
        typer.Option(
            help='Measures, such as "R@20 nDCG@10"; default: the (reference) checkpoint\'s.'
        ),
    ] = None
    filter_rated: Annotated[
        bool | None,
        typer.Option(
            "--filter-rated/--no-filter-rated",
            help="Never recommend items of the history; default: as its config says.",
        ),
    ] = None
    full_sessions: Annotated[
        bool, typer.Option(help="Also predict events before the last sequence_length ones.")
    ] = False
    limit_sessions: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N sessions of the split.")
    ] = None
    sample_sessions: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Only N sessions of the split, drawn at random."),
    ] = None
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of --sample-sessions; default: 42.")
    ] = None
    drop_unknown: Annotated[
        bool,
        typer.Option(
            "--drop-unknown",
            help="Drop events on items that a checkpoint does not know, and count them as lost.",
        ),
    ] = False


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with the fields of its dataclass parameters as options of their own."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        parameter.name: parameter.annotation
        for parameter in signature.parameters.values()
        if dataclasses.is_dataclass(parameter.annotation)
    }
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name in groups:
            parameters += _options_of(groups[parameter.name])
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            names = [field.name for field in dataclasses.fields(group)]
            given[name] = group(**{field: given.pop(field) for field in names})
        command(**given)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _options_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty
            if field.default is dataclasses.MISSING
            else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(group)
    ]
