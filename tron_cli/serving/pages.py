"""Pages of a checkpoint that is mapped into memory."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import torch

_SMAPS = Path("/proc/self/smaps")


def release(tensor: torch.Tensor) -> bool:
    """Unmap the pages of a mapped tensor; they come back from the file's cache when they are used.

    Returns False, and does nothing, where the system cannot say that all of them are still as they
    are in the file. Only Linux can.
    """
    first, size = tensor.data_ptr(), tensor.nbytes
    if not _is_as_in_its_file(first, first + size):
        return False
    page = mmap.PAGESIZE
    low, high = -(-first // page) * page, (first + size) // page * page
    advised = ctypes.CDLL(None).madvise(
        ctypes.c_void_p(low), ctypes.c_size_t(max(0, high - low)), mmap.MADV_DONTNEED
    )
    return bool(advised == 0)


def _is_as_in_its_file(first: int, last: int) -> bool:
    """Return True if these addresses are mapped from a file, and no page there was written to."""
    try:
        lines = _SMAPS.read_text().splitlines()
    except OSError:
        return False
    is_it = False
    for line in lines:
        words = line.split()
        if not words[0].endswith(":"):  # the head of a mapping: addresses, ..., path
            low, high = (int(word, 16) for word in words[0].split("-"))
            is_it = len(words) > 5 and words[5].startswith("/") and low <= first and last <= high
        elif is_it and words[0] == "Anonymous:":
            return words[1] == "0"
    return False
