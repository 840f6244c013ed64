"""ML-1M (gSASRec's split) and files of one session per line, against published counts and files."""

from __future__ import annotations

import gzip
import hashlib
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tron_cli.data.dataset import Dataset
from tron_cli.errors import InputError
from tron_cli.prepare.reading.session_lines import Layout
from tron_cli.prepare.sources.ml1m import prepare_ml1m
from tron_cli.prepare.sources.sequences import prepare_sequences
from tron_cli.prepare.split import ValUsers

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")


def rows(dataset: Dataset, split: str) -> list[list[int]]:
    """The sessions of a split with the original item ids."""
    sessions = dataset.split(split)
    return [dataset.item_ids[sessions[s] - 1].tolist() for s in range(len(sessions))]


def write_lines(path: Path, sessions: list[list[int]]) -> Path:
    path.write_text("".join(" ".join(map(str, items)) + "\n" for items in sessions))
    return path


# ML-1M ----------------------------------------------------------------------------------------


def git_blob(lines: list[list[int]]) -> str:
    """The id that git gives to a file with these lines."""
    content = "".join(" ".join(map(str, line)) + "\n" for line in lines).encode()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@needs_shared
def test_ml1m_is_gsasrecs_split_byte_for_byte(tmp_path: Path) -> None:
    """Its repository's files are known by their git blob ids."""
    dataset = prepare_ml1m(SHARED / "ml1m_kang" / "ml-1m.txt.gz", tmp_path)
    assert (dataset.protocol, dataset.num_items) == ("last-item", 3_416)
    assert dataset.item_ids.tolist() == list(range(1, 3_417))
    train, val, test = (rows(dataset, split) for split in ("train", "val", "test"))
    assert git_blob(train) == "c26816ae7ae896a019b3d9c65976b2b16f5f5134"
    assert git_blob([row[:-1] for row in val]) == "9428513f63edb5ff067983c9079bb9b4d8fc0bd8"
    assert git_blob([row[-1:] for row in val]) == "7c4a6fd0198cc91bd446913c329c10a92c1dae54"
    assert git_blob([row[:-1] for row in test]) == "009c2fef0365c44c76946c1e22e745ededdb3799"
    assert git_blob([row[-1:] for row in test]) == "76cb73710956aa295d09cf63956a92e4aadb1730"
    test_info = dataset.split_info("test")
    assert (test_info["sessions"], test_info["events"]) == (6_040, 999_611)
    assert (test_info["unseen_events"], test_info["lost_predictions"]) == (0, 0)


def test_ml1m_compares_the_drawn_numbers_with_user_ids(tmp_path: Path) -> None:
    drawn = set(np.random.RandomState(42).choice(6040, 512, replace=False).tolist())
    raw = tmp_path / "ml-1m.txt"
    users = list(range(1, 201))[::-1]  # their place in the file is not their id
    raw.write_text("".join(f"{user} {item}\n" for user in users for item in (9, 2, user % 3, 7, 2)))
    dataset = prepare_ml1m(raw, tmp_path)
    assert dataset.item_ids.tolist() == [0, 1, 2, 7, 9]
    validating = [user for user in users if user in drawn]
    assert 5 < len(validating) < 50
    assert len(rows(dataset, "val")) == len(validating)
    assert rows(dataset, "test") == [[9, 2, user % 3, 7, 2] for user in users]
    assert rows(dataset, "train") == [[9, 2] if u in drawn else [9, 2, u % 3] for u in users]


def test_all_users_of_ml1m_validate_on_their_second_last_event(tmp_path: Path) -> None:
    raw = tmp_path / "ml-1m.txt"
    histories = [[9, 2, user % 3, 7, user] for user in range(1, 201)]
    raw.write_text("".join(f"{row[-1]} {item}\n" for row in histories for item in row))
    dataset = prepare_ml1m(raw, tmp_path, val_users="all")
    assert rows(dataset, "train") == [row[:-2] for row in histories]
    assert rows(dataset, "val") == [row[:-1] for row in histories]
    assert rows(dataset, "test") == [row for row in histories if row[-1] in (1, 2, 7, 9)]
    assert dataset.info["options"]["val_users"] == "all"


def test_a_number_of_users_of_ml1m_is_drawn_by_gsasrecs_rule(tmp_path: Path) -> None:
    raw = tmp_path / "ml-1m.txt"
    raw.write_text("".join(f"{user} {i}\n" for user in range(1, 201) for i in (1, 2, 3, 4, 1)))
    drawn = set(np.random.RandomState(42).choice(6040, 3000, replace=False).tolist())
    dataset = prepare_ml1m(raw, tmp_path, val_users=3000)
    train = [[1, 2] if user in drawn else [1, 2, 3] for user in range(1, 201)]
    assert rows(dataset, "train") == train
    assert len(rows(dataset, "val")) == len(drawn & set(range(1, 201)))
    for wrong in (0, 6041):
        with pytest.raises(InputError, match=rf"--val-users {wrong}: expected all, or a number fr"):
            prepare_ml1m(raw, tmp_path, val_users=wrong, force=True)


def test_ml1m_short_histories_and_lost_targets_are_counted(tmp_path: Path) -> None:
    raw = tmp_path / "ml-1m.txt"
    raw.write_text("1 1\n2 1\n1 2\n2 2\n\n1 3\n2 77\n1 1\n1 2\n3 1\n3 2\n4 1\n4 2\n4 3\n4 1\n")
    dataset = prepare_ml1m(raw, tmp_path)
    assert rows(dataset, "test") == [[1, 2, 3, 1, 2], [1, 2, 3, 1]]
    assert rows(dataset, "train") == [[1, 2, 3], [1, 2]]
    test = dataset.split_info("test")
    assert (test["unseen_events"], test["lost_predictions"]) == (1, 1)
    assert dataset.info["filters"][1]["dropped_sessions"] == 1
    steps = {step["step"]: step for step in dataset.info["filters"]}
    assert steps["short training histories"]["dropped_events"] == 1


def test_ml1m_bad_lines(tmp_path: Path) -> None:
    raw = tmp_path / "ml-1m.txt"
    raw.write_text("1 1\n1 2\n1 3\n1 2 978300760\n1 x\n1 1\n")
    with pytest.raises(
        InputError, match=r"ml-1m.txt, line 4: expected 2 integers .*, found '1 2 97"
    ):
        prepare_ml1m(raw, tmp_path)
    raw.write_text("1 1\n1 2\n1 3\n1 x\n1 2 978300760\n1 1\n2 2.0\n")
    with pytest.raises(InputError, match=r"line 4: expected 2 integers .*, found '1 x'"):
        prepare_ml1m(raw, tmp_path)
    dataset = prepare_ml1m(raw, tmp_path, skip_bad_lines=True)
    assert dataset.info["bad_lines"]["count"] == 3
    assert rows(dataset, "test") == [[1, 2, 3, 1]]


# One session per line ---------------------------------------------------------------------------


@needs_shared
def test_diginetica_sessions_have_the_published_counts(tmp_path: Path) -> None:
    folder = SHARED / "diginetica"
    train, test = folder / "train_sessions.txt.gz", folder / "test_sessions.txt.gz"
    dataset = prepare_sequences(train, test, tmp_path, "diginetica")
    assert (dataset.protocol, dataset.num_items) == ("every-step", 43_097)
    parts = [dataset.split_info(split) for split in ("train", "val")]
    assert sum(part["sessions"] for part in parts) == 186_670
    assert sum(part["events"] for part in parts) == 906_140
    assert parts[1]["sessions"] == 186_670 * 5 // 100
    info = dataset.split_info("test")
    assert (info["sessions"], info["events"]) == (15_963, 76_821)
    assert (info["unseen_events"], info["lost_predictions"]) == (0, 0)
    with gzip.open(train, "rt") as file:
        published = [list(map(int, line.split())) for line in file]
    assert rows(dataset, "train") + rows(dataset, "val") == published


@needs_shared
def test_yoochoose_1_64_keeps_account_of_every_published_prediction(tmp_path: Path) -> None:
    """The literature predicts 55,898 events of the test day; 369 items never occur in train."""
    folder = SHARED / "yoochoose1_64"
    train, test = folder / "train_sessions.txt.gz", folder / "test_sessions.txt.gz"
    dataset = prepare_sequences(train, test, tmp_path, "yoochoose")
    assert dataset.num_items == 17_376
    assert dataset.info["filters"][0]["items"] == 17_376 + 369
    info = dataset.split_info("test")
    predictions = info["events"] - info["sessions"]
    assert predictions + info["lost_predictions"] == 55_898
    with gzip.open(train, "rt") as file:
        known = {int(item) for line in file for item in line.split()}
    with gzip.open(test, "rt") as file:
        sessions = [[int(item) for item in line.split()] for line in file]
    kept = [[item for item in items if item in known] for items in sessions]
    assert rows(dataset, "test") == [items for items in kept if len(items) >= 2]
    assert info["unseen_events"] == sum(map(len, sessions)) - sum(map(len, kept))


session_lists = st.lists(st.lists(st.integers(0, 40), min_size=0, max_size=6), max_size=50)


@settings(max_examples=100, deadline=None)
@given(train=session_lists, val=st.none() | session_lists, test=session_lists)
def test_sequences_equal_brute_force(
    train: list[list[int]], val: list[list[int]] | None, test: list[list[int]]
) -> None:
    long_train, long_val, long_test = (
        [items for items in part if len(items) >= 2] for part in (train, val or [], test)
    )
    cut = len(long_train) if val is not None else len(long_train) - len(long_train) * 5 // 100
    expected_train = long_train[:cut]
    expected_val = long_val if val is not None else long_train[cut:]
    catalogue = list(dict.fromkeys(i for s in expected_train + expected_val for i in s))
    seen = [[item for item in items if item in catalogue] for items in long_test]
    expected_test = [items for items in seen if len(items) >= 2]
    parts = [[items for items in part if items] for part in (train, val, test) if part is not None]
    is_copied = any(one == other for one, other in combinations(parts, 2))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [write_lines(folder / "train", train), write_lines(folder / "test", test)]
        val_file = None if val is None else write_lines(folder / "val", val)
        has_no_val = val is not None and not long_val
        if not expected_train or not expected_test or has_no_val or is_copied:
            with pytest.raises(InputError):
                prepare_sequences(*files, folder, "out", val=val_file)
            assert not (folder / "out").exists()
            return
        dataset = prepare_sequences(*files, folder, "out", val=val_file)
        assert rows(dataset, "train") == expected_train
        assert rows(dataset, "val") == expected_val
        assert rows(dataset, "test") == expected_test
        assert dataset.item_ids.tolist() == catalogue
        info = dataset.split_info("test")
        assert info["unseen_events"] == sum(map(len, long_test)) - sum(map(len, seen))
        assert info["lost_predictions"] == sum(len(s) - 1 for s in long_test) - sum(
            len(s) - 1 for s in expected_test
        )


histories = st.dictionaries(
    st.integers(1, 99), st.lists(st.integers(0, 12), min_size=1, max_size=7), min_size=1
)


@settings(max_examples=60, deadline=None)
@given(
    histories=histories,
    lines=st.sampled_from(["items", "user-items", "user-item"]),
    val_users=st.just("all") | st.none() | st.integers(1, 9),
)
def test_histories_of_lines_are_split_leave_one_out(
    histories: dict[int, list[int]], lines: Layout, val_users: ValUsers | None
) -> None:
    whole = {user: items for user, items in histories.items() if len(items) >= 3}
    known = {item for items in whole.values() for item in items[:-1]}
    test = [items for items in whole.values() if items[-1] in known]
    train = [items[:-2] for items in whole.values() if len(items) >= 4]
    written = [[user, *items] if lines == "user-items" else items
               for user, items in histories.items()]  # fmt: skip
    if lines == "user-item":  # the events of the users are mixed
        longest = max(map(len, histories.values()))
        written = [
            [user, items[place]]
            for place in range(longest)
            for user, items in histories.items()
            if place < len(items)
        ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_lines(folder / "lines", written)
        options: dict[str, Any] = {"input": file, "lines": lines, "val_users": val_users}
        if not train or not test:
            with pytest.raises(InputError, match="no session is left"):
                prepare_sequences(None, None, folder, "out", **options)
            return
        dataset = prepare_sequences(None, None, folder, "out", **options)
        assert dataset.protocol == "last-item"
        assert rows(dataset, "train") == train
        assert rows(dataset, "test") == test
        val = rows(dataset, "val")
        every = [items[:-1] for items in whole.values()]
        if isinstance(val_users, int):
            assert len(val) == min(val_users, len(every))
            assert all(items in every for items in val)
        else:
            assert val == every
        users = dataset.user_ids("test")
        if lines != "items":
            assert users is not None
            kept = [user for user, items in whole.items() if items[-1] in known]
            assert users[np.arange(len(test))].tolist() == kept


@needs_shared
def test_both_versions_of_beauty_have_the_published_counts(tmp_path: Path) -> None:
    for name, layout, users, events, items in (
        ("amazon_beauty_5core", "user-items", 22_363, 198_502, 12_101),
        ("amazon_beauty_bert4rec", "user-item", 40_226, 353_962, 54_542),
    ):
        options: dict[str, Any] = {"lines": layout, "val_users": "all"}
        file = SHARED / name / "beauty.txt.gz"
        dataset = prepare_sequences(None, None, tmp_path, name, input=file, **options)
        read = dataset.info["filters"][0]
        assert (read["sessions"], read["events"], read["items"]) == (users, events, items)
        assert dataset.split_info("val")["sessions"] == users


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "expected --train and --test, or --input"),
        ({"train": "a"}, "expected --train and --test, or --input"),
        ({"train": "a", "test": "b", "input": "c"}, "expected --train and --test, or --input"),
        ({"input": "a", "val": "b"}, "--val goes with --train and --test"),
        ({"train": "a", "test": "b", "val_users": 5}, "--val-users has no effect with --train and"),
        ({"input": "a", "val_users": 0}, "--val-users 0: expected all, or a number of at least 1"),
        (
            {"input": "a", "lines": "user-items"},
            "a, line 3: user 1 has a history in line 1 already",
        ),
    ],
)
def test_files_of_sequences_that_make_no_sense(
    tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    write_lines(tmp_path / "a", [[1, 2, 3, 4], [2, 3, 4], [1, 3, 4]])
    given = {
        key: tmp_path / value if key in ("train", "test", "val", "input") else value
        for key, value in options.items()
    }
    with pytest.raises(InputError, match=problem):
        prepare_sequences(
            given.pop("train", None), given.pop("test", None), tmp_path, "out", **given
        )
    assert not (tmp_path / "out").exists()


def test_separators_gzip_crlf_and_a_missing_last_line_end(tmp_path: Path) -> None:
    train, test = tmp_path / "train.gz", tmp_path / "test"
    train.write_bytes(gzip.compress(b"1 2 3\r\n\r\n 12,\t 999999999999999999  \n2\t3 "))
    test.write_bytes(b"3,2,1")
    dataset = prepare_sequences(train, test, tmp_path, "out")
    assert rows(dataset, "train") == [[1, 2, 3], [12, 999_999_999_999_999_999], [2, 3]]
    assert rows(dataset, "test") == [[3, 2, 1]]


def test_val_is_a_seeded_sample_of_at_most_so_many(tmp_path: Path) -> None:
    sessions = [[1, 2, number] for number in range(400)]
    train, test = (
        write_lines(tmp_path / "train", sessions),
        write_lines(tmp_path / "test", [[1, 2]]),
    )
    dataset = prepare_sequences(train, test, tmp_path, "out", max_val_sessions=7)
    val = rows(dataset, "val")
    assert len(val) == 7
    assert val == sorted(val)
    assert all(session in sessions[380:] for session in val)
    assert dataset.num_items == 400  # also the items of sessions beyond the sample
    steps = {step["step"]: step for step in dataset.info["filters"]}
    assert steps["validation sample"]["dropped_sessions"] == 13


@pytest.mark.parametrize(
    "bad", ["1 2.5 3", "1 -2 3", "a b", "1 2\x00", "1 9999999999999999999", "1,,2", "1 , \t,2"]
)
def test_sequences_name_a_bad_line_or_skip_it(tmp_path: Path, bad: str) -> None:
    train, test = tmp_path / "train", write_lines(tmp_path / "test", [[1, 2]])
    train.write_text(f"1 2\n\n{bad}\n2 1\n{bad}")
    with pytest.raises(InputError, match=r"train, line 3: expected integers"):
        prepare_sequences(train, test, tmp_path, "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test", "train"]
    dataset = prepare_sequences(train, test, tmp_path, "out", skip_bad_lines=True)
    assert rows(dataset, "train") == [[1, 2], [2, 1]]
    assert dataset.info["bad_lines"]["count"] == 2


def test_sequences_without_content(tmp_path: Path) -> None:
    good, empty, blank = (tmp_path / name for name in ("good", "empty", "blank"))
    write_lines(good, [[1, 2]])
    empty.touch()
    blank.write_text("\n \n")
    with pytest.raises(InputError, match="empty is empty"):
        prepare_sequences(empty, good, tmp_path, "out")
    with pytest.raises(InputError, match="blank holds no session"):
        prepare_sequences(good, blank, tmp_path, "out")
    with pytest.raises(InputError, match="missing"):
        prepare_sequences(tmp_path / "missing", good, tmp_path, "out")
    with pytest.raises(InputError, match="is a folder"):
        prepare_sequences(tmp_path, good, tmp_path, "out")
    blank.write_bytes(b"1 2\r3 4\r")
    with pytest.raises(InputError, match=r"blank ends its lines with \\r"):
        prepare_sequences(good, blank, tmp_path, "out")


@pytest.mark.parametrize("digits", [1, 18, 19])
def test_item_ids_up_to_the_largest_of_int64(tmp_path: Path, digits: int) -> None:
    ids = [10 ** (digits - 1), min(10**digits - 1, 2**63 - 1)]
    train = write_lines(tmp_path / "train.txt", [ids] * 40)
    test = write_lines(tmp_path / "test.txt", [ids[::-1]])
    dataset = prepare_sequences(train, test, tmp_path, "out")
    assert rows(dataset, "test") == [ids[::-1]]


@pytest.mark.parametrize("item", [2**63, 10**19 - 1, 10**19, 2**64, 2**64 + 5, 10**30])
def test_larger_ids_are_bad_lines(tmp_path: Path, item: int) -> None:
    train = write_lines(tmp_path / "train.txt", [[1, 2]] * 40 + [[1, item]])
    test = write_lines(tmp_path / "test.txt", [[2, 1]])
    with pytest.raises(
        InputError, match="line 41: expected integers from 0 to 9223372036854775807"
    ):
        prepare_sequences(train, test, tmp_path, "out")
    dataset = prepare_sequences(train, test, tmp_path, "out", skip_bad_lines=True)
    assert dataset.item_ids.tolist() == [1, 2]


@pytest.mark.parametrize("same", ["train test", "train val", "val test"])
@pytest.mark.parametrize("is_copy", [False, True])
def test_identical_files_are_refused(tmp_path: Path, same: str, is_copy: bool) -> None:
    files = {
        name: write_lines(tmp_path / f"{name}.txt", [[1, 2], [2, 3], [3, first]] * 20)
        for first, name in enumerate(("train", "val", "test"), 1)
    }
    one, other = same.split()
    if is_copy:  # spelled otherwise, and in another order
        lines = files[one].read_text().replace(" ", ",").splitlines()
        files[other].write_text("\n".join(lines[::-1]) + "\n\n")
    else:
        files[other] = files[one]
    with pytest.raises(InputError, match=rf"{one}\.txt and .* hold the same sessions"):
        prepare_sequences(files["train"], files["test"], tmp_path, "out", val=files["val"])


def test_validation_lines_of_which_none_is_left_are_refused(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train", [[1, 2]] * 9)
    test, val = write_lines(tmp_path / "test", [[2, 1]]), write_lines(tmp_path / "val", [[1], [2]])
    with pytest.raises(InputError, match=r"no session is left for the val split: .*val has none"):
        prepare_sequences(train, test, tmp_path, "out", val=val)


def test_test_items_that_training_lacks_are_named(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.txt", [[1, 2], [2, 3]] * 20)
    test = write_lines(tmp_path / "test.txt", [[11, 12], [12, 3]])
    problem = "for the test split: of the 3 different items of its 2 sessions, training has 1;"
    with pytest.raises(InputError, match=problem):
        prepare_sequences(train, test, tmp_path, "out")
