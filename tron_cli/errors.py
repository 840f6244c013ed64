"""Failures as a user sees them: one sentence each, without a traceback."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_CHARACTERS = 500


class _SentenceError(Exception):
    """Failure in one sentence, short enough for a screen whatever it quotes."""

    def __init__(self, sentence: str) -> None:
        super().__init__(shortened(sentence))


class InputError(_SentenceError):
    """Wrong usage or bad input (exit 2): what was expected, what came, where, and what to do."""


class RunError(_SentenceError):
    """Failure of a run that started properly (exit 1), such as a loss that is no longer finite."""


class LostProcessError(RunError):
    """End of one of several processes, as the others see it."""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, such as `1 session` or `2,000 sessions`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def shortened(sentence: str) -> str:
    """Return at most MAX_CHARACTERS of a sentence, cut in the middle, in printable characters.

    The start says where and what, the end what to do; quoted text between them can be cut.
    """
    if len(sentence) > MAX_CHARACTERS:
        half = MAX_CHARACTERS // 2 - 3
        sentence = f"{sentence[:half]} ... {sentence[-half:]}"
    if sentence.isprintable():
        return sentence
    printable = "".join(
        char if char.isprintable() else " " if char.isspace() else ascii(char)[1:-1]
        for char in sentence
    )
    return printable if len(printable) <= MAX_CHARACTERS else shortened(printable)


@contextmanager
def explained(log_file: Path | None = None) -> Iterator[None]:
    """Raise a RunError with one sentence for every failure that is no InputError or RunError.

    The traceback is appended to log_file, which the sentence names. Without a log_file, or where
    it cannot be written, it goes to a new file in the system's temporary folder.
    """
    try:
        yield
    except (InputError, RunError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # some are no Exception, such as a panic in polars
        written = _written_traceback(error, log_file)
        where = f"the traceback is in {written}" if written else "run again with --debug"
        raise RunError(f"{sentence_of(error)}; {where}") from error


def sentence_of(error: BaseException) -> str:
    """Describe a failure of any type, without a full stop."""
    if _is_out_of_device_memory(error):
        return "the GPU is out of memory; lower train_batch_size or eval_batch_size"
    of_torch = ("DefaultCPUAllocator: ", "Storage size calculation overflowed")
    if isinstance(error, MemoryError) or any(words in str(error) for words in of_torch):
        return "the machine is out of memory; try smaller batches, a smaller model or less data"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return described(error)


def described(error: BaseException) -> str:
    """Return our own sentence, or else the type and the message, such as `ValueError: ...`."""
    if isinstance(error, _SentenceError):
        return str(error)
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def place_of(path: Path, error: BaseException) -> str:
    """Return the file and, where it can be told, the line that raised or that cannot be parsed."""
    line = getattr(error, "lineno", None)
    trace = error.__traceback__
    while line is None and trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"{path}, line {line}" if line else str(path)


def _is_out_of_device_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # not loaded: it cannot have raised an error
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _written_traceback(error: BaseException, log_file: Path | None) -> Path | None:
    """Write the traceback; return the file, or None where none could be written."""
    import tempfile

    lines = traceback.format_exception(type(error), error, error.__traceback__)
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} ERROR {' '.join(sys.argv)}\n{''.join(lines)}"
    if log_file is not None:
        try:
            with log_file.open("a", encoding="utf-8", errors="backslashreplace") as log:
                log.write(text)
            return log_file
        except OSError:
            pass  # such as a full disk: the temporary folder may be on another
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="tron-", suffix=".log", delete=False, encoding="utf-8",
            errors="backslashreplace",
        ) as file:  # fmt: skip
            file.write(text)
    except OSError:
        return None
    return Path(file.name)
