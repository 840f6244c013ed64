"""`tron import`: networks of otto-de/TRON and gSASRec-pytorch compute what they did there."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from helpers.datasets import random_sessions, write_dataset
from helpers.packed import states
from helpers.peers import gsasrec, gsasrec_hidden, tron_gru4rec, tron_hidden, tron_sasrec

from tron_cli.checkpoint import load_checkpoint
from tron_cli.data.dataset import Dataset
from tron_cli.importing.foreign import import_checkpoint

Command = Callable[..., tuple[int, str, str]]
ITEMS = 30

NETWORKS: dict[str, tuple[str, Callable[..., Any], dict[str, Any], list[str]]] = {
    "sasrec": ("tron", tron_sasrec, {}, []),
    "sasrec-bias": ("tron", tron_sasrec, {"bias": True}, []),
    "sasrec-apart-bias": ("tron", tron_sasrec, {"bias": True, "shared": False}, []),
    "sasrec-apart": ("tron", tron_sasrec, {"shared": False}, []),
    "gru4rec": ("tron", tron_gru4rec, {"bias": True}, ["sequence_length=6"]),
    "gru4rec-apart": ("tron", tron_gru4rec, {"shared": False}, ["sequence_length=6"]),
    "gsasrec": ("gsasrec", gsasrec, {}, ["num_heads=2"]),
    "gsasrec-shared": ("gsasrec", gsasrec, {"shared": True}, ["num_heads=1"]),
}


@pytest.fixture
def data_dir(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A dataset whose items have the ids 1, 2, ... in another order than the checkpoint's rows."""
    write_dataset(
        tmp_path / "data",
        train=random_sessions(rng, 45, ITEMS),
        test=random_sessions(rng, 40, ITEMS),
        item_ids=rng.permutation(ITEMS) + 1,
    )
    return tmp_path / "data"


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    file = tmp_path / "ids.txt"
    file.write_text("".join(f"{row}\n" for row in range(1, ITEMS + 1)))
    return file


def saved(content: Any, file: Path) -> Path:
    torch.save(content, file)
    return file


@pytest.mark.parametrize("name", NETWORKS)
def test_states_and_ranks_are_those_of_the_other_tool(
    name: str, command: Command, data_dir: Path, ids: Path, tmp_path: Path
) -> None:
    tool, make, options, words = NETWORKS[name]
    torch.manual_seed(4)
    content = make(items=ITEMS, **options)
    file, out = saved(content, tmp_path / "theirs.ckpt"), tmp_path / "ours.pt"
    code, printed, err = command(
        "import", tool, file, "--dataset", "tiny", "--data-dir", data_dir, "--item-ids", ids,
        "-o", out, "--json", *words,
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(printed)["items_of_dataset"] == ITEMS
    checkpoint = load_checkpoint(out)
    dataset = Dataset.open(data_dir / "tiny")
    events = dataset.item_ids[dataset.split("train").items - 1]
    assert checkpoint.popularity.tolist() == np.bincount(events, minlength=ITEMS + 1).tolist()
    model = checkpoint.build_model(torch.device("cpu"))
    heads = checkpoint.config.num_heads

    def hidden(history: list[int]) -> torch.Tensor:
        if tool == "tron":
            return tron_hidden(content, history)
        return gsasrec_hidden(content, history, heads)

    for history in ([3], [5, 5, 9], [1, 30, 7, 8, 2, 11]):
        with torch.no_grad():
            found = states(model.double(), history)[-1]
        torch.testing.assert_close(found, hidden(history), rtol=0, atol=1e-9)

    table_file = tmp_path / "events.csv"
    code, _, err = command(
        "evaluate", out, "--data-dir", data_dir, "--per-event", table_file, "--metrics", "R@5"
    )
    assert code == 0, err
    state = content["state_dict"] if tool == "tron" else content
    table = state.get("output_embedding.weight", state["item_embedding.weight"]).double()
    names = np.load(data_dir / "tiny" / "item_ids.npy")
    items = np.load(data_dir / "tiny" / "test" / "items.npy")
    offsets = np.load(data_dir / "tiny" / "test" / "offsets.npy")
    ranks = pl.read_csv(table_file)["rank"].to_list()
    expected = []
    for start, end in itertools.pairwise(offsets):
        session = names[items[start:end] - 1].tolist()
        for place in range(max(1, len(session) - 6), len(session)):
            scores = (table[1 : ITEMS + 1] @ hidden(session[max(0, place - 6) : place])).tolist()
            target = scores[session[place] - 1]
            expected.append(sum(score >= target for score in scores))
    assert ranks == expected


def test_settings_come_from_the_tensors_the_hyper_parameters_and_the_name(
    command: Command, data_dir: Path, ids: Path, tmp_path: Path
) -> None:
    file = saved(tron_sasrec(items=ITEMS, bias=True), tmp_path / "a.ckpt")
    common = ["--dataset", "tiny", "--data-dir", data_dir, "--item-ids", ids]
    assert command("import", "tron", file, *common, "-o", tmp_path / "a.pt")[0] == 0
    found = load_checkpoint(tmp_path / "a.pt")
    assert (found.step, found.epoch, found.dataset["name"]) == (1234, 3, "tiny")
    config = found.config
    assert (config.model, config.embedding_dim, config.num_blocks) == ("sasrec", 8, 2)
    assert (config.sequence_length, config.positions, config.output_bias) == (6, "end", True)
    assert (config.dropout_rate, config.lr, config.train_batch_size) == (0.1, 5e-4, 4)
    assert found.origin["import"]["file"] == str(file)
    name = "gsasrec-ml1m-step:86064-t:0.5-negs:256-emb:8-dropout:0.25-metric:0.19.pt"
    file = saved(gsasrec(items=ITEMS), tmp_path / name)
    code, _, err = command(
        "import", "gsasrec", file, *common[:4], "-o", tmp_path / "b.pt", "num_heads=4",
        "filter_rated=True",
    )  # fmt: skip
    assert code == 0, err
    config = load_checkpoint(tmp_path / "b.pt").config
    assert (config.loss, config.gbce_t, config.num_uniform_negatives) == ("gbce", 0.5, 256)
    assert (config.num_heads, config.dropout_rate, config.filter_rated) == (4, 0.25, True)
    assert load_checkpoint(tmp_path / "b.pt").step == 86064
    code, _, err = command(
        "import", "gsasrec", file, *common[:4], "--config", "config_ml1m_gsasrec.py", "-o",
        tmp_path / "c.pt", "sequence_length=6", "embedding_dim=8",
    )  # fmt: skip
    assert code == 0, err
    assert load_checkpoint(tmp_path / "c.pt").config.val_metric == "nDCG@10"


def test_items_of_otto_are_their_aids_plus_one(
    command: Command, rng: np.random.Generator, tmp_path: Path
) -> None:
    sessions = random_sessions(rng, 20, 10)
    write_dataset(tmp_path / "data", name="otto", train=sessions, test=sessions[:5],
                  item_ids=np.arange(10)[::-1].copy(), source="otto")  # fmt: skip
    file = saved(tron_sasrec(items=10), tmp_path / "otto.ckpt")
    code, _, err = command("import", "tron", file, "--dataset", "otto", "--data-dir",
                           tmp_path / "data", "-o", tmp_path / "o.pt")  # fmt: skip
    assert code == 0, err
    assert load_checkpoint(tmp_path / "o.pt").decoded_item_ids().tolist() == list(range(10))
    code, _, err = command("evaluate", tmp_path / "o.pt", "--data-dir", tmp_path / "data")
    assert code == 0, err


def trons_sessions(folder: Path, rows: dict[int, int], file: Path) -> Path:
    """Write a dataset's training sessions as TRON numbers their items; rows: by original id."""
    dataset = Dataset.open(folder)
    with file.open("w") as out:
        for split in ("val", "train"):
            sessions, names = dataset.split(split), dataset.session_ids(split)
            for number in range(len(sessions)):
                aids = [rows[int(dataset.item_ids[item - 1])] for item in sessions[number]]
                events = [{"aid": aid, "ts": 1.5, "type": "clicks"} for aid in aids]
                name = str(names[np.array([number])][0])
                out.write(json.dumps({"session": name, "events": events}) + "\n")
    return file


def log_of(command: Command, rng: np.random.Generator, folder: Path, name: str) -> None:
    """Prepare FOLDER/datasets/NAME from a log whose sessions are not in the order of their ids."""
    rows = ["session,item,time"]
    for session in range(200):
        day = session // 20
        rows += [
            f"{900 - session},{rng.integers(1000, 1020)},{1_700_000_000 + day * 86400 + place}"
            for place in range(int(rng.integers(2, 6)))
        ]
    log = folder / "log.csv"
    log.write_text("\n".join(rows) + "\n")
    code, _, err = command(
        "prepare", "table", "--input", log, "--name", name, "--data-dir", folder / "datasets",
        "--session-col", "session", "--item-col", "item", "--time-col", "time",
    )  # fmt: skip
    assert code == 0, err


def test_trons_own_sessions_tell_its_numbers(
    command: Command, rng: np.random.Generator, tmp_path: Path
) -> None:
    log_of(command, rng, tmp_path, "log")
    log_dir = tmp_path / "datasets"
    ids = sorted(np.load(log_dir / "log" / "item_ids.npy").tolist())
    rows = dict(zip(ids, (rng.permutation(len(ids)) + 1).tolist(), strict=True))
    sessions = trons_sessions(log_dir / "log", rows, tmp_path / "log_train.jsonl")
    file = saved(tron_sasrec(items=len(ids)), tmp_path / "log.ckpt")
    words = ["import", "tron", file, "--dataset", "log", "--data-dir", log_dir, "-o"]
    code, _, err = command(*words, tmp_path / "x.pt")
    assert code == 2
    assert "log_train.jsonl" in err
    code, _, err = command(*words, tmp_path / "x.pt", "--item-ids", sessions)
    assert code == 0, err
    found = load_checkpoint(tmp_path / "x.pt").decoded_item_ids().tolist()
    assert {item: row for row, item in enumerate(found, start=1)} == rows
    lines = sessions.read_text().splitlines()
    for damage, expected in (
        (lines[:1], "items stand in no session"),
        ([lines[0], lines[1].replace('"aid": ', '"aid": 1')], "line 2"),
        (["{"], "line 1"),
        (['{"session": 3}'], "line 1"),
        ([re.sub(r'"aid": \d+', f'"aid": {10**20}', lines[0])], "line 1"),
    ):
        sessions.write_text("\n".join(damage) + "\n")
        code, _, err = command(*words, tmp_path / "y.pt", "--item-ids", sessions)
        assert (code, "Traceback" in err) == (2, False)
        assert expected in err
        assert not (tmp_path / "y.pt").exists()


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.mark}",))


def without(content: dict[str, Any], name: str) -> dict[str, Any]:
    state = {key: values for key, values in content["state_dict"].items() if key != name}
    return {**content, "state_dict": state}


def with_tensor(content: dict[str, Any], name: str, values: Any) -> dict[str, Any]:
    return {**content, "state_dict": {**content["state_dict"], name: values}}


def says(**said: Any) -> dict[str, Any]:
    return tron_sasrec(items=ITEMS, **said)


HOSTILE: dict[str, tuple[Callable[[], Any], str]] = {
    "layer missing": (
        lambda: without(says(), "encoder.layers.1.linear1.bias"),
        "blocks.1.feed_forward.0.bias is missing",
    ),
    "no positions": (
        lambda: without(says(), "positional_embedding_layer.embedding.weight"),
        "position_embedding.weight is missing",
    ),
    "unknown tensor": (lambda: with_tensor(says(), "odd", torch.ones(2)), "odd is unknown"),
    "wrong shape": (
        lambda: with_tensor(says(), "encoder.layers.0.linear1.weight", torch.ones(8, 9)),
        "[8, 9]",
    ),
    "other outputs": (
        lambda: with_tensor(
            tron_sasrec(items=ITEMS, shared=False), "output_embedding.weight", torch.ones(9, 8)
        ),
        "output_embedding.weight is [9, 8]",
    ),
    "whole numbers": (
        lambda: with_tensor(says(), "encoder.norm.bias", torch.ones(8, dtype=torch.int64)),
        "int64",
    ),
    "nan": (
        lambda: with_tensor(says(), "encoder.norm.bias", torch.full((8,), torch.nan)),
        "not finite",
    ),
    "table of one dimension": (
        lambda: with_tensor(says(), "item_embedding.weight", torch.ones(31)),
        "item_embedding.weight has [31]",
    ),
    "another width": (lambda: says(hidden_size=10**12), "says hidden_size=1000000000000"),
    "another number of items": (lambda: says(num_items=31), "says num_items=31"),
    "a tensor for a width": (lambda: says(hidden_size=torch.ones(3)), "says hidden_size"),
    "bad dropout": (lambda: says(dropout_rate=7.0), "dropout_rate must be"),
    "a list": (lambda: [1, 2], "no checkpoint of otto-de/TRON"),
    "no tensors": (lambda: {"state_dict": {"a": 1}}, "no checkpoint of otto-de/TRON"),
    "gsasrec's": (lambda: {"x": torch.ones(2)}, "try `tron import gsasrec`"),
    "empty table": (
        lambda: {"item_embedding.weight": torch.ones(1, 8)},
        "too few",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_does_not_fit_is_refused_in_a_sentence(
    name: str, command: Command, data_dir: Path, ids: Path, tmp_path: Path
) -> None:
    make, expected = HOSTILE[name]
    file = saved(make(), tmp_path / "theirs.ckpt")
    code, _, err = command("import", "tron", file, "--dataset", "tiny", "--data-dir", data_dir,
                           "--item-ids", ids, "-o", tmp_path / "out.pt")  # fmt: skip
    assert (code, "Traceback" in err) == (2, False), err
    assert expected in err
    assert str(file) in err or name == "bad dropout"
    assert not list(tmp_path.glob("*out.pt*"))


def test_a_file_that_would_run_code_runs_none(
    command: Command, data_dir: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    words = ["--dataset", "tiny", "--data-dir", data_dir, "-o", tmp_path / "out.pt"]
    harmful = {**says(), "callbacks": Harmful(mark)}
    zipped, bare = saved(harmful, tmp_path / "a.ckpt"), tmp_path / "b.ckpt"
    bare.write_bytes(pickle.dumps(harmful))
    for file in (zipped, bare):
        for tool in ("tron", "gsasrec"):
            code, _, err = command("import", tool, file, *words)
            assert (code, "Traceback" in err) == (2, False)
            assert not mark.exists()
    code, _, err = command("import", "tron", zipped, *words)
    assert "would run code" in err
    assert ".system" in err
    torch.load(zipped, weights_only=False)
    assert mark.exists(), "the file would have harmed"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(
    share: float, command: Command, data_dir: Path, ids: Path, tmp_path: Path
) -> None:
    file = saved(says(), tmp_path / "a.ckpt")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    code, _, err = command("import", "tron", file, "--dataset", "tiny", "--data-dir", data_dir,
                           "--item-ids", ids, "-o", tmp_path / "out.pt")  # fmt: skip
    assert (code, "Traceback" in err) == (2, False)
    assert "truncated" in err


def test_flipped_bits_are_noticed(
    command: Command, data_dir: Path, ids: Path, tmp_path: Path
) -> None:
    file = saved(says(), tmp_path / "a.ckpt")
    whole = bytearray(file.read_bytes())
    table = tron_sasrec(items=ITEMS)  # of the same size
    place = whole.index(torch.load(file)["state_dict"]["item_embedding.weight"].numpy().tobytes())
    whole[place + 5] ^= 64
    assert table
    file.write_bytes(bytes(whole))
    code, _, err = command("import", "tron", file, "--dataset", "tiny", "--data-dir", data_dir,
                           "--item-ids", ids, "-o", tmp_path / "out.pt")  # fmt: skip
    assert code == 2
    assert "checksum" in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["num_heads=3"], "num_heads"),
        ([], "num_heads=1"),
        (["num_heads=1", "embedding_dim=16"], "embedding_dim=8"),
        (["num_heads=1", "model=sasrec"], "model=gsasrec"),
        (["num_heads=1", "nonsense=1"], "unknown setting"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    words: list[str], expected: str, command: Command, data_dir: Path, tmp_path: Path
) -> None:
    file = saved(gsasrec(items=ITEMS), tmp_path / "a.pt")
    code, _, err = command("import", "gsasrec", file, "--dataset", "tiny", "--data-dir", data_dir,
                           "-o", tmp_path / "out.pt", *words)  # fmt: skip
    assert (code, "Traceback" in err) == (2, False)
    assert expected in err


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["a"] * ITEMS, "line 2 repeats line 1"),
        ([str(n) for n in range(ITEMS - 1)], "has 29 lines"),
        ([*map(str, range(ITEMS - 1)), ""], "line 30 is empty"),
        ([f"x{n}" for n in range(ITEMS)], "none of the 30 items"),
    ],
)
def test_bad_lists_of_ids_are_refused(
    lines: list[str], expected: str, command: Command, data_dir: Path, ids: Path, tmp_path: Path
) -> None:
    ids.write_text("\n".join(lines) + "\n")
    file = saved(says(), tmp_path / "a.ckpt")
    code, _, err = command("import", "tron", file, "--dataset", "tiny", "--data-dir", data_dir,
                           "--item-ids", ids, "-o", tmp_path / "out.pt")  # fmt: skip
    assert (code, "Traceback" in err) == (2, False)
    assert expected in err
    assert not (tmp_path / "out.pt").exists()


def test_without_a_dataset_a_list_of_ids_is_enough(
    command: Command, ids: Path, tmp_path: Path
) -> None:
    file = saved(says(), tmp_path / "a.ckpt")
    code, _, err = command("import", "tron", file, "-o", tmp_path / "out.pt")
    assert code == 2
    assert "--item-ids" in err
    code, _, err = command("import", "tron", file, "-o", tmp_path / "out.pt", "--item-ids", ids)
    assert code == 0, err
    assert load_checkpoint(tmp_path / "out.pt").dataset["num_items"] == ITEMS


def test_a_file_that_exists_is_kept_without_force(
    command: Command, data_dir: Path, ids: Path, tmp_path: Path
) -> None:
    file, out = saved(says(), tmp_path / "a.ckpt"), tmp_path / "out.pt"
    words = ["import", "tron", file, "--dataset", "tiny", "--data-dir", data_dir,
             "--item-ids", ids]  # fmt: skip
    out.write_text("mine")
    assert command(*words, "-o", out)[0] == 2
    assert out.read_text() == "mine"
    assert command(*words, "-o", out, "--force")[0] == 0
    assert load_checkpoint(out).dataset["num_items"] == ITEMS
    code, _, err = command(*words, "-o", file, "--force")
    assert code == 2
    assert torch.load(file)["epoch"] == 3
    code, _, err = command("import", "tron", tmp_path / "none.ckpt", "-o", out, "--force")
    assert (code, "no file at" in err) == (2, True)
    code, _, err = command("import", "tron", out, "-o", tmp_path / "b.pt", "--item-ids", ids)
    assert code == 2
    assert "is a tron checkpoint already" in err


def import_and_die(file: Path, ids: Path, out: Path, event: str) -> None:
    save = torch.save

    def killed(content: Any, target: Any) -> None:
        if event == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, target)
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = killed
    import_checkpoint("tron", file, out, dataset=None, item_ids_file=ids)


@pytest.mark.parametrize("event", ["before", "after"])
def test_a_kill_leaves_no_checkpoint_and_no_obstacle(
    event: str, command: Command, ids: Path, tmp_path: Path
) -> None:
    file, out = saved(says(), tmp_path / "a.ckpt"), tmp_path / "out.pt"
    context = multiprocessing.get_context("fork")
    process = context.Process(target=import_and_die, args=(file, ids, out, event))
    process.start()
    process.join(60)
    assert process.exitcode == -9
    assert not out.exists()
    assert command("import", "tron", file, "-o", out, "--item-ids", ids)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.ckpt", "out.pt", "ids.txt"}


def test_two_at_once_leave_one_whole_file(ids: Path, tmp_path: Path) -> None:
    file, out = saved(says(), tmp_path / "a.ckpt"), tmp_path / "out.pt"
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(
            target=import_checkpoint,
            args=("tron", file, out),
            kwargs={"dataset": None, "item_ids_file": ids, "force": True},
        )
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes].count(0) >= 1
    assert load_checkpoint(out).dataset["num_items"] == ITEMS


def test_the_commands_of_the_page_run_as_they_stand(
    command: Command, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text()
    lines = re.findall(r"^tron (?:import|evaluate) .*$", page, re.MULTILINE)
    assert len(lines) == 5
    monkeypatch.chdir(tmp_path)
    sessions = random_sessions(rng, 30, ITEMS)
    for name, first in (("otto", 0), ("ml1m", 1)):
        write_dataset(
            tmp_path / "datasets", name=name, train=sessions, test=sessions, source=name,
            item_ids=np.arange(first, first + ITEMS),
        )  # fmt: skip
    log_of(command, rng, tmp_path, "yoochoose")
    ids = np.load("datasets/yoochoose/item_ids.npy").tolist()
    rows = {item: row for row, item in enumerate(sorted(ids), start=1)}
    trons_sessions(tmp_path / "datasets" / "yoochoose", rows, tmp_path / "yoochoose_train.jsonl")
    saved(tron_sasrec(items=ITEMS), tmp_path / "otto.ckpt")
    saved(tron_sasrec(items=len(ids)), tmp_path / "yoochoose.ckpt")
    width = 128  # of config_ml1m_gsasrec
    saved(gsasrec(items=ITEMS, width=width, length=200), tmp_path / "gsasrec-ml1m.pt")
    for line in lines:
        code, _, err = command(*shlex.split(line)[1:])
        assert code == 0, f"{line}: {err}"
