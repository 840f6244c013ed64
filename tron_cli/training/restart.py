"""Runs that torchrun starts again (`--max-restarts`), which continue in the folder that they made.

torchrun repeats the whole command, so that a new run would find its folder taken. A note in the
folder tells that this very job has made it.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tron_cli.files import LAST, written_aside
from tron_cli.training.run import LOCK, NOTE, claimed, log


@contextmanager
def claimed_again(run_dir: Path, *, numbered: bool, settings: dict[str, Any]) -> Iterator[Path]:
    """Claim the folder of a new run, or the one that this job of torchrun made before a restart.

    In the latter case it holds last.pt where the run has saved. numbered: see `claimed`. settings:
    all that determines the run, as plain data. Raises InputError as `claimed` does.
    """
    job = _job()
    if job is None:
        with claimed(run_dir, numbered=numbered) as folder:
            yield folder
        return
    note = json.dumps({"job": job, "settings": settings}, indent=2) + "\n"
    earlier = None
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        earlier = _folder_with(note, run_dir, any_name=numbered)
    saved = earlier is not None and (earlier / LAST).is_file()
    if earlier is not None and saved:
        log.warning("torchrun has restarted this job: continuing %s from its last save", earlier)
    elif earlier is not None:
        for best in earlier.glob("*.pt"):  # killed between its first best and its first last.pt
            best.unlink()
    place = claimed(earlier or run_dir, resume=saved, numbered=numbered and earlier is None)
    with place as folder:
        with written_aside(folder / NOTE) as file:
            file.write(note)
        try:
            yield folder
        finally:
            if {path.name for path in folder.iterdir()} <= {NOTE, LOCK}:
                (folder / NOTE).unlink()


def _job() -> str | None:
    """Return a name for the job of torchrun that runs this process; None without torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    # Without a name of its own, the job is the torchrun that starts the processes here.
    return f"{platform.node()}:{os.getppid()}" if run_id == "none" else run_id


def _folder_with(note: str, run_dir: Path, *, any_name: bool) -> Path | None:
    """Return run_dir, or with any_name some folder beside it, if it holds the note."""
    candidates = run_dir.parent.glob(f"*/{NOTE}") if any_name else [run_dir / NOTE]
    for path in candidates:
        if path.is_file() and path.read_text(encoding="utf-8") == note:
            return path.parent
    return None
