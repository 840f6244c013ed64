"""Commands of tron with what they use; what result files record of them; pages that show these."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def tron(words: list[str]) -> dict[str, Any]:
    """Run a tron command with --json; its log goes to our stderr."""
    return measured(words)[0]


def measured(words: list[str]) -> tuple[dict[str, Any], resource.struct_rusage]:
    """Run a tron command with --json; return its report and what it used."""
    command = [sys.executable, "-m", "tron_cli", *words, "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        report = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return json.loads(report), used


def processor_seconds(used: resource.struct_rusage) -> float:
    """Return the time on all cores, which other work on the machine does not change much."""
    return used.ru_utime + used.ru_stime


def commit() -> str:
    """Return the commit of the package, and whether files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "tron_cli")
    return git("rev-parse", "HEAD") + ("-modified" if changed else "")


def processor() -> str:
    """Return the model of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def hardware() -> str:
    """Return the processor, threads and PyTorch's version."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return f"{processor()}, {cores} cores, {threads} threads, torch {torch.__version__}"


def write_result(path: Path, result: dict[str, Any]) -> Path:
    """Write a result file, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def replace_between(page: Path, begin: str, end: str, text: str) -> None:
    """Put a text between two marks of a page."""
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
