"""Text files with one session per line, the exchange format of session-based papers.

A session is its items' integer ids, oldest first. Such files keep their sessions in time order, so
that the last training lines can serve as validation.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from tron_cli.data.dataset import Dataset, DatasetWriter, Sessions
from tron_cli.errors import InputError
from tron_cli.prepare.earlier import earlier_catalogue
from tron_cli.prepare.filters import Steps, drop_short
from tron_cli.prepare.reading.bad_lines import BadLines
from tron_cli.prepare.reading.integers import read_integer_lines
from tron_cli.prepare.sessions import joined, take
from tron_cli.prepare.split import Splits, sample
from tron_cli.prepare.write import (
    dataset_path,
    in_order_of_appearance,
    refuse_copies,
    refuse_empty_val,
    write_splits,
)

VAL_SHARE = 0.05


def prepare_sequences(
    train: Path,
    test: Path,
    data_dir: Path,
    name: str,
    *,
    val: Path | None = None,
    force: bool = False,
    max_val_sessions: int = 100_000,
    seed: int = 42,
    skip_bad_lines: bool = False,
    max_bad_share: float | None = None,
    catalogue: str | None = None,
) -> Dataset:
    """Prepare files with one session per line; without `val`, the last 5 % of train validate.

    A session's id is the number of its line. Sessions of fewer than two events are dropped and
    counted. The catalogue is the items of train and val; test loses the others.
    """
    files = [train, *([val] if val else []), test]
    with DatasetWriter(dataset_path(data_dir, name, *files), force=force) as writer:
        earlier = earlier_catalogue(catalogue, data_dir)
        bad = BadLines(skip=skip_bad_lines, max_share=max_bad_share)
        steps = Steps()
        parts = [_read(file, bad) for file in files]
        refuse_copies(files, parts)
        bad.check_share(sum(map(len, parts)))
        distinct, positions = np.unique(
            np.concatenate([part.items for part in parts]), return_inverse=True
        )
        bounds = np.cumsum([0, *(len(part.items) for part in parts)])
        parts = [
            replace(part, items=positions[start:end].astype(np.int32))
            for part, start, end in zip(parts, bounds[:-1], bounds[1:], strict=True)
        ]
        steps.record("read", parts, "")
        parts = [drop_short(part, 2) for part in parts]
        steps.record("short sessions", parts, "fewer than 2 events")
        if val:
            refuse_empty_val(parts[1], val, 2)
        period = joined(parts[:-1])
        val_sessions = len(parts[1]) if val else int(len(period) * VAL_SHARE)
        rows = np.arange(len(period))
        cut = len(period) - val_sessions
        held_out = take(period, rows[cut:])
        sampled = sample(held_out, max_val_sessions, seed, steps)
        return write_splits(
            writer,
            Splits(period, take(period, rows[:cut]), sampled, parts[-1]),
            item_ids=distinct,
            catalogue=in_order_of_appearance(period),
            name=name,
            protocol="every-step",
            source="sequences",
            options={
                "train": str(train),
                "val": str(val) if val else None,
                "test": str(test),
                "val_share": None if val else VAL_SHARE,
                "max_val_sessions": max_val_sessions,
                "seed": seed,
                "skip_bad_lines": skip_bad_lines,
                "catalogue": catalogue,
                "max_bad_share": max_bad_share,
            },
            files=files,
            steps=steps,
            bad=bad,
            earlier=earlier,
        )


def _read(file: Path, bad: BadLines) -> Sessions:
    """Read the sessions of a file; the id of each is the number of its line."""
    numbers, counts, lines = zip(*read_integer_lines(file, bad), strict=True)
    if not sum(map(len, numbers)):
        raise InputError(
            f"{file} holds no session: expected integer item ids, one session per line"
        )
    offsets = np.concatenate(([0], np.cumsum(np.concatenate(counts))))
    return Sessions(np.concatenate(numbers), offsets, session_ids=np.concatenate(lines))
