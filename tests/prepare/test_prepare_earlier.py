"""`--catalogue`: new data under the numbers of an earlier dataset or checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.books import assert_balanced
from helpers.checkpoints import random_checkpoint
from helpers.click_logs import write_diginetica, write_yoochoose
from helpers.datasets import random_sessions, write_dataset

from tron_cli.checkpoint import load_checkpoint
from tron_cli.data.dataset import SPLITS, Dataset
from tron_cli.errors import InputError
from tron_cli.prepare.earlier import earlier_catalogue
from tron_cli.prepare.sources.diginetica import prepare_diginetica
from tron_cli.prepare.sources.ml1m import prepare_ml1m
from tron_cli.prepare.sources.otto import prepare_otto
from tron_cli.prepare.sources.sequences import prepare_sequences
from tron_cli.prepare.sources.table import TableColumns, prepare_table
from tron_cli.prepare.sources.yoochoose import prepare_yoochoose

DAY = 86_400_000
START = 1_700_000_000_000
SESSION = TableColumns("item", "time", session="session")
USER = TableColumns("item", "time", user="session")
OLD = np.array([37, 5, 990, 21, 4, 11, 30, -8, 2**40, 13, 26, 8])  # the earlier items, unordered
Command = Callable[..., tuple[int, str, str]]
Event = tuple[int, int, int]  # session, item, time


@pytest.fixture
def log(rng: np.random.Generator) -> list[Event]:
    """Draw 400 sessions in 20 days on items 0..39, of which the earlier catalogue has ten."""
    return [
        (session, int(rng.integers(40)), START + session * DAY // 20 + n * 1000)
        for session in range(400)
        for n in range(int(rng.integers(1, 9)))
    ]


def as_table(rows: list[Event], folder: Path, **options: Any) -> Dataset:
    file = folder / "log.csv"
    lines = "".join(f"{session},{item},{at}\n" for session, item, at in rows)
    file.write_text("session,item,time\n" + lines)
    columns = USER if options.get("leave_one_out") else SESSION
    return prepare_table(file, columns, folder, "new", min_item_count=1, **options)


def as_sequences(rows: list[Event], folder: Path, **options: Any) -> Dataset:
    for name, part in (("train", range(350)), ("test", range(350, 400))):
        lines = [" ".join(str(item) for s, item, _ in rows if s == session) for session in part]
        (folder / name).write_text("\n".join(lines) + "\n")
    return prepare_sequences(folder / "train", folder / "test", folder, "new", **options)


def as_otto(rows: list[Event], folder: Path, **options: Any) -> Dataset:
    for name, part in (("train", range(350)), ("test", range(350, 400))):
        with (folder / f"otto-recsys-{name}.jsonl").open("w") as file:
            for session in part:
                events = [
                    {"aid": item, "ts": at, "type": "clicks"}
                    for of, item, at in rows
                    if of == session
                ]
                file.write(json.dumps({"session": session, "events": events}) + "\n")
    return prepare_otto(folder, folder, "new", **options)


def as_yoochoose(rows: list[Event], folder: Path, **options: Any) -> Dataset:
    return prepare_yoochoose(write_yoochoose(folder / "y", rows), folder, "new", **options)


def as_diginetica(rows: list[Event], folder: Path, **options: Any) -> Dataset:
    return prepare_diginetica(
        write_diginetica(folder / "d", rows), folder, "new", val_days=3, **options
    )


def as_ml1m(rows: list[Event], folder: Path, **options: Any) -> Dataset:
    (folder / "m").write_text("".join(f"{user + 1} {item}\n" for user, item, _ in rows))
    return prepare_ml1m(folder / "m", folder, "new", **options)


def by_id(data: Dataset, split: str) -> list[list[int]]:
    sessions, ids = data.checked_split(split), data.item_ids
    return [ids[sessions[row] - 1].tolist() for row in range(len(sessions))]


def without_unknown(row: list[int]) -> list[int]:
    return [item for item in row if item in OLD]


@pytest.mark.parametrize("prepare", [as_table, as_sequences, as_otto, as_yoochoose, as_diginetica])
def test_sessions_lose_what_an_earlier_catalogue_lacks(
    tmp_path: Path, log: list[Event], prepare: Callable[..., Dataset]
) -> None:
    """All else is as without it, the numbers are the earlier ones, and the books balance."""
    whole = prepare(log, tmp_path)
    assert whole.split_info("test")["lost_predictions"] == 0
    plain = {split: by_id(whole, split) for split in SPLITS}
    old = write_dataset(tmp_path, name="old", item_ids=OLD)
    data = prepare(log, tmp_path, catalogue="old", force=True)
    assert data.item_ids.tolist() == OLD.tolist()
    assert data.catalogue_fingerprint == old.catalogue_fingerprint
    assert data.info["options"]["catalogue"] == "old"
    for split, rows in plain.items():
        left = [without_unknown(row) for row in rows]
        assert by_id(data, split) == [row for row in left if len(row) > 1]
        info = data.split_info(split)
        unseen = sum(map(len, rows)) - sum(map(len, left))
        if prepare is as_otto and split == "test":  # there unknown items are dropped first
            sessions = [session for session, *_ in log if session >= 350]
            unseen += sum(
                sessions.count(session) == 1 and item not in OLD
                for session, item, _ in log
                if session >= 350
            )
        assert info["unseen_events"] == unseen > 0
        lost = [max(len(a) - 1, 0) - max(len(b) - 1, 0) for a, b in zip(rows, left, strict=True)]
        if split != "train":
            lost_of_sessions = data.lost_of_sessions(split)
            assert lost_of_sessions is not None
            assert lost_of_sessions.sum() == info["lost_predictions"] == sum(lost) > 0
            kept = [of for of, row in zip(lost, left, strict=True) if len(row) > 1]
            assert lost_of_sessions[: len(kept)].tolist() == kept
    train = {item for row in by_id(data, "train") for item in row}
    assert data.info["items_unseen_in_train"] == len(OLD) - len(train) >= 3
    assert_balanced(data, events=len(log))


@pytest.mark.parametrize("prepare", [as_table, as_ml1m])
def test_histories_keep_an_unknown_target_only_to_count_it_as_lost(
    tmp_path: Path, log: list[Event], prepare: Callable[..., Dataset]
) -> None:
    write_dataset(tmp_path, name="old", item_ids=OLD)
    options = {"leave_one_out": True} if prepare is as_table else {}
    data = prepare(log, tmp_path, catalogue="old", **options)
    histories: dict[int, list[int]] = {}
    for user, item, _ in log:
        histories.setdefault(user, []).append(item)
    rows = [[*without_unknown(row[:-1]), row[-1]] for row in histories.values()]
    rows = [row for row in rows if len(row) > 2]
    assert by_id(data, "test") == [row for row in rows if row[-1] in OLD]
    lost = sum(row[-1] not in OLD for row in rows)
    assert data.split_info("test")["lost_predictions"] == lost > 0
    if prepare is as_table:
        assert by_id(data, "val") == [row[:-1] for row in rows]
        assert by_id(data, "train") == [row[:-2] for row in rows if len(row) > 3]
    assert data.item_ids.tolist() == OLD.tolist()
    assert_balanced(data, events=len(log))


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_ids_of_a_checkpoint_are_read_as_torch_reads_them(
    tmp_path: Path, as_text: bool, last: bool, command: Command
) -> None:
    ids = np.array(["b", "7", "ü x", "", "a"], object) if as_text else OLD
    data = write_dataset(
        tmp_path, train=[[1, 2, 3], [2, 1]] * 4, val=[[1, 2]], test=[[1, 2]], item_ids=ids
    )
    (tmp_path / "runs").mkdir()
    checkpoint = random_checkpoint(data, tmp_path / "runs" / "model.pt")
    found: Path = tmp_path / "runs"
    if last:  # with the state of an optimizer and of random generators
        words = ["embedding_dim=4", "num_blocks=1", "max_epochs=1", "num_uniform_negatives=2"]
        places = ["--data-dir", tmp_path, "--output-dir", tmp_path, "--name", "run"]
        assert command("train", "--config", "config_synthetic.py", "dataset_name=tiny", *words,
                       "train_batch_size=4", "topk_sampling=False", *places)[0] == 0  # fmt: skip
        found = tmp_path / "run" / "last.pt"
        checkpoint = load_checkpoint(found)
    earlier = earlier_catalogue(str(found), tmp_path)
    assert earlier is not None
    assert earlier.item_ids.dtype == (object if as_text else np.int64)
    assert earlier.item_ids.tolist() == checkpoint.decoded_item_ids().tolist() == ids.tolist()


def test_this_week_s_export_under_last_week_s_checkpoint(
    tmp_path: Path, log: list[Event], command: Command
) -> None:
    """Prepared with its catalogue, it is evaluated as if nothing had changed."""
    (tmp_path / "old").mkdir()
    old = as_table([row for row in log if row[1] < 25], tmp_path / "old")
    checkpoint = random_checkpoint(old, tmp_path / "model.pt")
    lines = "".join(f"{session},{item},{at}\n" for session, item, at in log)
    (tmp_path / "new.csv").write_text("session,item,time\n" + lines)
    words = ["--input", tmp_path / "new.csv", "--session-col", "session", "--item-col", "item"]
    code, out, _ = command(
        "prepare", "table", *words, "--time-col", "time", "--name", "next", "--data-dir", tmp_path,
        "--catalogue", checkpoint.path,
    )  # fmt: skip
    assert code == 0
    assert f"unknown items (--catalogue {checkpoint.path} lacks them)" in out
    assert f"events of items that {checkpoint.path} lacks" in out
    code, out, err = command(
        "evaluate", checkpoint.path, "--dataset", "next", "--data-dir", tmp_path, "--json",
        "--full-sessions",
    )  # fmt: skip
    assert code == 0
    assert "other sessions" in err
    report = json.loads(out)
    assert "catalogue" not in report
    assert report["left_out"]["lost_predictions"] > 0
    figure = report["metrics"]["R@5"]
    assert 0 < figure["value_with_lost_as_misses"] < figure["value"]


def test_an_own_dataset_is_replaced_under_its_numbers(tmp_path: Path, log: list[Event]) -> None:
    first = as_table(log[:-100], tmp_path).item_ids.tolist()
    again = as_table(log[::-1], tmp_path, catalogue="new", force=True)
    assert again.item_ids.tolist() == first


def test_what_is_no_catalogue_is_refused_in_a_sentence(tmp_path: Path, log: list[Event]) -> None:
    data = write_dataset(tmp_path, name="old", test=[[1, 2]], item_ids=OLD)
    good = random_checkpoint(data, tmp_path / "good.pt").path
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:-200])
    flipped = bytearray(good.read_bytes())
    flipped[flipped.index(OLD.tobytes()) + 3] ^= 1
    (tmp_path / "flipped.pt").write_bytes(flipped)
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "code.pt")
    (tmp_path / "empty").mkdir()
    two = tmp_path / "two"
    two.mkdir()
    for name in "ab":
        shutil.copy(good, two / f"{name}.pt")
    strange = write_dataset(tmp_path, name="strange", test=[[1, 2]], item_ids=OLD + 500)
    text = write_dataset(
        tmp_path, name="text", test=[[1, 2]], item_ids=np.array(["x", "y"], object)
    )
    broken = shutil.copytree(data.path, tmp_path / "broken")
    np.save(broken / "item_ids.npy", OLD[::-1])
    for given, sentence in [
        ("nowhere", "expected a checkpoint"),
        ("", "expected a checkpoint"),
        (tmp_path / "empty", "expected a checkpoint"),
        (tmp_path / "none.pt", "expected a checkpoint"),
        (tmp_path / "cut.pt", "damaged or no tron checkpoint"),
        (tmp_path / "flipped.pt", "damaged or no tron checkpoint"),
        (tmp_path / "text.pt", "damaged or no tron checkpoint"),
        (tmp_path / "foreign.pt", "damaged or no tron checkpoint"),
        (tmp_path / "code.pt", "damaged or no tron checkpoint"),
        (two, "one finished checkpoint"),
        (broken, "list of item ids"),
        (strange.path, "none of the 40 items"),
        (text.path, "its ids are like x, y, the source's like "),
    ]:
        for prepare in (as_table, as_otto):
            with pytest.raises(InputError) as error:
                prepare(log, tmp_path, catalogue=str(given))
            assert sentence in str(error.value)
            assert len(str(error.value)) < 500
            assert not (tmp_path / "new").exists()


def test_a_split_of_unknown_items_only_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    write_dataset(tmp_path, name="old", item_ids=np.arange(1, 11))
    for name, rows in (
        ("a", random_sessions(rng, 50, 10)),
        ("b", [[item + 10 for item in row] for row in random_sessions(rng, 50, 10)]),
    ):
        (tmp_path / name).write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
    for train, test, split in (("a", "b", "test"), ("b", "a", "train")):
        with pytest.raises(InputError, match=rf"for the {split} split: .* items .* old has 0"):
            prepare_sequences(tmp_path / train, tmp_path / test, tmp_path, "new", catalogue="old")
