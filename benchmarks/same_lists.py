"""Lists of `tron evaluate --run` compared, item by item, with those of every way of serving.

    python -m benchmarks.same_lists DATASET... [--data-dir datasets] [--sessions 3000]
        [--steps 200] [--models NAME...] [--output FILE.json]

For each prepared dataset, every network and baseline is trained briefly, with filter_rated on
last-item data. The histories of the first test sessions then go to `tron recommend`, to
Recommender, to a running `tron serve` from several connections at once and, for networks, to
onnxruntime. A list that differs from the run file is explained if its only difference is that the
target stands last among its equals there, or (networks) if items changed places whose scores differ
by less than a millionth: hidden states are rounded otherwise in other runtimes and in batches of
other sizes. Exits with 1 where others differ. FILE keeps the figures of other data and models.
"""

from __future__ import annotations

import http.client
import itertools
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.commands import tron
from benchmarks.machine import ROOT, circumstances
from benchmarks.measure import parser
from benchmarks.serving import served
from tron_cli.baselines.ease import MOST_ITEMS
from tron_cli.data.dataset import Dataset
from tron_cli.data.histories import Histories, predicted_events
from tron_cli.registry import BASELINES
from tron_cli.serving.recommender import Recommendation, Recommender
from tron_cli.text_table import format_table

# The packaged config of each network, and what makes it small.
NETWORKS = {
    "tron": "config_diginetica",
    "gsasrec": "config_diginetica_gsasrec",
    "gru4rec": "config_diginetica_gru4rec",
    "bert4rec": "config_diginetica_bert4rec",
}
COMMAND = "python -m benchmarks.same_lists diginetica ml1m --sessions 2000 --steps 100"
MODELS = (*NETWORKS, *BASELINES)
SMALL = ("embedding_dim=32", "sequence_length=50", "max_epochs=1")
SIDES = ("recommend", "Recommender", "serve", "onnx")
# Reasons why lists differ.
TARGET_LAST, ROUNDING, OTHER = "target last among equals", "rounding", "other"
REASONS = (TARGET_LAST, ROUNDING, OTHER)
_SIZES = (1, 3, 16, 64)  # histories per request
_CONNECTIONS = 4
_ROUNDING = 1e-6  # of a score
Lists = list[list[int | str]]


@dataclass(frozen=True)
class Requests:
    """Histories as each way of serving takes them; target_E: original ids of what followed."""

    events: Histories
    ids: Lists
    target_E: list[int | str]


def requests(dataset: Dataset, num_sessions: int) -> Requests:
    """Return the whole histories of all events that `tron evaluate --full-sessions` predicts."""
    sessions = dataset.split("test")
    events = predicted_events(
        sessions,
        window=1,  # of the model; histories here begin with their sessions
        protocol=dataset.protocol,
        full_sessions=True,
        last=num_sessions,
    )
    ids = dataset.item_ids
    whole = zip(events.begin_E, events.position_E, strict=True)
    return Requests(
        events,
        [ids[events.items[begin:end] - 1].tolist() for begin, end in whole],
        ids[events.target_E - 1].tolist(),
    )


def run_file(path: Path) -> Lists:
    """Return the lists of a TREC run of integer ids, in its order."""
    found: Lists = []
    with path.open() as lines:
        for _, rows in itertools.groupby(map(str.split, lines), key=lambda words: words[0]):
            found.append([int(words[2]) for words in rows])
    return found


def command(checkpoint: str, histories: Lists, k: int) -> Lists:
    """Return the lists of `tron recommend`, JSON lines in and out."""
    done = subprocess.run(
        [sys.executable, "-m", "tron_cli", "recommend", checkpoint, "-k", str(k)],
        cwd=ROOT, input="".join(json.dumps({"items": items}) + "\n" for items in histories),
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return [json.loads(line)["items"] for line in done.stdout.splitlines()]


def server(checkpoint: str, histories: Lists, k: int) -> Lists:
    """Return the lists of `tron serve`, asked by several connections at once."""
    ends = np.cumsum(list(itertools.islice(itertools.cycle(_SIZES), len(histories))))
    groups = [histories[a:b] for a, b in itertools.pairwise([0, *ends]) if a < len(histories)]
    words = [sys.executable, "-m", "tron_cli", "serve", checkpoint, "--port", "0",
             "--no-access-log", "--timeout", "60"]  # fmt: skip

    def ask(some: Sequence[Lists]) -> list[Lists]:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=120)
        answers = []
        for group in some:
            body = {"items": group[0]} if len(group) == 1 else {"histories": group}
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/recommend", json.dumps({**body, "k": k}), headers)
            answer = json.loads(connection.getresponse().read())
            found = [answer] if len(group) == 1 else answer["recommendations"]
            answers.append([each["items"] for each in found])
        connection.close()
        return answers

    with served(words) as running, ThreadPoolExecutor(_CONNECTIONS) as pool:
        parts = pool.map(ask, [groups[start::_CONNECTIONS] for start in range(_CONNECTIONS)])
        answers: list[Lists] = [[]] * len(groups)
        for start, part in enumerate(parts):
            answers[start::_CONNECTIONS] = part
    return [*itertools.chain.from_iterable(answers)]


def onnx(checkpoint: str, events: Histories, k: int) -> Lists:
    """Return the lists of the exported model in onnxruntime; the export holds all it needs."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "exported"
        tron(["export", checkpoint, "--format", "onnx", "--output", str(folder)])
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        item_ids = np.load(folder / "item_ids.npy")
        filter_rated = json.loads((folder / "manifest.json").read_text())["filter_rated"]
    found: Lists = [[]] * len(events)
    order = np.argsort(events.position_E - events.begin_E, kind="stable")
    for some in np.array_split(order, range(256, len(order), 256)):
        length_E = events.position_E[some] - events.begin_E[some]
        histories = np.zeros((len(some), int(length_E.max())), np.int64)
        for row, end in enumerate(events.position_E[some]):
            histories[row, : length_E[row]] = events.items[end - length_E[row] : end]
        inputs = {
            "histories": histories, "k": np.array(k), "filter_rated": np.array(filter_rated)
        }  # fmt: skip
        (top_EK,) = session.run(["items"], inputs)
        for event, top in zip(some, top_EK, strict=True):
            found[event] = item_ids[top[top > 0] - 1].tolist()
    return found


def reason(
    run: list[int | str],
    found: list[int | str],
    ours: Recommendation,
    equal: list[object],
    target: int | str,
    *,
    exact: bool,
) -> str:
    """Return why a list that was found is not that of the run file.

    ours: the longer list of Recommender. equal: see `ties`. exact: scores are not rounded.
    """
    if found == ours.items[: len(run)] and target_is_last(run, ours, equal, target):
        return TARGET_LAST
    scores = dict(zip(ours.items, ours.scores, strict=True))
    return ROUNDING if not exact and rounded((run, found), scores) else OTHER


def target_is_last(
    run: Sequence[int | str], ours: Recommendation, equal: Sequence[object], target: int | str
) -> bool:
    """Return True if the run is our list with the target moved behind items equal to it.

    ours: a list that is longer than the run, if there are more items. equal: see `ties`.
    """
    if target not in ours.items:
        return False
    place = ours.items.index(target)  # type: ignore[arg-type]
    end = place
    while end + 1 < len(equal) and equal[end + 1] == equal[place]:
        end += 1
    moved = [*ours.items[:place], *ours.items[place + 1 : end + 1], target, *ours.items[end + 1 :]]
    return moved[: len(run)] == [*run]


def rounded(lists: Sequence[Sequence[int | str]], scores: dict[int | str, float]) -> bool:
    """Return True if lists have nearly equal scores at each place."""
    first, second = (np.array([scores.get(item, np.nan) for item in items]) for items in lists)
    return len(first) == len(second) and bool(
        (np.abs(first - second) <= _ROUNDING * np.abs(first).clip(min=1)).all()
    )


def compare(checkpoint: str, dataset: Dataset, data_dir: Path, sessions: int) -> dict[str, Any]:
    """Return how many lists differ from the run file, for each way of serving."""
    asked = requests(dataset, sessions)
    with tempfile.TemporaryDirectory() as folder:
        run_path = Path(folder) / "lists.run"
        tron(["evaluate", checkpoint, "--full-sessions", "--limit-sessions", str(sessions),
              "--data-dir", str(data_dir), "--run", str(run_path)])  # fmt: skip
        runs = run_file(run_path)
    if len(runs) != len(asked.ids):
        raise RuntimeError(f"{len(runs):,} lists in the run file, {len(asked.ids):,} histories")
    k = max(map(len, runs))
    recommender = Recommender.load(checkpoint)
    is_baseline = recommender.checkpoint.config.model in BASELINES
    sides: dict[str, Lists] = {
        "recommend": command(checkpoint, asked.ids, k),
        "Recommender": [[*found.items] for found in recommender.recommend(asked.ids, k=k)],
        "serve": server(checkpoint, asked.ids, k),
    }
    if not is_baseline:
        sides["onnx"] = onnx(checkpoint, asked.events, k)
    found: dict[str, Any] = {"histories": len(runs), "k": k}
    for side, lists in sides.items():
        differ = [place for place, run in enumerate(runs) if lists[place] != run]
        longer = recommender.recommend(
            [asked.ids[place] for place in differ], k=min(k + 100, recommender.num_items)
        )
        reasons = Counter(
            reason(
                runs[place], lists[place], ours, ties(recommender, ours), asked.target_E[place],
                exact=is_baseline,
            )
            for place, ours in zip(differ, longer, strict=True)
        )  # fmt: skip
        found[side] = {"differ": len(differ), **{name: reasons[name] for name in REASONS}}
    return found


def ties(recommender: Recommender, ours: Recommendation) -> list[object]:
    """Return for each item of a list a value that it shares with those that tie with it."""
    if recommender.checkpoint.config.model not in BASELINES:
        return [*ours.scores]
    # Items with the same score follow by popularity.
    numbers = recommender.lookup.numbers(ours.items, "items")
    return [*zip(ours.scores, recommender.popularity.count[numbers].tolist(), strict=True)]


def trained(model: str, dataset: Dataset, data_dir: Path, output_dir: Path, steps: int) -> str:
    """Train briefly, and return the checkpoint."""
    settings = [f"dataset_name={dataset.name}", f"filter_rated={dataset.protocol == 'last-item'}"]
    if model in NETWORKS:
        settings += [*SMALL, f"max_batches_per_epoch={steps}"]
    else:
        settings.append(f"model={model}")
    words = ["train", "--config", NETWORKS.get(model, NETWORKS["tron"]), *settings,
             "--data-dir", str(data_dir), "--output-dir", str(output_dir)]  # fmt: skip
    return tron([*words, "--name", f"{dataset.name}-{model}"])["checkpoint"]


def table(figures: list[dict[str, Any]]) -> str:
    rows = []
    for figure in figures:
        for side in SIDES:
            if side in figure:
                counts = [f"{figure[side][name]:,}" for name in ("differ", *REASONS)]
                rows.append(
                    [figure["dataset"], figure["model"], f"{figure['histories']:,}", side, *counts]
                )
    return format_table(["data set", "model", "histories", "by", "differ", *REASONS], rows)


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("datasets", nargs="+", metavar="DATASET", help="prepared datasets")
    options.add_argument("--data-dir", type=Path, default=Path("datasets"))
    options.add_argument("--sessions", type=int, default=3000, help="the first of the test split")
    options.add_argument("--steps", type=int, default=200, help="training steps of a network")
    options.add_argument("--models", nargs="+", default=MODELS, choices=MODELS, metavar="NAME")
    arguments = options.parse_args(words)
    data_dir = arguments.data_dir.absolute()
    content = {"command": COMMAND, **circumstances()}
    figures: list[dict[str, Any]] = []
    if arguments.output and arguments.output.exists():
        figures = json.loads(arguments.output.read_text())["figures"]
    for name in arguments.datasets:
        dataset = Dataset.open(data_dir / name)
        for model in arguments.models:
            if model == "ease" and dataset.num_items > MOST_ITEMS:
                continue
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = trained(model, dataset, data_dir, Path(folder), arguments.steps)
                found = compare(checkpoint, dataset, data_dir, arguments.sessions)
            figure = {"dataset": name, "model": model, "commit": content["commit"], **found}
            figures = [*(each for each in figures if _key(each) != _key(figure)), figure]
            print(table([figure]), flush=True)
            if arguments.output:
                text = json.dumps({**content, "figures": figures}, indent=2)
                arguments.output.write_text(text + "\n")
    print("\n" + table(figures))
    if any(figure[side][OTHER] for figure in figures for side in SIDES if side in figure):
        raise SystemExit(1)


def _key(figure: dict[str, Any]) -> tuple[str, str]:
    return figure["dataset"], figure["model"]


if __name__ == "__main__":
    main()
