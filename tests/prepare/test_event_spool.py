"""Events of a log spooled in parts: the same dataset, byte for byte, with any number of parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tables import MINUTE, shop

import tron_cli
from tron_cli.prepare import event_spool, session_files
from tron_cli.prepare.event_spool import EventSpool


def contents(dataset: tron_cli.Dataset) -> dict[str, bytes]:
    files = [path for path in dataset.path.rglob("*") if path.is_file()]
    found = {str(path.relative_to(dataset.path)): path.read_bytes() for path in files}
    found["dataset.json"] = found["dataset.json"].replace(f'"{dataset.name}"'.encode(), b'""')
    return found


@pytest.mark.parametrize(
    ("tables", "options"),
    [
        ("input", {"user_col": "user", "session_gap": "30m", "val_from": "2023-11-20"}),
        ("input", {"session_col": "visit", "user_col": "user", "drop_duplicates": True}),
        ("input", {"session_col": "user", "test_days": 3, "min_item_count": 3}),
        ("input", {"user_col": "user", "split": "leave-one-out", "val_users": 20}),
        ("train val test", {"session_col": "visit", "user_col": "user", "drop_duplicates": True}),
    ],
)
def test_the_dataset_does_not_depend_on_the_number_of_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tables: str, options: dict[str, Any]
) -> None:
    """Logs with many ties of time, bad lines and quotes."""
    rng = np.random.default_rng(len(options))
    rows = shop(rng, users=120, days=14)
    lines = [
        f'"{user}",{rng.integers(3)},"{item}",{at // (60 * MINUTE) * 60 * MINUTE}'
        for user, item, at, _ in rows
    ]
    for at in rng.integers(len(lines), size=7).tolist():
        lines[at] = str(rng.choice(["broken", "u1,1,,5", 'u1,1,"i3,yesterday']))
    third = len(lines) // 3
    files = []
    for number in range(3):
        files.append(tmp_path / f"{number}.csv")
        part = lines[number * third : (number + 1) * third]
        files[-1].write_text("\n".join(["user,visit,item,time", *part]) + "\n")
    names = tables.split()
    given = dict(zip(names, files, strict=True)) if len(names) == 3 else {"input": files}

    def prepared(name: str) -> dict[str, bytes]:
        return contents(
            tron_cli.prepare(
                "table", name=name, data_dir=tmp_path / "data", item_col="item", time_col="time",
                skip_bad_lines=True, **given, **options,
            )
        )  # fmt: skip

    whole = prepared("whole")
    monkeypatch.setattr(event_spool, "PART_EVENTS", 16)
    divided = EventSpool.divide

    def divide(spool: EventSpool) -> None:
        divided(spool)
        parts.append(spool.parts)

    parts: list[int] = []
    monkeypatch.setattr(EventSpool, "divide", divide)
    assert prepared("parts") == whole
    monkeypatch.setattr(event_spool, "_EVENT_BYTES", 1 << 20)  # as if compressed: divided later
    assert prepared("divided") == whole
    assert min(parts) > 20


def test_items_are_numbered_as_they_appear_whatever_the_size_of_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source has no times, and is one part."""
    monkeypatch.setattr(session_files, "CHUNK_SESSIONS", 7)
    rng = np.random.default_rng(0)
    lines = [rng.integers(0, 10 + number, 3).tolist() for number in range(100)]
    for name, part in (("train", lines), ("test", lines[::-3])):
        text = "".join(" ".join(map(str, items)) + "\n" for items in part)
        (tmp_path / name).write_text(text)
    data = tron_cli.prepare(
        "sequences", name="x", data_dir=tmp_path, train=tmp_path / "train", test=tmp_path / "test"
    )
    expected = list(dict.fromkeys(item for items in lines for item in items))
    assert data.item_ids.tolist() == expected


def test_a_part_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part holds many more events than its share."""
    rows = shop(np.random.default_rng(1), users=500, days=20)
    file = tmp_path / "log.csv"
    file.write_text("user,item,time\n" + "".join(f"{u},{i},{t}\n" for u, i, t, _ in rows))
    monkeypatch.setattr(event_spool, "PART_EVENTS", len(rows) // 12)
    sizes = []
    events = EventSpool.events

    def counted(spool: EventSpool, table: int, part: int) -> Any:
        found = events(spool, table, part)
        sizes.append(len(found[0]))
        return found

    monkeypatch.setattr(EventSpool, "events", counted)
    tron_cli.prepare(
        "table", name="log", data_dir=tmp_path, input=file, user_col="user", item_col="item",
        time_col="time",
    )  # fmt: skip
    assert sum(sizes) == len(rows)
    assert len(sizes) >= 8
    assert max(sizes) < 2 * len(rows) / 8
