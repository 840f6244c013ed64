"""Cleaning drops what brute force finds, and counts it; repeats are named."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers.books import assert_balanced
from helpers.tables import SESSION, USER, unpack

from tron_cli.errors import InputError
from tron_cli.prepare.sources.otto import prepare_otto
from tron_cli.prepare.sources.sequences import prepare_sequences
from tron_cli.prepare.sources.table import prepare_table
from tron_cli.prepare.summary import summary_text

DAY = 86_400_000
START = 1_700_000_000_000


def log(seed: int) -> list[tuple[str, str, int]]:
    """(session, item, time): many equal times, repeats and exact duplicates, in no order."""
    rng = np.random.default_rng(seed)
    rows = []
    for session in range(150):
        at = START + session * DAY // 30
        for _ in range(int(rng.integers(1, 12))):
            rows.append((f"s{session}", f"i{rng.integers(3)}", at + int(rng.integers(4))))
    return [rows[at] for at in rng.permutation(len(rows))]


def write(path: Path, rows: list[tuple[str, str, int]]) -> Path:
    lines = ["user,item,time", *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def cleaned(
    rows: list[tuple[str, str, int]], duplicates: bool, repeats: bool, longest: int | None
) -> dict[str, list[tuple[int, str]]]:
    """The cleaned sessions, event by event."""
    sessions: dict[str, list[tuple[int, str]]] = {}
    for session, item, at in rows:
        sessions.setdefault(session, []).append((at, item))
    for session, events in sessions.items():
        events.sort(key=lambda event: event[0])
        if duplicates:
            events = list(dict.fromkeys(events))
        if repeats:
            first = [True, *(one[1] != two[1] for one, two in pairwise(events))]
            events = [event for event, keep in zip(events, first, strict=True) if keep]
        sessions[session] = events
    return {
        session: events
        for session, events in sessions.items()
        if len(events) >= 2 and (longest is None or len(events) <= longest)
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("duplicates", "repeats", "longest"),
    [(True, False, None), (False, True, None), (False, False, 5), (True, True, 4)],
)
def test_cleaning_equals_brute_force_and_is_counted(
    tmp_path: Path, seed: int, duplicates: bool, repeats: bool, longest: int | None
) -> None:
    rows = log(seed)
    dataset = prepare_table(
        write(tmp_path / "log.csv", rows),
        SESSION,
        tmp_path,
        "out",
        min_item_count=1,
        drop_duplicates=duplicates,
        collapse_repeats=repeats,
        max_session_length=longest,
    )
    expected = cleaned(rows, duplicates, repeats, longest)
    found = {}
    for split in ("train", "val", "test"):
        ids = dataset.session_ids(split)
        assert ids is not None
        found |= dict(zip(ids[np.arange(len(ids))], unpack(dataset, split), strict=True))
    assert found == expected
    assert_balanced(dataset, events=len(rows), sessions=150)
    steps = {step["step"]: step["dropped_events"] for step in dataset.info["filters"]}
    assert ("duplicates" in steps, "repeats" in steps, "long sessions" in steps) == (
        duplicates,
        repeats,
        longest is not None,
    )
    if duplicates:
        assert steps["duplicates"] == len(rows) - len(set(rows)) > 0
    for split in ("train", "val", "test"):
        parts = [[item for _, item in events] for events in unpack(dataset, split)]
        assert dataset.split_info(split)["repeated_events"] == sum(
            one == two for items in parts for one, two in pairwise(items)
        )


def test_events_of_a_travel_log_that_only_repeat_are_named(tmp_path: Path) -> None:
    rows = [
        (f"s{number}", f"i{(number + at // 17) % 5}", START + number * DAY // 10 + at)
        for number in range(100)
        for at in range(51)
    ]
    file = write(tmp_path / "log.csv", rows)
    text = summary_text(prepare_table(file, SESSION, tmp_path, "out"))
    assert "96.0 %" in text
    assert "follow another repeat its item" in text
    assert "--collapse-repeats" in text
    text = summary_text(prepare_table(file, SESSION, tmp_path, "other", collapse_repeats=True))
    assert "0.0 %" in text
    assert "--collapse-repeats" not in text


def test_share_of_repeats_is_printed_for_every_source(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("1 1 2\n2 1\n" * 20)
    (tmp_path / "test").write_text("1 1 2\n1 2 1\n")
    text = summary_text(prepare_sequences(tmp_path / "lines", tmp_path / "test", tmp_path, "out"))
    (row,) = (line.split() for line in text.splitlines() if line.startswith("test "))
    assert row == ["test", "2", "6", "3.00", "3", "3", "25.0", "%"]
    event = '{"aid":%d,"ts":%d,"type":"clicks"}'
    clicks = ",".join(event % (aid, START + at) for at, aid in enumerate((1, 1, 1, 2)))
    for part, sessions in (("train", 4), ("test", 3)):
        (tmp_path / f"otto-recsys-{part}.jsonl").write_text(
            f'{{"session":1,"events":[{clicks}]}}\n' * sessions
        )
    dataset = prepare_otto(tmp_path, tmp_path, val_days=0)
    assert dataset.split_info("test")["repeated_events"] == 6
    assert "66.7 %" in summary_text(dataset)
    assert "--collapse-repeats" not in summary_text(dataset)  # which this source has not


def test_duplicates_are_counted_where_they_stay(tmp_path: Path) -> None:
    rows = log(1)
    file = write(tmp_path / "log.csv", rows)
    text = summary_text(prepare_table(file, SESSION, tmp_path, "out", min_item_count=1))
    assert f"(same session, item and time): {len(rows) - len(set(rows)):,}; --drop" in text
    assert "--drop-duplicates" in text
    dropped = prepare_table(file, SESSION, tmp_path, "other", drop_duplicates=True)
    assert "--drop-duplicates" not in summary_text(dropped)
    plain = prepare_table(write(tmp_path / "b.csv", sorted(set(rows))), USER, tmp_path, "third")
    assert "exact duplicates" not in summary_text(plain)


def test_a_longest_session_below_the_shortest_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "log.csv", log(1))
    with pytest.raises(InputError, match=r"--max-session-length 3 .*--min-session-length 4"):
        prepare_table(file, SESSION, tmp_path, "out", min_session_length=4, max_session_length=3)
    with pytest.raises(InputError, match=r"--max-session-length 2 .* leave-one-out needs 3"):
        prepare_table(file, USER, tmp_path, "out", leave_one_out=True, max_session_length=2)


@pytest.mark.parametrize(("share", "passes"), [(0.1, True), (0.09, False)])
def test_bad_lines_are_skipped_up_to_a_share(tmp_path: Path, share: float, passes: bool) -> None:
    rows = [(f"s{n // 3}", f"i{n % 5}", START + n // 3 * DAY // 10 + n) for n in range(900)]
    file = write(tmp_path / "log.csv", rows)
    with file.open("a") as out:
        out.write("s1,i1,never\n" * 100)
    if passes:
        dataset = prepare_table(
            file, SESSION, tmp_path, "out", skip_bad_lines=True, max_bad_share=share
        )
        assert dataset.info["bad_lines"]["count"] == 100
        return
    with pytest.raises(InputError) as error:
        prepare_table(file, SESSION, tmp_path, "out", skip_bad_lines=True, max_bad_share=share)
    sentence = str(error.value)
    assert "100 of 1,000 lines (0.1 of them) are bad" in sentence
    assert "--max-bad-share 0.09" in sentence
    assert "log.csv, line 902" in sentence


def test_a_share_of_bad_lines_needs_skipping(tmp_path: Path) -> None:
    file = write(tmp_path / "log.csv", log(1))
    with pytest.raises(InputError, match="--max-bad-share goes with --skip-bad-lines"):
        prepare_table(file, SESSION, tmp_path, "out", max_bad_share=0.5)


def test_sequences_limit_bad_lines_too(tmp_path: Path) -> None:
    (tmp_path / "train").write_text("1 2 3\n" * 30 + "x\n")
    (tmp_path / "test").write_text("1 2 3\n")
    with pytest.raises(InputError, match=r"1 of 32 lines .* --max-bad-share 0.01"):
        prepare_sequences(
            tmp_path / "train", tmp_path / "test", tmp_path, "out",
            skip_bad_lines=True, max_bad_share=0.01,
        )  # fmt: skip
