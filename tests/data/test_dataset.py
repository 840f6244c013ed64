"""Prepared datasets on disk: opening reads nothing, and an incomplete dataset is absent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.datasets import pack_sessions, random_sessions, write_dataset

from tron_cli.data.dataset import Dataset, DatasetWriter, Sessions
from tron_cli.errors import InputError

# Imports first, so that only what opening costs is measured.
OPEN_AND_LOOK = """
import json, sys, time
from pathlib import Path
import numpy as np
from tron_cli.data.dataset import Dataset

def resident():  # bytes
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

before, clock = resident(), time.perf_counter()
data = Dataset.open(Path(sys.argv[1]))
splits = [data.split(name) for name in ("train", "val", "test")]
ids = data.item_ids
last = splits[0][len(splits[0]) - 2]
seconds = time.perf_counter() - clock
print(json.dumps({"seconds": seconds, "bytes": resident() - before, "sessions": len(splits[0]),
                  "items": len(ids), "last": last.tolist()}))
"""


def sparse_array(file: Path, dtype: str, count: int, last: int = 0) -> None:
    """A .npy file of zeros, but for the last entry, that takes no space on disk."""
    with file.open("wb") as out:
        header = {"descr": dtype, "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(out, header)
        size = np.dtype(dtype).itemsize
        out.seek((count - 1) * size, os.SEEK_CUR)
        out.write(np.array(last, dtype).tobytes())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_opening_a_dataset_of_otto_s_size_takes_no_time_and_no_memory(tmp_path: Path) -> None:
    data = write_dataset(tmp_path, name="otto", train=[[1, 2]], test=[[1, 2]])
    for split, sessions, events in (("train", 13_000_000, 200_000_000), ("test", 10, 1000)):
        sparse_array(data.path / split / "items.npy", "<i4", events)
        sparse_array(data.path / split / "offsets.npy", "<i8", sessions + 1, last=events)
        sparse_array(data.path / split / "times.npy", "<i8", events)
        data.info["splits"][split] |= {"sessions": sessions, "events": events}
    sparse_array(data.path / "item_ids.npy", "<i8", 1_855_603)
    data.info["num_items"] = 1_855_603
    (data.path / "dataset.json").write_text(json.dumps(data.info))
    done = subprocess.run(
        [sys.executable, "-c", OPEN_AND_LOOK, str(data.path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert (found["sessions"], found["items"], found["last"]) == (13_000_000, 1_855_603, [])
    assert found["seconds"] < 1
    assert found["bytes"] < 5e6


def test_sessions_come_back_as_written(tmp_path: Path, rng: np.random.Generator) -> None:
    rows = random_sessions(rng, 50, 30, shortest=0)
    times = [rng.integers(0, 2**45, len(row)) for row in rows]

    with DatasetWriter(tmp_path / "shop") as writer:
        writer.write_items(np.arange(30))
        packed = pack_sessions(rows)
        whole = Sessions(packed.items, packed.offsets, np.concatenate(times))
        writer.write_split("train", [whole], note="kept")
        writer.write_split(
            "val", [pack_sessions(rows[:20]), pack_sessions([]), pack_sessions(rows[20:])]
        )
        writer.write_split("test", [])
        data = writer.finish(name="shop", protocol="every-step", source="here")

    train, val, test = (data.split(name) for name in ("train", "val", "test"))
    assert [row.tolist() for row in train] == rows
    assert [row.tolist() for row in val] == rows
    assert train.times is not None
    assert train.times.tolist() == np.concatenate(times).tolist()
    assert val.times is None
    span = (data.split_info("train")["first_time"], data.split_info("train")["last_time"])
    assert span == (np.concatenate(times).min(), np.concatenate(times).max())
    assert len(test) == 0
    assert test.items.dtype == train.items.dtype == np.int32
    assert train.lengths.tolist() == [len(row) for row in rows]
    info = data.split_info("train")
    assert (info["sessions"], info["events"]) == (50, sum(map(len, rows)))
    assert info["mean_length"] == pytest.approx(np.mean([len(row) for row in rows]))
    assert info["median_length"] == np.median([len(row) for row in rows])
    assert info["note"] == "kept"
    assert data.info["source"] == "here"
    assert data.split_info("val")["fingerprint"] == info["fingerprint"]
    assert data.split_info("test")["mean_length"] is None


def test_fingerprints_tell_contents_apart(tmp_path: Path) -> None:
    def prints(train: list[list[int]], ids: np.ndarray) -> tuple[str, str]:
        data = write_dataset(tmp_path, train=train, item_ids=ids)
        return data.split_info("train")["fingerprint"], data.catalogue_fingerprint

    ids = np.arange(4)
    base = prints([[1, 2], [3, 4]], ids)
    assert prints([[1, 2], [3, 4]], ids) == base
    assert prints([[1, 2, 3], [4]], ids)[0] != base[0]  # the same events, cut elsewhere
    assert prints([[2, 1], [3, 4]], ids)[0] != base[0]
    assert prints([[1, 2], [3, 4]], ids[::-1])[1] != base[1]
    assert prints([[1, 2], [3, 4]], ids.astype(str).astype(object))[1] != base[1]


@pytest.mark.parametrize(
    "ids",
    [
        np.array([5, -3, 2**62]),
        np.array([7, 8, 9], np.int32),
        np.array(["sku 1", "é", "100%"], dtype=object),
        np.array(["a", "b", "c"]),
        np.array(["x\u2028y", "x\u0085y", "tab\tbed"], dtype=object),
        np.array(["carriage\rreturn", " ", "7"], dtype=object),
    ],
)
def test_original_ids_come_back(ids: np.ndarray, tmp_path: Path) -> None:
    data = write_dataset(tmp_path, train=[[1, 2, 3]], item_ids=ids)
    assert data.item_ids.tolist() == ids.tolist()
    assert data.num_items == 3


def broken_off(path: Path, *, force: bool = False) -> None:
    """Write a dataset until Ctrl-C ends it after some arrays."""
    with DatasetWriter(path, force=force) as writer:
        writer.write_items(np.arange(3))
        writer.write_split("train", [pack_sessions([[2, 3]])])
        raise KeyboardInterrupt


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        broken_off(tmp_path / "shop")
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_the_dataset_that_force_would_replace(tmp_path: Path) -> None:
    write_dataset(tmp_path, name="shop", train=[[1, 2]])
    with pytest.raises(KeyboardInterrupt):
        broken_off(tmp_path / "shop", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["shop"]
    assert Dataset.open(tmp_path / "shop").split("train")[0].tolist() == [1, 2]


def test_an_existing_dataset_is_replaced_only_with_force(tmp_path: Path) -> None:
    write_dataset(tmp_path, name="shop", train=[[1, 2]], test=[[1, 2]])
    with pytest.raises(InputError, match="--force"):
        DatasetWriter(tmp_path / "shop")
    write_dataset(tmp_path, name="shop", train=[[2, 1, 3]], item_ids=np.array(["a", "b", "c"]))
    data = Dataset.open(tmp_path / "shop")
    assert data.split("train")[0].tolist() == [2, 1, 3]
    assert data.item_ids.tolist() == ["a", "b", "c"]
    assert len(data.split("test")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["shop"]


def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(InputError, match="cannot write"),
        DatasetWriter(tmp_path / "file" / "shop"),
    ):
        pass


@pytest.mark.parametrize("damage", ["no json", "not json", "future", "no array", "short array"])
def test_a_damaged_dataset_is_one_sentence(damage: str, tmp_path: Path) -> None:
    path = write_dataset(tmp_path, train=[[1, 2, 3]]).path
    info = path / "dataset.json"
    array = path / "train" / "items.npy"
    if damage == "no json":
        info.unlink()
    elif damage == "not json":
        info.write_text('{"name": ')
    elif damage == "future":
        info.write_text(json.dumps({**json.loads(info.read_text()), "format_version": 99}))
    elif damage == "no array":
        array.unlink()
    else:
        os.truncate(array, array.stat().st_size - 4)
    with pytest.raises(InputError, match="prepare") as error:
        Dataset.open(path).split("train")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_id_with_a_line_feed_is_refused_since_it_would_shift_all_later_ones(
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match="line feed"):
        write_dataset(tmp_path, train=[[1, 2]], item_ids=np.array(["a\nb", "c"], dtype=object))
    assert list(tmp_path.iterdir()) == []


def start(script: str, *words: object, says: str = "") -> subprocess.Popen[str]:
    """Start a Python process and wait until it prints `says`."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, words)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().strip() == says
    return process


# Writes some gigabytes, as it were, and goes on at a line of input.
PREPARE = """
import sys
from pathlib import Path
import numpy as np
from tron_cli.data.dataset import DatasetWriter, Sessions
with DatasetWriter(Path(sys.argv[1]), force=True) as writer:
    (getattr(writer, "scratch", Path(sys.argv[1]).parent) / "spool.bin").write_bytes(b"x" * 1000)
    writer.write_items(np.array([7, 8]))
    for split in ("train", "val", "test"):
        writer.write_split(split, [Sessions(np.array([1, 2], np.int32), np.array([0, 2]))])
    print("written", flush=True)
    sys.stdin.readline()
    writer.finish(name="shop", protocol="every-step")
"""


def test_two_preparations_of_one_name_are_refused_and_others_go_on(tmp_path: Path) -> None:
    first = start(PREPARE, tmp_path / "shop", says="written")
    with (
        pytest.raises(InputError, match=f"shop is being written by process {first.pid} "),
        DatasetWriter(tmp_path / "shop"),
    ):
        pass
    write_dataset(tmp_path, name="other")  # neither refused nor a danger to the first
    first.communicate("\n", timeout=60)
    assert first.returncode == 0
    assert Dataset.open(tmp_path / "shop").item_ids.tolist() == [7, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "shop"]


def test_what_a_killed_preparation_left_is_removed_by_the_next_of_any_name(tmp_path: Path) -> None:
    killed = start(PREPARE, tmp_path / "shop", says="written")
    live = start(PREPARE, tmp_path / "live", says="written")
    killed.kill()
    killed.wait()
    (tmp_path / ".old.partial-4711" / "train").mkdir(parents=True)  # of versions without locks
    (tmp_path / ".old.spool-ab_cd12").mkdir()
    (tmp_path / ".mine.partial").mkdir()
    (tmp_path / ".mine.partial" / "thesis.txt").write_text("years of work")
    write_dataset(tmp_path, name="other")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".live.lock", ".live.partial", ".mine.partial", "other"}
    live.communicate("\n", timeout=60)
    assert live.returncode == 0
    assert Dataset.open(tmp_path / "live").item_ids.tolist() == [7, 8]


# kill -9 when the dataset that is replaced has gone and the new one has not come.
KILLED_BETWEEN = (
    """
import os, shutil, signal
def fatal(move):
    def moved(source, target, **options):
        if str(target) == str(place):
            os.kill(os.getpid(), signal.SIGKILL)
        return move(source, target, **options)
    return moved
import sys
from pathlib import Path
place = Path(sys.argv[1])
os.replace, os.rename = fatal(os.replace), fatal(os.rename)
"""
    + PREPARE
)


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_kill_9_while_a_dataset_is_replaced_loses_nothing(tmp_path: Path) -> None:
    write_dataset(tmp_path, name="shop", train=[[3, 1, 2]])
    killed = start(KILLED_BETWEEN, tmp_path / "shop", says="written")
    killed.communicate("\n", timeout=60)
    assert killed.returncode == -signal.SIGKILL
    write_dataset(tmp_path, name="other")
    assert Dataset.open(tmp_path / "shop").split("train")[0].tolist() == [3, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "shop"]


@pytest.mark.parametrize("content", ["", "not json", "[]", '{"name": "my own"}'])
def test_force_needs_a_dataset_json_of_tron(content: str, tmp_path: Path) -> None:
    """The usual folders of somebody's own data are train, val and test too."""
    (tmp_path / "images" / "train").mkdir(parents=True)
    if content:
        (tmp_path / "images" / "dataset.json").write_text(content)
    with pytest.raises(InputError, match=r"no readable dataset\.json"):
        DatasetWriter(tmp_path / "images", force=True)
    shop = write_dataset(tmp_path, name="shop").path
    (shop / "train" / "cat.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"train/cat\.jpg"):
        DatasetWriter(shop, force=True)
    (tmp_path / "empty").mkdir()
    assert write_dataset(tmp_path, name="empty").num_items == 2


def test_a_linked_dataset_is_replaced_where_the_link_leads(tmp_path: Path) -> None:
    real = write_dataset(tmp_path / "disk", name="big").path
    (tmp_path / "data").mkdir()
    link = tmp_path / "data" / "shop"
    link.symlink_to(real)
    assert Dataset.open(link).name == "shop"
    write_dataset(tmp_path / "data", name="shop", train=[[2, 1, 2]])
    assert link.is_symlink()
    assert Dataset.open(real).split("train")[0].tolist() == [2, 1, 2]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["big"]
    shutil.rmtree(real)
    with pytest.raises(InputError, match=r"is a link to .*, which does not exist"):
        DatasetWriter(link, force=True)


DAMAGES = {
    "not an object": lambda path: (path / "dataset.json").write_text("[]"),
    "no name": lambda path: (path / "dataset.json").write_text('{"format_version": 1}'),
    "no item ids": lambda path: (path / "item_ids.npy").unlink(),
    "other item ids": lambda path: np.save(path / "item_ids.npy", np.arange(99)),
    "empty array": lambda path: (path / "train" / "items.npy").write_bytes(b""),
    "no array": lambda path: (path / "train" / "items.npy").unlink(),
    "fewer items": lambda path: np.save(path / "train" / "items.npy", np.ones(1, np.int32)),
    "fewer sessions": lambda path: np.save(path / "train" / "offsets.npy", np.array([0, 2])),
    "later offsets": lambda path: np.save(path / "train" / "offsets.npy", np.array([0, 2, 900])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_arrays_and_counts_that_do_not_fit_are_one_sentence(tmp_path: Path, damage: str) -> None:
    path = write_dataset(tmp_path, train=[[1, 2], [2, 1]]).path
    DAMAGES[damage](path)

    def read_everything() -> None:
        data = Dataset.open(path)
        assert len(data.item_ids) == len(data.split("train")) == 0

    with pytest.raises(InputError, match=r"prepare (it|the dataset) again") as caught:
        read_everything()
    assert str(path) in str(caught.value)


def test_force_replaces_datasets_only(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"holds other things \(thesis\.txt\)"):
        DatasetWriter(tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    shop = write_dataset(tmp_path, name="shop").path
    (shop / "events.csv").write_text("the source of the dataset, perhaps")
    with pytest.raises(InputError, match=r"events\.csv"):
        DatasetWriter(shop, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--force replaces prepared datasets only"):
        DatasetWriter(tmp_path / "file", force=True)


def test_a_copied_dataset_goes_by_the_name_of_its_folder(tmp_path: Path) -> None:
    shop = write_dataset(tmp_path, name="shop").path
    shutil.copytree(shop, tmp_path / "copy")
    assert Dataset.open(tmp_path / "copy").name == "copy"
