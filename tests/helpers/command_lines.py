"""Results of command lines."""

from __future__ import annotations

import re
from collections.abc import Callable

Command = Callable[..., tuple[int, str, str]]  # the fixture `command`: exit code, stdout, stderr


def is_one_sentence(err: str) -> bool:
    """Return True if the last line names the problem; Typer puts its usage lines before it."""
    lines = err.strip().splitlines()
    usage = [line for line in lines if re.match(r"Usage: |Try |$", line)]
    return "Traceback" not in err and len(lines) - len(usage) == 1
