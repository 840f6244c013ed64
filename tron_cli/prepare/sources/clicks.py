"""TRON's preparation of a log of clicks, split by time; for Yoochoose and Diginetica."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tron_cli.data.dataset import Dataset, DatasetWriter
from tron_cli.prepare.earlier import earlier_catalogue
from tron_cli.prepare.fetching.raw import locate
from tron_cli.prepare.filters import Steps, Support
from tron_cli.prepare.reading.bad_lines import BadLines
from tron_cli.prepare.reading.columns import Columns
from tron_cli.prepare.sessions import collect_events, to_sessions
from tron_cli.prepare.split import Rule, Timeline, split_by_time
from tron_cli.prepare.write import dataset_path, in_order_of_appearance, write_splits

MIN_SESSION_LENGTH = 2
MIN_ITEM_COUNT = 5


@dataclass(frozen=True)
class ClickLog:
    """Published log of clicks: its file, how it is read, and how it is split.

    read: yields blocks of the raw file with int64 columns session, item and time (ms, UTC).
    """

    source: str
    raw_file: str
    read: Callable[[Path, BadLines], Iterator[Columns]]
    rule: Rule
    test_days: float
    val_days: float


def prepare_clicks(
    log: ClickLog,
    raw: Path | None,
    data_dir: Path,
    name: str | None = None,
    *,
    force: bool = False,
    val_days: float | None = None,
    max_val_sessions: int = 100_000,
    seed: int = 42,
    skip_bad_lines: bool = False,
    catalogue: str | None = None,
) -> Dataset:
    """Filter and split as TRON does, in UTC; `name` and `val_days` are those of the log if None."""
    name = log.source if name is None else name
    val_days = log.val_days if val_days is None else val_days
    with DatasetWriter(dataset_path(data_dir, name, raw), force=force) as writer:
        earlier = earlier_catalogue(catalogue, data_dir)
        file = locate(log.source, raw, data_dir)[log.raw_file]
        bad = BadLines(skip=skip_bad_lines)
        events = collect_events(file, log.read(file, bad), bad)
        steps = Steps()
        sessions = to_sessions(events)
        steps.record("read", [sessions], "")
        support = Support(
            steps, min_session_length=MIN_SESSION_LENGTH, min_item_count=MIN_ITEM_COUNT
        )
        (sessions,) = support.supported(support.shortened([sessions]))
        split = split_by_time(
            Timeline.of([sessions], log.rule),
            test_days=log.test_days,
            val_days=val_days,
            max_val_sessions=max_val_sessions,
            seed=seed,
            latest=events.latest,
        )
        splits = split(sessions, slice(None), steps)
        return write_splits(
            writer,
            [splits],
            item_ids=events.item_ids,
            catalogue=in_order_of_appearance([splits.period]),
            name=name,
            protocol="every-step",
            source=log.source,
            options={
                "raw": str(raw) if raw else None,
                "min_session_length": MIN_SESSION_LENGTH,
                "min_item_count": MIN_ITEM_COUNT,
                "test_days": log.test_days,
                "val_days": val_days,
                "max_val_sessions": max_val_sessions,
                "seed": seed,
                "skip_bad_lines": skip_bad_lines,
                "catalogue": catalogue,
            },
            files=[file],
            steps=steps,
            bad=bad,
            earlier=earlier,
        )
