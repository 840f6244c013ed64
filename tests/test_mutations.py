"""Two thousand damaged files of every kind: each is refused in a sentence or read with its loss
counted, and a damaged dataset or checkpoint never gives other figures.

MUTATIONS=N multiplies how many are tried.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from helpers.datasets import cyclic_sessions, tiny_settings, write_dataset

from tron_cli.config import ExperimentConfig
from tron_cli.training.loop import train

DAY = 86_400
START = 1_650_000_000
LONGEST_MESSAGE = 500
PER_TEST = 28
TESTS_PER_KIND = 3 * int(os.environ.get("MUTATIONS", "1"))

HOSTILE = [
    b"", b"0", b"-1", b"1e309", b"nan", b"NaN", b"NULL", b"null", b"true", b"\x00", b"\xff\xfe",
    b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"\r", b"\n\n", b'"', b"'", b"[", b"{}", b",",
    b"\t", b" ", b"9223372036854775807", b"9223372036854775808", b"-9223372036854775809",
    b"99999999999999999999999999", b"1.5", b"2147483648", "१२".encode(), b"9" * 400,
    b"2014-02-30T25:61:00Z", b"9999-12-31T23:59:59Z",
]  # fmt: skip


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """The bytes after one to three random injuries."""
    for _ in range(int(rng.integers(1, 4))):
        data = INJURIES[int(rng.integers(len(INJURIES)))](data, rng)
    return data


def _place(data: bytes, rng: np.random.Generator) -> int:
    return int(rng.integers(len(data) + 1))


def _span(data: bytes, rng: np.random.Generator) -> tuple[int, int]:
    low = _place(data, rng)
    return low, low + int(rng.integers(1, 40))


def flip(data: bytes, rng: np.random.Generator) -> bytes:
    if not data:
        return data
    at = int(rng.integers(len(data)))
    return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]


def cut_out(data: bytes, rng: np.random.Generator) -> bytes:
    low, high = _span(data, rng)
    return data[:low] + data[high:]


def repeat(data: bytes, rng: np.random.Generator) -> bytes:
    low, high = _span(data, rng)
    return data[:high] + data[low:]


def truncate(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: _place(data, rng)]


def insert(data: bytes, rng: np.random.Generator) -> bytes:
    at = _place(data, rng)
    return data[:at] + HOSTILE[int(rng.integers(len(HOSTILE)))] + data[at:]


def replace_number(data: bytes, rng: np.random.Generator) -> bytes:
    numbers = list(re.finditer(rb"\d+", data))
    if not numbers:
        return data
    number = numbers[int(rng.integers(len(numbers)))]
    return data[: number.start()] + HOSTILE[int(rng.integers(len(HOSTILE)))] + data[number.end() :]


def swap_lines(data: bytes, rng: np.random.Generator) -> bytes:
    lines = data.split(b"\n")
    first, second = rng.integers(len(lines), size=2)
    lines[first], lines[second] = lines[second], lines[first]
    return b"\n".join(lines)


INJURIES: list[Callable[[bytes, np.random.Generator], bytes]] = [
    flip, flip, cut_out, repeat, truncate, insert, replace_number, replace_number, swap_lines,
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A sound folder, its file to damage (relative), and the command that reads it."""

    folder: Path
    target: str
    words: tuple[str, ...]  # {} stands for the folder
    lines: int | None = None  # that the reader has to account for, one event each
    figures: bool = False  # prints metrics, which must not change


Run = Callable[..., tuple[int, str, str]]


def events() -> list[tuple[int, int, int]]:
    """Session, item and time in seconds of a small log over four days."""
    return [
        (session, int(item), START + session * DAY // 20 + place * 60)
        for session, row in enumerate(cyclic_sessions(80, seed=1, cycle=6), start=1)
        for place, item in enumerate(row)
    ]


def iso(seconds: int) -> str:
    return np.datetime_as_string(np.datetime64(seconds, "s")) + ".000Z"


def write_sources(folder: Path) -> dict[str, Kind]:
    """One small sound file of each source and format."""
    log = events()
    table = pl.DataFrame(log, schema=["session", "item", "time"], orient="row")
    kinds: dict[str, Kind] = {}

    def add(name: str, file: str, content: bytes, *words: str, lines: int | None = None) -> None:
        (folder / name).mkdir()
        (folder / name / file).write_bytes(content)
        kinds[name] = Kind(folder / name, file, ("prepare", *words), lines)

    columns = ("--item-col=item", "--time-col=time", "--session-col=session", "--name=d")
    csv = table.write_csv().encode()
    for ending, content in {
        "csv": csv,
        "tsv": csv.replace(b",", b"\t"),
        "jsonl": table.write_ndjson().encode(),
    }.items():
        for skip in (False, True):
            more = ("--skip-bad-lines",) if skip else ()
            add(
                f"{ending}{'-skip' if skip else ''}", f"log.{ending}", content,
                "table", f"--input={{}}/log.{ending}", *columns, *more,
                lines=0 if ending == "jsonl" else 1,
            )  # fmt: skip
    add("gz", "log.csv.gz", gzip.compress(csv), "table", "--input={}/log.csv.gz", *columns)
    table.write_parquet(folder / "log.parquet")
    parquet = (folder / "log.parquet").read_bytes()
    add("parquet", "log.parquet", parquet, "table", "--input={}/log.parquet", *columns)
    rows = {session: " ".join(str(i) for s, i, _ in log if s == session) for session, *_ in log}
    text = "\n".join(rows.values()).encode() + b"\n"
    add("sequences", "a.txt", text, "sequences", "--train={}/a.txt", "--test={}/b.txt", "--name=d")
    (folder / "sequences" / "b.txt").write_bytes(b"1 2 3\n3 4 5\n")
    add(
        "yoochoose", "yoochoose-clicks.dat",
        "".join(f"{s},{iso(t)},{i},0\n" for s, i, t in log).encode(),
        "yoochoose", "--raw={}/yoochoose-clicks.dat",
    )  # fmt: skip
    add(
        "diginetica", "train-item-views.csv",
        b"sessionId;userId;itemId;timeframe;eventdate\n"
        + "".join(
            f"{s};NA;{i};{(t - START) % DAY * 1000};{iso(START + (t - START) * 7)[:10]}\n"
            for s, i, t in log
        ).encode(),
        "diginetica", "--raw={}/train-item-views.csv",
    )  # fmt: skip
    users = "".join(f"{s} {i}\n" for s, i, _ in log)
    add("ml1m", "ml-1m.txt", users.encode(), "ml1m", "--raw={}/ml-1m.txt")
    otto = "".join(
        json.dumps(
            {
                "session": session,
                "events": [
                    {"aid": i, "ts": t * 1000, "type": "clicks"} for s, i, t in log if s == session
                ],
            },
            separators=(",", ":"),
        )
        + "\n"
        for session in rows
    ).encode()
    add("otto", "otto-recsys-train.jsonl", otto, "otto", "--raw={}")
    (folder / "otto" / "otto-recsys-test.jsonl").write_bytes(b"".join(otto.splitlines(True)[-5:]))
    return kinds


def write_trained(folder: Path) -> dict[str, Kind]:
    """A dataset, a run on it, a baseline, and configs; each file of theirs to damage."""
    sessions = cyclic_sessions(60, seed=3, cycle=12)
    base = folder / "trained"
    dataset = write_dataset(
        base / "data", train=sessions[:40], val=sessions[40:50], test=sessions[50:]
    )
    text = write_dataset(
        base / "data", name="text", train=sessions[:40], val=sessions[40:50], test=sessions[50:],
        item_ids=np.array([f"item {i}" for i in range(12)], dtype=object),
    )  # fmt: skip
    for run, trained_on in (("run", dataset), ("text-run", text)):
        config = ExperimentConfig(**tiny_settings(max_epochs=1, dataset_name=trained_on.name))
        best = train(config, trained_on, base / run, device=torch.device("cpu"))
        best.rename(base / run / "best.pt")
    settings = {**tiny_settings(max_epochs=1), "metrics": ["R@5"]}
    arguments = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    (base / "mine.py").write_text(
        f"from tron_cli.config import ExperimentConfig\n\nconfig = ExperimentConfig({arguments})\n"
    )
    (base / "tron.json").write_text(json.dumps(TRON_JSON, indent=1))
    evaluate = ("evaluate", "--data-dir={}/data", "--json")
    kinds = {
        name: Kind(base, f"data/tiny/{name}", (*evaluate, "{}/run/best.pt"), figures=True)
        for name in ("dataset.json", "item_ids.npy", "test/items.npy", "test/offsets.npy")
    }
    for name in ("dataset.json", "item_ids.txt"):
        words = (*evaluate, "{}/text-run/best.pt")
        kinds[f"text/{name}"] = Kind(base, f"data/text/{name}", words, figures=True)
    kinds["best.pt"] = Kind(base, "run/best.pt", (*evaluate, "{}/run/best.pt"), figures=True)
    kinds["last.pt"] = Kind(base, "run/last.pt", (*evaluate, "{}/run/last.pt"), figures=True)
    kinds["mine.py"] = Kind(base, "mine.py", ("config", "show", "{}/mine.py"))
    kinds["tron.json"] = Kind(base, "tron.json", ("config", "show", "{}/tron.json"))
    kinds["metrics.jsonl"] = Kind(
        base, "run/metrics.jsonl",
        ("train", "--resume={}/run", "--data-dir={}/data", "--json", "max_epochs=2"),
    )  # fmt: skip
    return kinds


# otto-de/TRON's keys, made small.
TRON_JSON = {
    "model": "sasrec", "dataset": "tiny", "hidden_size": 8, "num_layers": 1, "dropout": 0.05,
    "num_batch_negatives": 4, "num_uniform_negatives": 16,
    "reject_uniform_session_items": False, "reject_in_batch_items": True,
    "sampling_style": "batchwise", "topk_sampling": True, "topk_sampling_k": 8, "loss": "ssm",
    "max_epochs": 1, "batch_size": 8, "max_session_length": 6, "lr": 0.01,
    "limit_val_batches": 1.0, "accelerator": "cpu", "overfit_batches": 0,
    "share_embeddings": True, "output_bias": False, "shuffling_style": "no_shuffling",
    "optimizer": "adam",
}  # fmt: skip

SOURCES = (
    "csv", "csv-skip", "tsv", "tsv-skip", "jsonl", "jsonl-skip", "gz", "parquet", "sequences",
    "yoochoose", "diginetica", "ml1m", "otto",
)  # fmt: skip
TRAINED = (
    "dataset.json", "item_ids.npy", "test/items.npy", "test/offsets.npy", "text/dataset.json",
    "text/item_ids.txt", "best.pt", "last.pt", "mine.py", "tron.json", "metrics.jsonl",
)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    folder = tmp_path_factory.mktemp("sound")
    return {**write_sources(folder), **write_trained(folder)}


@pytest.mark.parametrize("part", range(TESTS_PER_KIND))
@pytest.mark.parametrize("name", [*SOURCES, *TRAINED])
def test_damaged_files_are_refused_or_accounted_for(
    sound: dict[str, Kind], tmp_path: Path, command: Run, name: str, part: int
) -> None:
    """Neither a traceback, nor a message above 500 characters, nor silence."""
    kind = sound[name]
    rng = np.random.default_rng([len(name), part, *name.encode()])
    code, expected, err = run(kind, kind.folder, tmp_path, command)
    assert code == 0, err
    original = (kind.folder / kind.target).read_bytes()
    wrong = []
    for number in range(PER_TEST):
        folder = tmp_path / str(number)
        shutil.copytree(kind.folder, folder)
        damaged = mutated(original, rng)
        (folder / kind.target).write_bytes(damaged)
        found = run(kind, folder, folder / "out", command)
        complaint = complaint_about(kind, damaged, *found, expected)
        if complaint:
            wrong.append(f"{number}: {complaint} after {difference(original, damaged)}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)


def run(kind: Kind, folder: Path, out: Path, command: Run) -> tuple[int, str, str]:
    words = [word.replace("{}", str(folder)) for word in kind.words]
    if words[0] == "prepare":
        words += ["--data-dir", str(out), "--json"]
    return command(*words)


def complaint_about(
    kind: Kind, damaged: bytes, code: int, out: str, err: str, expected: str
) -> str | None:
    """Return the fault of an answer to a damaged file; None if it has none."""
    if code not in (0, 2):
        return f"exit code {code}: {err[-300:]}"
    if "Traceback" in err or "panicked" in err:
        return f"a traceback: {err[-300:]}"
    messages = [line for line in err.splitlines() if line.startswith("tron: ")]
    if code == 2 and len(messages) != 1:
        return f"not one sentence: {err[-300:]}"
    for line in messages:
        if len(line) > LONGEST_MESSAGE + 100:  # folders of tests have long names
            return f"{len(line)} characters: {line[:300]}"
    if code == 2:
        return None
    if kind.figures and json.loads(out)["metrics"] != json.loads(expected)["metrics"]:
        return "other figures"
    if kind.words[0] == "prepare":
        return unaccounted(kind, damaged, json.loads(out))
    return None


def unaccounted(kind: Kind, damaged: bytes, info: dict) -> str | None:
    """Say how many lines of the file are neither an event, nor a bad line, nor the header."""
    if kind.lines is None or any(mark in damaged for mark in (b'"', b"\r")):
        return None
    lines = sum(1 for line in damaged.split(b"\n") if line.strip(b" \t,")) - kind.lines
    found = info["filters"][0]["events"] + info["bad_lines"]["count"]
    return None if found == lines else f"{lines} lines, {found} accounted for"


def difference(before: bytes, after: bytes) -> str:
    """The stretch in which two files differ."""
    low = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
    return f"byte {low} of {len(before)} (now {len(after)}): {after[max(0, low - 30) : low + 50]!r}"
