"""`tron recommend` and `tron similar`: items for histories, and similar items."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tron_cli.cli.options import AsJson, CheckpointPath, Device, Plugins, given_path
from tron_cli.distributed.launch import rank_and_count
from tron_cli.errors import InputError, counted
from tron_cli.files import check_writable
from tron_cli.ops.device import chosen_device
from tron_cli.text_table import format_table

if TYPE_CHECKING:
    from tron_cli.prepare.reading.bad_lines import BadLines
    from tron_cli.serving.bulk import RecommendOptions
    from tron_cli.serving.recommender import Recommendation, Recommender, Scope
    from tron_cli.serving.session_files import Session, SessionColumns

log = logging.getLogger("tron")

_ITEMS_AT_ONCE = 1 << 10
_TABLE_OPTIONS = (
    "--session-col, --item-col, --time-col, --time-format, --adjacent and --skip-bad-lines"
)


def recommend(
    checkpoint: CheckpointPath,
    history: Annotated[
        str | None,
        typer.Option(
            metavar="IDS",
            help="One history: item ids separated by spaces, oldest first, or a JSON list of them.",
        ),
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FILE",
            help="Sessions: .jsonl with one object per line, such as "
            '{"session": "s1", "items": ["a", "b"]}, or a table with one row per event (.csv, '
            ".tsv, .parquet). Text may be compressed (.gz). Default: JSON lines from stdin, "
            "answered as they arrive.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FILE",
            help="Recommendations: .jsonl, or a table with the columns session, rank, item (.csv, "
            ".tsv, .parquet). Default: JSON lines to stdout.",
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Number of items for each session.")] = 20,
    filter_rated: Annotated[
        bool | None,
        typer.Option(
            "--filter-rated/--no-filter-rated",
            help="Never recommend items of the history; default: as the checkpoint's config says.",
        ),
    ] = None,
    candidates: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FILE",
            help="Rank only the items of this file, one id per line.",
        ),
    ] = None,
    exclude: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FILE",
            help="Never recommend the items of this file, one id per line.",
        ),
    ] = None,
    on_unknown: Annotated[
        Literal["skip", "warn", "raise"],
        typer.Option(
            help="Events on items that the model does not know: skip them and print their number "
            "on stderr, also warn of the first sessions that have any, or refuse them."
        ),
    ] = "skip",
    on_empty: Annotated[
        Literal["popular", "raise"],
        typer.Option(
            help="Sessions without known items: recommend the most popular items, or refuse them."
        ),
    ] = "popular",
    scores: Annotated[
        bool, typer.Option("--scores/--no-scores", help="Also write the score of each item.")
    ] = False,
    session_col: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of a table; default: session.")
    ] = None,
    item_col: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of a table; default: item.")
    ] = None,
    time_col: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Column of a table by which the events of a session are ordered (ISO 8601 or "
            "numbers); default: they are in the order of the rows.",
        ),
    ] = None,
    time_format: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help='Format of other times, such as "%d/%m/%Y %H:%M", as for `tron prepare table`.',
        ),
    ] = None,
    skip_bad_lines: Annotated[
        bool,
        typer.Option(
            "--skip-bad-lines", help="Skip and count lines of a table that cannot be read."
        ),
    ] = False,
    adjacent: Annotated[
        bool,
        typer.Option(
            "--adjacent",
            help="The rows of each session are consecutive in the table, which then need not fit "
            "in memory.",
        ),
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Sessions read and answered together.")
    ] = 1024,
    device: Device = "auto",
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Recommend items for any history.

    The items and their order are those of `tron evaluate --run`, in original ids.
    """
    from tron_cli.distributed.processes import PATIENCE_IN_RANKING, device_of_process, joined
    from tron_cli.prepare.reading.bad_lines import BadLines, skipped_lines
    from tron_cli.serving.bulk import RecommendOptions, recommend_sessions
    from tron_cli.serving.list_files import list_writer
    from tron_cli.serving.recommender import Recommender
    from tron_cli.serving.session_files import SessionColumns, format_of

    if history is None and output is None and sys.stdout is None:
        raise InputError("stdout is closed; name a file with --output")
    if history is not None and (input or output):
        raise InputError("--history is one history, answered on stdout: leave out --input/--output")
    if as_json and history is None:
        raise InputError("--json goes with --history; files and streams are JSON lines anyway")
    texts = (session_col, item_col, time_col, time_format)
    given = adjacent or skip_bad_lines or any(text is not None for text in texts)
    if (input is None or format_of(input, "--input")[0] == "jsonl") and given:
        raise InputError(f"{_TABLE_OPTIONS} are for tables; leave them out, or name a table")
    if "" in texts:
        raise InputError("an option is empty; name a column or a format, or leave the option out")
    if time_format and not time_col:
        raise InputError("--time-format goes with --time-col: name the column of the times")
    if input is None and history is None and rank_and_count()[1] > 1:
        raise InputError(
            "several processes answer no stream: name a file with --input, or leave out torchrun"
        )
    if output is not None:
        format_of(output, "--output")
        _check_apart(output, input, candidates, exclude)
        if rank_and_count()[0] == 0:
            check_writable(output)
    used_device = device_of_process(chosen_device(device))
    recommender = Recommender.load(checkpoint, device=used_device)
    recommender.check_options(k, filter_rated, on_unknown, on_empty)
    options = RecommendOptions(
        k, filter_rated, _scope(recommender, exclude, candidates), on_unknown, on_empty
    )
    if history is not None:
        _print(_answer(recommender, history, options), as_json=as_json, scores=scores)
        return
    columns = SessionColumns(
        session_col or "session", item_col or "item", time_col, time_format, adjacent
    )
    bad = BadLines(skip=skip_bad_lines)
    batches = _sessions(input, columns, batch_size, bad, shows_bar=output is not None)
    is_text = recommender.lookup.is_text
    with _quiet_on_a_broken_pipe(), joined(used_device, PATIENCE_IN_RANKING) as processes:
        writer = list_writer(output, text_items=is_text, scores=scores)
        with writer if processes.is_first else nullcontext(_write_nothing) as write:
            counts = recommend_sessions(recommender, batches, write, options, processes)
    log.info("%s", counts)
    if bad.count:
        log.info(skipped_lines(bad.info()))


def _answer(recommender: Recommender, history: str, options: RecommendOptions) -> Recommendation:
    """Return the items after --history, and log what it lacks."""
    from tron_cli.serving.bulk import recommend_sessions
    from tron_cli.serving.session_files import Session

    found: list[Recommendation] = []
    one = [Session(0, _ids(history), "--history")]
    counts = recommend_sessions(recommender, [one], lambda _, lists: found.extend(lists), options)
    if counts.unknown_events or counts.without_known:
        log.info("%s", counts)
    if counts.without_known and len(history.split()) > 1 and not history.lstrip().startswith("["):
        log.info('ids with spaces go into a JSON list, such as ["red shoe", "blue shoe"]')
    return found[0]


def _write_nothing(*_: object) -> None:
    """Take the place of the writer where another process writes."""


def _check_apart(output: Path, *inputs: Path | None) -> None:
    """Raise InputError where the output would replace a file that is read."""
    for file in inputs:
        if file is not None and file.exists() and output.exists() and output.samefile(file):
            raise InputError(f"--output {output} is also read; name another file for the output")


def _scope(recommender: Recommender, exclude: Path | None, candidates: Path | None) -> Scope:
    import numpy as np

    from tron_cli.serving.session_files import read_ids

    excluded: list[str] = []
    if exclude is not None:
        excluded, _ = read_ids(exclude)
        unknown = np.flatnonzero(recommender.lookup.numbers(excluded, str(exclude)) == 0)
        if len(unknown):
            log.info(
                f"{exclude}: the catalogue lacks {len(unknown):,} of "
                f"{counted(len(excluded), 'id')}, the first {excluded[unknown[0]]!r}; "
                f"{recommender.looks}"
            )
    if candidates is None:
        return recommender.scope(excluded)
    ids, lines = read_ids(candidates)
    if not ids:
        raise InputError(f"{candidates} holds no ids; expected one per line, or no --candidates")
    for id_, line, number in zip(
        ids, lines, recommender.lookup.numbers(ids, str(candidates)), strict=True
    ):
        if not number:
            raise InputError(
                f"{candidates}, line {line}: {id_!r} is not in the catalogue of "
                f"{recommender.checkpoint.path}; leave it out"
            )
    return recommender.scope(excluded, ids)


def _ids(history: str) -> list[object]:
    """Return the ids of --history."""
    if not history.lstrip().startswith("["):
        return [*history.split()]
    try:
        return [*json.loads(history)]
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"--history begins like a JSON list but is not one ({error}); expected, for example, "
            '["a", "b"]'
        ) from error


def _sessions(
    input: Path | None, columns: SessionColumns, batch_size: int, bad: BadLines, *, shows_bar: bool
) -> Iterator[list[Session]]:
    """Yield the sessions of the input, with a bar on a terminal if stdout is free."""
    from tqdm import tqdm

    from tron_cli.serving.session_files import STDIN, read_json_sessions, read_sessions

    # Polars makes reads start again after Ctrl-C, so that it would wait for the next line.
    signal.siginterrupt(signal.SIGINT, True)
    if input is not None:
        batches = read_sessions(input, columns, batch_size, bad)
    elif sys.stdin is None or sys.stdin.isatty():
        raise InputError(
            "expected histories, got none: pass --history or --input, or pipe JSON lines into stdin"
        )
    else:
        stdin: Any = sys.stdin.buffer
        batches = read_json_sessions(stdin.read1, STDIN, batch_size)
    with tqdm(unit=" sessions", unit_scale=True, disable=None if shows_bar else True) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def _print(found: Recommendation, *, as_json: bool, scores: bool) -> None:
    if as_json:
        print(json.dumps({"items": found.items, **({"scores": found.scores} if scores else {})}))
        return
    rows = [
        [str(item), str(rank), *([f"{score:.6g}"] if scores else [])]
        for rank, (item, score) in enumerate(zip(found.items, found.scores, strict=True), start=1)
    ]
    print(format_table(["item", "rank", *(["score"] if scores else [])], rows))


@contextmanager
def _quiet_on_a_broken_pipe() -> Iterator[None]:
    """Exit quietly when the reader of stdout has closed it, as commands do on SIGPIPE."""
    try:
        yield
    except BrokenPipeError:
        # Python flushes stdout again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None


def similar(
    checkpoint: CheckpointPath,
    items: Annotated[
        list[str] | None, typer.Argument(metavar="[ITEM ...]", help="Original item ids.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Number of similar items for each.")] = 10,
    all_items: Annotated[
        bool, typer.Option("--all", help="All items of the catalogue, in its order.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FILE",
            help="Write .jsonl, or a table with the columns item, rank, similar, score (.csv, "
            ".tsv, .parquet).",
        ),
    ] = None,
    device: Device = "auto",
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """List the items most similar to an item.

    Similarity is the cosine of input embeddings, which with a shared table also score items. Of the
    baselines, markov counts how often items directly followed, ease has its weights, and
    session_knn the votes of sessions that hold the item; popular and session_popular are refused.
    """
    import numpy as np
    from tqdm import tqdm

    from tron_cli.serving.list_files import list_writer
    from tron_cli.serving.recommender import Recommender
    from tron_cli.serving.session_files import format_of

    if all_items == bool(items):
        raise InputError("name items, or pass --all for all of them")
    if all_items and output is None:
        raise InputError("--all needs a file: name it with --output")
    if as_json and output is not None:
        raise InputError("--json prints to stdout; with --output, write .jsonl")
    if output is not None:
        format_of(output, "--output")
        check_writable(output)
    recommender = Recommender.load(checkpoint, device=chosen_device(device))
    if all_items:
        numbers = np.arange(1, recommender.num_items + 1)
    else:
        numbers = recommender.item_numbers(items or [])
    if output is None:
        _print_similar(items or [], recommender.similar_to(numbers, k=k), as_json=as_json)
        return
    is_text = recommender.lookup.is_text
    with (
        list_writer(output, text_items=is_text, of="item", items="similar", scores=True) as write,
        tqdm(total=len(numbers), unit=" items", unit_scale=True, disable=None) as bar,
    ):
        for low in range(0, len(numbers), _ITEMS_AT_ONCE):
            some = numbers[low : low + _ITEMS_AT_ONCE]
            write(recommender.lookup.ids(some), recommender.similar_to(some, k=k))
            bar.update(len(some))


def _print_similar(items: list[str], lists: list[Recommendation], *, as_json: bool) -> None:
    if as_json:
        found = [
            {"item": item, "items": near.items, "scores": near.scores}
            for item, near in zip(items, lists, strict=True)
        ]
        print(json.dumps({"similar": found}))
        return
    rows = [
        [item, str(rank), str(other), f"{score:.6g}"]
        for item, near in zip(items, lists, strict=True)
        for rank, (other, score) in enumerate(zip(near.items, near.scores, strict=True), start=1)
    ]
    print(format_table(["item", "rank", "similar", "score"], rows))
