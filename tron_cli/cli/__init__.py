"""The command `tron`: subcommands, one file each, and the exit codes of failures.

Modules of this folder import torch, NumPy and polars only inside functions, so that help is quick.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from tron_cli import __version__
from tron_cli.cli import (
    check,
    compare,
    config,
    demo,
    evaluate,
    export,
    import_,
    mix,
    prepare,
    recommend,
    serve,
    train,
)
from tron_cli.distributed.launch import rank_and_count
from tron_cli.errors import InputError, LostProcessError, RunError, explained, shortened

log = logging.getLogger("tron")

SHARED = ("train", "evaluate", "compare", "recommend")  # commands that several processes share
# Seconds in which the first of several processes says what they all have met.
_FIRST_SPEAKS = 5.0

app = typer.Typer(
    name="tron",
    help="Train, evaluate, compare and serve session-based recommenders on catalogues of millions "
    "of items.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    train.train,
    mix.mix,
    evaluate.evaluate,
    compare.compare,
    recommend.recommend,
    recommend.similar,
    serve.serve,
    export.export,
    check.check,
    demo.demo,
):
    app.command()(command)
app.command("import")(import_.import_)
app.add_typer(prepare.app, name="prepare")
app.add_typer(config.app, name="config")


def main() -> None:
    """Run the command line; wrong usage and bad input exit with 2, failed runs with 1."""
    if sys.stderr is None:  # closed, as by 2>&-
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 -- as long as the process
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        code = _run([word for word in arguments if word != "--debug"], debug)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(code)


def _stop(number: int, _: object) -> None:
    """End with the usual exit code of a signal, after half-written files have been removed."""
    rank, count = rank_and_count()
    if rank == 0 and count > 1:
        print(
            "tron: ended by torchrun, as it does when another process has failed; the messages of "
            "that process or torchrun's own say why",
            file=sys.stderr,
        )
    raise SystemExit(128 + number)


def _run(arguments: list[str], debug: bool) -> int:
    try:
        with explained(), _silent_beside_the_first():
            app(arguments, prog_name="tron")
        return 0
    except SystemExit as end:  # Typer's own: 0 for --help, 2 for wrong usage
        if end.code == 2:
            _let_the_first_speak()
        return end.code if isinstance(end.code, int) else 1
    except LostProcessError as error:
        return _fail(str(error), 1, debug)
    except (InputError, RunError) as error:
        _let_the_first_speak()
        return _fail(str(error), 2 if isinstance(error, InputError) else 1, debug)


@contextmanager
def _silent_beside_the_first() -> Iterator[None]:
    """Discard the output of all processes of torchrun but the first."""
    if rank_and_count()[0] == 0:
        yield
        return
    with (
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        yield


def _let_the_first_speak() -> None:
    """Wait for the end, which torchrun sends as soon as the first process has failed too."""
    if rank_and_count()[0] > 0:
        time.sleep(_FIRST_SPEAKS)


def _fail(sentence: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"tron: {shortened(sentence)}", file=sys.stderr)
    return code


def _version(shown: bool) -> None:
    if shown:
        print(f"tron {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    command, count = context.invoked_subcommand, rank_and_count()[1]
    if count > 1 and command not in SHARED:
        raise InputError(
            f"tron {command} works in one process, got {count}: leave out torchrun, which is for "
            f"{', '.join(SHARED)}"
        )
    if not log.handlers:
        handler = _BarSafeHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)


class _BarSafeHandler(logging.Handler):
    """Handler that writes to stderr above a progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)
