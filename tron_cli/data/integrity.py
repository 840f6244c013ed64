"""Checks of a prepared dataset, from its arrays and the entries of dataset.json alone.

Each function returns the first flaw in a few words, or None.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from tron_cli.data.folder import SPLITS

PROTOCOLS = ("every-step", "last-item")


def flaw_of_description(info: dict[str, Any]) -> str | None:
    """Look for entries of dataset.json that are missing or impossible."""
    if info.get("protocol") not in PROTOCOLS:
        return f"protocol is {info.get('protocol')!r}, not {' or '.join(PROTOCOLS)}"
    if not _is_count(info.get("num_items")):
        return f"num_items is {info.get('num_items')!r}, not a count"
    if not isinstance(info.get("catalogue_fingerprint"), str):
        return "catalogue_fingerprint is missing"
    splits = info.get("splits")
    for split in SPLITS:
        counts = splits.get(split) if isinstance(splits, dict) else None
        if not isinstance(counts, dict):
            return f"the {split} split is missing"
        for name in ("sessions", "events", "lost_predictions"):
            if not _is_count(counts.get(name)):
                return f"{name} of the {split} split is {counts.get(name)!r}, not a count"
        if not isinstance(counts.get("fingerprint"), str):
            return f"the fingerprint of the {split} split is missing"
        if not isinstance(counts.get("files", {}), dict):
            return f"files of the {split} split is {counts['files']!r}, not their fingerprints"
    return None


def flaw_of_ends(
    items: np.ndarray, offsets: np.ndarray, times: np.ndarray | None, counts: dict[str, Any]
) -> str | None:
    """Compare the ends of a split's arrays with each other and with dataset.json; reads no more."""
    found = (len(offsets) - 1, len(items))
    if found != (counts["sessions"], counts["events"]):
        return "its arrays do not match dataset.json"
    if offsets[0] != 0 or offsets[-1] != len(items):
        return f"its offsets go from {offsets[0]} to {offsets[-1]}, not from 0 to {len(items)}"
    if times is not None and len(times) != len(items):
        return f"it has {len(times):,} times for {len(items):,} events"
    return None


def flaw_of_contents(items: np.ndarray, offsets: np.ndarray, num_items: int) -> str | None:
    """Read all offsets and items: the offsets never fall, and items are 1..num_items."""
    falls = offsets[1:] < offsets[:-1]
    if falls.any():
        session = int(falls.argmax())
        return f"session {session + 1:,} ends before it begins"
    if len(items) and not 1 <= items.min() <= items.max() <= num_items:
        event = int(((items < 1) | (items > num_items)).argmax())
        return f"item {items[event]} of event {event + 1:,} is not in 1..{num_items}"
    return None


def fingerprint(*arrays: np.ndarray) -> str:
    """Return the SHA-256 of the bytes of arrays, one after the other."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, read a few megabytes at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
