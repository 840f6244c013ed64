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


def config_names() -> list[str]:
    """Return the packaged configs, for shell completion."""
    from tron_cli.config import packaged_configs

    return packaged_configs()


def _setting_words(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return `key=value` words for shell completion, with help: after `key=` its choices."""
    from tron_cli.config import FIELDS

    key, equals, _ = incomplete.partition("=")
    prefix = f"{key}="
    earlier = list(context.params.get("overrides") or ())
    if earlier[-1:] == ["="]:  # bash splits key=value into three words
        key, equals, prefix = "".join(earlier[-2:-1]), "=", ""
    if equals:
        choices = FIELDS[key].choices if key in FIELDS else ()
        return [(prefix + choice, "") for choice in choices]
    words = []
    for name, setting in FIELDS.items():
        # Bash ends a word with a space, so the default is offered too where it is one word.
        default = setting.shown_default
        value = "" if " " in default or default == "required" else default
        words.append((f"{name}={value}", setting.help))
    return words


def _add_plugins(context: typer.Context, references: list[str] | None) -> list[str] | None:
    from tron_cli.config.plugins import add_plugin

    for reference in references or []:
        if not context.resilient_parsing:  # shell completion must not run code
            add_plugin(reference)
    return references


def given_path(given: object) -> Path:
    """Return a path; refuse an empty one, which an unset shell variable gives."""
    if not str(given).strip():
        raise typer.BadParameter("it is empty: name a path, or . for the current folder")
    return Path(str(given))


CheckpointPath = Annotated[
    Path,
    typer.Argument(parser=given_path, metavar="CKPT", help="A .pt file, or the folder of a run."),
]
DataDir = Annotated[
    Path,
    typer.Option(
        "--data-dir", parser=given_path, metavar="PATH", help="Folder of the prepared datasets."
    ),
]
OutputDir = Annotated[
    Path | None,
    typer.Option(
        parser=given_path, metavar="PATH", help="Folder for the run's folder; default: runs."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value ...]",
        help="Settings that override the config.",
        autocompletion=_setting_words,
    ),
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
