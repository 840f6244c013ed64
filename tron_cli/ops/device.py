"""The device that the user chose."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tron_cli.errors import InputError

if TYPE_CHECKING:
    import torch


def chosen_device(device: str | torch.device) -> torch.device:
    """Return the device of that name after a first use; a CUDA device becomes the current one.

    Raises InputError where it does not exist or cannot be used.
    """
    import torch

    name = str(device)

    match = re.fullmatch(r"auto|cpu|cuda(?::(\d{1,9}))?", name)
    if not match:
        raise InputError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    chosen = name
    if name == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(chosen)
        if match[1] is not None and torch.cuda.is_available():
            count = torch.cuda.device_count()
            if int(match[1]) >= count:  # torch keeps eight bits of it: 256 would be 0
                there = ", ".join(f"cuda:{index}" for index in range(count))
                raise InputError(f"--device {name} does not exist here; there is {there}")
            # Graphs, streams and Triton's kernels are those of the current device.
            torch.cuda.set_device(found)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used here ({reason}); try cpu") from error
    return found
