"""Exported item tables: accuracy on the test split, and latency at one thread beside ours.

    python -m benchmarks.export CKPT [--data-dir datasets] [--histories 300] [--output FILE.json]

Accuracy: R@20 of onnxruntime's lists for all test events with each number format of the item
tables, the share of lists that are those of float32, and the size of the exported folder. Latency:
the 20 best items after one history, in turns.
"""

from __future__ import annotations

import functools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import circumstances
from benchmarks.measure import in_turns, parser
from tron_cli.data.dataset import Dataset
from tron_cli.data.histories import Histories, predicted_events
from tron_cli.serving.export import TABLES, export
from tron_cli.serving.recommender import Recommender
from tron_cli.text_table import format_table

_K, _EVENTS_AT_ONCE = 20, 256


def measure(checkpoint: Path, data_dir: Path, num_timed: int) -> list[dict[str, Any]]:
    """Measure Recommender, and ONNX models with each number format of the tables."""
    recommender = Recommender.load(checkpoint)
    dataset = Dataset.open(data_dir / recommender.checkpoint.dataset["name"])
    events = predicted_events(
        dataset.split("test"), window=recommender.sequence_length, protocol=dataset.protocol
    )
    figures: list[dict[str, Any]] = [{"what": "Recommender"}]
    sides: dict[str, Any] = {
        "Recommender": functools.partial(
            recommender.best, k=min(_K, recommender.num_items), filter_rated=False
        )
    }
    exact_EK = None
    for table in TABLES:
        session, size = exported(checkpoint, table)
        sides[table] = functools.partial(best, session)
        top_EK = lists(session, events)
        exact_EK = top_EK if exact_EK is None else exact_EK
        figures.append(
            {
                "what": f"onnxruntime, {table}",
                "MB": size / 1e6,
                f"R@{_K}": float((top_EK == events.target_E[:, None]).any(axis=1).mean()),
                "same lists": float((top_EK == exact_EK).all(axis=1).mean()),
            }
        )
    chosen = np.random.default_rng(1).choice(len(events), num_timed + 1)
    seconds = in_turns(sides, [(padded(events[[event]]),) for event in chosen])
    for figure, taken in zip(figures, seconds.values(), strict=True):
        figure["median ms"] = statistics.median(taken) * 1e3
        figure["p90 ms"] = float(np.quantile(taken, 0.9)) * 1e3
    return figures


def exported(checkpoint: Path, table: str) -> tuple[Any, int]:
    """Return a session of onnxruntime with one thread, and the bytes of the folder."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "exported"
        files = export(checkpoint, format="onnx", output=output, table=table)["files"]
        session = onnxruntime.InferenceSession(output / "model.onnx", options)
    return session, sum(file["bytes"] for file in files.values())


def lists(session: Any, events: Histories) -> np.ndarray:
    """Return the numbers of the best items after each history, int64 [E, K]."""
    order = np.argsort(events.length_E, kind="stable")
    pieces = np.array_split(order, np.arange(_EVENTS_AT_ONCE, len(order), _EVENTS_AT_ONCE))
    top_EK = np.concatenate([best(session, padded(events[some])) for some in pieces])
    return top_EK[np.argsort(order)]


def padded(events: Histories) -> np.ndarray:
    """Return the histories, zeros behind them: int64 [E, longest]."""
    found = np.zeros((len(events), int(events.length_E.max())), dtype=np.int64)
    for row, (start, end) in enumerate(zip(events.start_E, events.position_E, strict=True)):
        found[row, : end - start] = events.items[start:end]
    return found


def best(session: Any, histories: np.ndarray) -> np.ndarray:
    """Return the numbers of the best items, int64 [E, K]."""
    inputs = {"histories": histories, "k": np.array(_K), "filter_rated": np.array(False)}
    return session.run(["items", "scores"], inputs)[0]


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("checkpoint", type=Path)
    options.add_argument("--data-dir", type=Path, default=Path("datasets"))
    options.add_argument("--histories", type=int, default=300, help="timed, one by one")
    arguments = options.parse_args(words)
    torch.set_num_threads(1)
    figures = measure(arguments.checkpoint, arguments.data_dir, arguments.histories)
    header = list(figures[1])
    rows = [[_shown(figure.get(name, "")) for name in header] for figure in figures]
    print(format_table(["", *header[1:]], rows), flush=True)
    if arguments.output:
        content = {**circumstances(), "figures": figures}
        arguments.output.write_text(json.dumps(content, indent=2) + "\n")


def _shown(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


if __name__ == "__main__":
    main()
