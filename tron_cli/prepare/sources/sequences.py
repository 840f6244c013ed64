"""Text files with one session per line, the exchange format of session-based papers.

A session is its items' integer ids, oldest first. Such files keep their sessions in time order, so
that the last training lines can serve as validation. A single file of whole histories is split
leave-one-out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from tron_cli.data.dataset import Dataset, DatasetWriter, Sessions
from tron_cli.errors import InputError
from tron_cli.prepare.earlier import Earlier, earlier_catalogue
from tron_cli.prepare.filters import Steps, drop_short
from tron_cli.prepare.reading.columns import BadLines
from tron_cli.prepare.reading.session_lines import Layout, read_session_lines
from tron_cli.prepare.sessions import joined, take
from tron_cli.prepare.split import Splits, ValUsers, check_val_users, sample, split_last_two
from tron_cli.prepare.write import (
    Content,
    dataset_path,
    in_order_of_appearance,
    refuse_copies,
    refuse_empty_val,
    write_splits,
)

VAL_SHARE = 0.05


def prepare_sequences(
    train: Path | None,
    test: Path | None,
    data_dir: Path,
    name: str,
    *,
    input: Path | None = None,
    val: Path | None = None,
    lines: Layout = "items",
    val_users: ValUsers | None = None,
    force: bool = False,
    max_val_sessions: int = 100_000,
    seed: int = 42,
    skip_bad_lines: bool = False,
    max_bad_share: float | None = None,
    catalogue: str | None = None,
) -> Dataset:
    """Prepare train and test, or split the whole histories of `input` leave-one-out.

    lines: what a line is. Without `val`, the last 5 % of the train lines validate. Sessions of
    fewer than two events (histories: three) are dropped and counted. The catalogue is the items of
    train and val; test loses the others. val_users: with `input`, how many users validate; default:
    at most max_val_sessions.
    """
    _check_files(train, test, val, input, val_users)
    given = {"input": input, "train": train, "val": val, "test": test}
    files = [file for file in given.values() if file is not None]
    with DatasetWriter(dataset_path(data_dir, name, *files), force=force) as writer:
        earlier = earlier_catalogue(catalogue, data_dir)
        bad = BadLines(skip=skip_bad_lines, max_share=max_bad_share)
        steps = Steps()
        parts = [read_session_lines(file, bad, lines) for file in files]
        refuse_copies(files, [Content().add(part) for part in parts])
        bad.check_share(sum(map(len, parts)))
        parts, item_ids = _numbered(parts)
        steps.record("read", parts, "")
        if input is not None:
            val_users = val_users or max_val_sessions
            splits = _leave_one_out(parts[0], item_ids, val_users, seed, earlier, steps)
        else:
            splits = _given(parts, val, max_val_sessions, seed, steps)
        return write_splits(
            writer,
            [splits],
            item_ids=item_ids,
            catalogue=in_order_of_appearance([splits.period]),
            name=name,
            protocol="every-step" if input is None else "last-item",
            source="sequences",
            options={
                **{option: str(file) if file else None for option, file in given.items()},
                "lines": lines,
                "val_share": None if val or input else VAL_SHARE,
                "val_users": val_users,
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


def _check_files(
    train: Path | None,
    test: Path | None,
    val: Path | None,
    histories: Path | None,
    val_users: ValUsers | None,
) -> None:
    """Raise InputError unless the files are one of histories, or one of train and one of test."""
    if (train is None) != (test is None) or (train is None) == (histories is None):
        raise InputError(
            "expected --train and --test, or --input for whole histories to split leave-one-out"
        )
    if histories is not None and val is not None:
        raise InputError("--val goes with --train and --test: files that are already split")
    if val_users is not None:
        check_val_users(val_users)
        if histories is None:
            raise InputError("--val-users has no effect with --train and --test: leave it out")


def _numbered(parts: list[Sessions]) -> tuple[list[Sessions], np.ndarray]:
    """Return the parts with items as positions in their distinct original ids, and these ids."""
    distinct, positions = np.unique(
        np.concatenate([part.items for part in parts]), return_inverse=True
    )
    bounds = np.cumsum([0, *(len(part.items) for part in parts)])
    numbered = [
        replace(part, items=positions[start:end].astype(np.int32))
        for part, start, end in zip(parts, bounds[:-1], bounds[1:], strict=True)
    ]
    return numbered, distinct


def _leave_one_out(
    histories: Sessions,
    item_ids: np.ndarray,
    val_users: ValUsers,
    seed: int,
    earlier: Earlier | None,
    steps: Steps,
) -> Splits:
    if earlier is not None:
        histories = earlier.known_histories(histories, earlier.numbers(item_ids) > 0, steps)
    histories = drop_short(histories, 3)
    steps.record("short histories", [histories], "fewer than 3 events")
    return split_last_two(histories, val_users, seed, steps)


def _given(
    parts: list[Sessions], val: Path | None, max_val_sessions: int, seed: int, steps: Steps
) -> Splits:
    """Return the splits of train, perhaps val, and test."""
    parts = [drop_short(part, 2) for part in parts]
    steps.record("short sessions", parts, "fewer than 2 events")
    if val:
        refuse_empty_val(len(parts[1]), val, 2)
    period = joined(parts[:-1])
    val_sessions = len(parts[1]) if val else int(len(period) * VAL_SHARE)
    rows = np.arange(len(period))
    cut = len(period) - val_sessions
    sampled = sample(take(period, rows[cut:]), max_val_sessions, seed, steps)
    return Splits(period, take(period, rows[:cut]), sampled, parts[-1])
