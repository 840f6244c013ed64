"""Circumstances of a measurement: commit, hardware, threads, and the limits of the machine."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.commands import ROOT, processor


def circumstances(device: torch.device | None = None) -> dict[str, Any]:
    """Return commit, hardware and threads, without dates: equal runs give equal files."""
    return {
        "commit": _commit(),
        "hardware": _hardware(device or torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def resident_bytes(*, peak: bool = False) -> int:
    """Return the current or peak memory of this process."""
    if sys.platform.startswith("linux"):
        name = "VmHWM:" if peak else "VmRSS:"
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
    import resource

    # Elsewhere only the highest so far is known.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def ordinary_pages() -> Iterator[None]:
    """Allocate memory as the originals do, without the huge pages that tron requests (on Linux)."""
    if not sys.platform.startswith("linux"):
        yield
        return
    prctl, set_thp_disable = ctypes.CDLL(None).prctl, 41
    prctl(set_thp_disable, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(set_thp_disable, 0, 0, 0, 0)


def _commit() -> str:
    if shutil.which("git") is None:
        return "unknown"

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    head = git("rev-parse", "HEAD")
    if not head:
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "tron_cli", "benchmarks/*.py")
    return head + ("-modified" if changed else "")


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor()
