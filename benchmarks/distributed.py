"""Training in several processes: agreement with one, bytes sent, speed and kills.

    python -m benchmarks.distributed agreement [--processes 2 4] [--steps 50] [--only WORD ...]
    python -m benchmarks.distributed bytes [--items 50000 500000 1855603] [--processes 2]
    python -m benchmarks.distributed speed [--items 50000 500000] [--sessions 128]
    python -m benchmarks.distributed kills WORK [--kills 20] [--processes 2 3]

Each takes --output FILE.json; agreement and kills add to what the file has already. Processes run
on this machine, are joined by gloo and have one thread each.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks.generated import LENGTHS, generate_sessions
from benchmarks.machine import ROOT, circumstances
from benchmarks.measure import parser
from benchmarks.training_step import settings
from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import training_batch
from tron_cli.data.dataset import DatasetWriter, Sessions
from tron_cli.data.shares import share_of
from tron_cli.distributed.processes import ALONE, Processes, joined
from tron_cli.models.base import build_model
from tron_cli.sampling.negatives import Distribution
from tron_cli.text_table import format_table
from tron_cli.training.feed import build_feed
from tron_cli.training.optim import catch_up_all, optimizer_of
from tron_cli.training.step import accumulated_step, seed_generators

Case = dict[str, Any]

# Agreement: a small model, each loss with each sampling style and optimizer, and other networks.
SMALL = {
    "dataset_name": "generated", "sequence_length": 6, "embedding_dim": 8, "num_heads": 2,
    "num_blocks": 1, "dropout_rate": 0.3, "num_uniform_negatives": 16, "num_batch_negatives": 4,
    "topk_sampling_k": 8, "train_batch_size": 7, "max_epochs": 2, "lr": 1e-2, "clip_norm": 0.5,
}  # fmt: skip
SMALL_ITEMS = 60
NO_NEGATIVES = {"num_uniform_negatives": 0, "num_batch_negatives": 0, "topk_sampling": False}
GBCE = {
    "gbce_t": 0.75, "topk_sampling": False, "num_batch_negatives": 0,
    "reject_in_batch_items": False, "reject_uniform_session_items": False,
}  # fmt: skip
BUCKETS = {"sce_buckets": 5, "sce_bucket_positions": 9, "sce_bucket_items": 12}
OPTIMIZERS = ("adam", "row_adam", "adagrad")
STYLES = ("batchwise", "sessionwise", "eventwise")
CASES: list[Case] = [
    {"loss": loss, **more, "sampling_style": style, "optimizer": optimizer}
    for (loss, more), style, optimizer in itertools.product(
        (("ssm", {}), ("bce", {}), ("bpr", {}), ("bpr-max", {}), ("gbce", GBCE)), STYLES, OPTIMIZERS
    )
]
CASES += [
    {"loss": loss, **NO_NEGATIVES, **more, "optimizer": optimizer}
    for loss, more in (("ce", {}), ("sce", BUCKETS))
    for optimizer in OPTIMIZERS
]
CASES += [
    {**more, "optimizer": "row_adam"}
    for more in (
        {"reuse_item_embeddings": False, "weight_decay": 0.1},
        {"accumulate_batches": 2},
        {"model": "gsasrec", "relative_positions": True},
        {"model": "gru4rec", "num_heads": 1},
        {"model": "gru4rec", "num_heads": 1, "session_parallel": True},
        {"model": "bert4rec"},
        {"block": "bsarec", "training_windows": "prefixes"},
        {"logq_correction": True, "topk_sampling": False, "reject_in_batch_items": False},
        {"score": "cosine"},
    )
]
# Kills: 300 steps, a save every 25 of them and a validation every 100.
KILLED = {
    **SMALL, "train_batch_size": 8, "num_uniform_negatives": 64, "save_every": 25, "max_epochs": 3,
    "max_batches_per_epoch": 100, "val_metric": "R@5", "metrics": ("R@5",), "optimizer": "row_adam",
}  # fmt: skip


def in_processes(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what work(processes, *arguments) returns in each of `count` new processes."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("localhost", 0))
        given = (count, free.getsockname()[1], work, folder, arguments)
        free.close()
        multiprocessing.spawn(_one, given, nprocs=count)
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(count)]


def _one(
    rank: int, count: int, port: int, work: Callable[..., Any], folder: str, arguments: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="localhost", MASTER_PORT=str(port),
    )  # fmt: skip
    with joined(torch.device("cpu")) as processes:
        torch.save(work(processes, *arguments), Path(folder) / str(rank))


def trained(
    processes: Processes, cases: list[Case], dtype: torch.dtype, steps: int
) -> list[dict[str, torch.Tensor]]:
    """Return, for each case, the loss of each step and the weights after the last one."""
    random = np.random.default_rng(5)
    rows = [random.integers(1, SMALL_ITEMS + 1, length) for length in random.integers(2, 10, 17)]
    sessions = _packed(rows)
    found = []
    for case in cases:
        config = ExperimentConfig(**{**SMALL, **case})
        seed_generators(config.seed, step=0)
        model = build_model(config, SMALL_ITEMS).to(dtype)
        stepper = SharedSteps(config, model, SMALL_ITEMS, processes)
        feed = build_feed(config, sessions, model, padded=False)
        losses = []
        for step in range(steps):
            first = step * config.accumulate_batches
            batches = [feed.batch(first + place) for place in range(config.accumulate_batches)]
            losses.append(processes.add_up(stepper.take(step, batches).clone()))
        catch_up_all(stepper.optimizer)
        weights = {name: _felt(name, each.detach()) for name, each in model.named_parameters()}
        found.append({"loss": torch.stack(losses), **weights})
    return found


class SharedSteps:
    """Steps of `tron train` that some processes share, or that one takes."""

    def __init__(
        self, config: ExperimentConfig, model: Any, num_items: int, processes: Processes
    ) -> None:
        self.config, self.model, self.processes = config, model, processes
        self.optimizer = optimizer_of(config, model)
        self._scaler = torch.amp.GradScaler("cpu", enabled=False)
        expected = None
        if config.logq_correction:
            expected = (config.num_uniform_negatives, np.ones(num_items))
        self._distribution = (
            Distribution(num_items) if expected is None
            else Distribution.of(
                np.arange(1.0, num_items + 1), expected_of=expected, device=torch.device("cpu")
            )
        )  # fmt: skip
        model.train()

    def take(self, step: int, batches: list[Any]) -> torch.Tensor:
        """Take a step on batches that are whole; return this process's share of the loss."""
        processes = self.processes
        if processes.count > 1:
            batches = [share_of(batch, processes.rank, processes.count) for batch in batches]
        seed_generators(self.config.seed, step=step + 1)
        return accumulated_step(
            self.model, self.optimizer, self._scaler, batches, self.config, self._distribution,
            torch.float32, processes,
        )  # fmt: skip


def _packed(rows: list[np.ndarray]) -> Sessions:
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    return Sessions(np.concatenate(rows).astype(np.int32), offsets)


def _felt(name: str, values: torch.Tensor) -> torch.Tensor:
    """Leave out the bias of keys: no score depends on it, and its moves follow roundings."""
    for layer, parts, key in (("query_key_value.bias", 3, 1), ("key_value.bias", 2, 0)):
        if name.endswith(f".{layer}"):
            return torch.cat([*values.chunk(parts)[:key], *values.chunk(parts)[key + 1 :]])
    return values


def agreement(
    processes: list[int], dtypes: list[str], steps: int, only: list[str], output: Path | None
) -> None:
    """Compare losses and weights after some steps with those of one process."""
    cases = [case for case in CASES if not only or any(word in _named(case) for word in only)]
    lines: list[Case] = []
    for dtype in (getattr(torch, name) for name in dtypes):
        expected = trained(ALONE, cases, dtype, steps)
        for count in processes:
            found = in_processes(count, trained, cases, dtype, steps)
            for case, wanted, *each in zip(cases, expected, *found, strict=True):
                loss, weights = _differences(each[0], wanted)
                line: Case = {
                    "case": _named(case), "processes": count, "steps": steps,
                    "dtype": str(dtype).removeprefix("torch."), "loss": loss, "weights": weights,
                }  # fmt: skip
                lines.append(line)
                for other in each:
                    assert all(torch.equal(other[key], each[0][key]) for key in wanted), line
            _write(output, "agreement", lines, ("case", "processes", "dtype"))
    rows = []
    for dtype_name, count in itertools.product(dtypes, processes):
        here = [line for line in lines if (line["dtype"], line["processes"]) == (dtype_name, count)]
        figures = [[line[key] for line in here] for key in ("loss", "weights")]
        rows.append(
            [dtype_name, str(count), str(len(here))]
            + [f"{of(each):.1e}" for of in (max, statistics.median) for each in figures]
        )
    head = ["dtype", "processes", "cases", "loss", "weights", "median loss", "median weights"]
    print(format_table(head, rows))


def _differences(
    found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]
) -> tuple[float, float]:
    """Return the largest relative difference of a step's loss, and of the weights.

    Weights are compared with the largest weight of their tensor.
    """
    loss = (found["loss"] / wanted["loss"] - 1).abs().max()
    weights = max(
        float((found[key] - values).abs().max() / values.abs().max())
        for key, values in wanted.items()
        if key != "loss"
    )
    return float(loss), weights


def _named(case: Case) -> str:
    return " ".join(f"{key}={value}" for key, value in case.items())


def _large(
    processes: Processes, config: ExperimentConfig, num_items: int
) -> tuple[SharedSteps, Callable[[], list[Any]]]:
    """Return a model of a catalogue's size, and what draws a batch with OTTO's lengths."""
    seed_generators(config.seed, step=0)
    steps = SharedSteps(config, build_model(config, num_items), num_items, processes)
    for moments in steps.optimizer.state.values():
        for values in moments.values():
            values.zero_()
    sessions = generate_sessions(LENGTHS["OTTO"], num_items)
    random = np.random.default_rng(1)

    def drawn() -> list[Any]:
        chosen = random.integers(len(sessions), size=config.train_batch_size)
        return [training_batch(sessions, chosen, config.sequence_length)]

    return steps, drawn


@dataclass(frozen=True)
class Counted(Processes):
    """Processes that note the bytes that each sends by the formulas of docs/scaling.md."""

    noted: list[float] = field(default_factory=list)

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        self.noted.append(2 * (self.count - 1) / self.count * values.numel() * values.itemsize)
        return super().add_up(values)

    def gathered(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        most = torch.tensor([len(tensors[0])])
        dist.all_reduce(most, dist.ReduceOp.MAX)
        row_bytes = sum(each[:1].numel() * each.itemsize for each in tensors)
        self.noted.append((self.count - 1) * int(most) * row_bytes)
        return super().gathered(*tensors)


def counted_bytes(
    processes: Processes, config: ExperimentConfig, num_items: int, count: int
) -> Case:
    """Return medians per step of what each process sends, and of the rows that all touch."""
    processes = Counted(processes.rank, processes.count)
    steps, drawn = _large(processes, config, num_items)
    measured, formula, rows = [], [], []
    for step in range(count + 1):
        batches = drawn()
        processes.wait()
        before = _sent_over_loopback()
        processes.noted.clear()
        steps.take(step, batches)
        formula.append(sum(processes.noted))
        processes.wait()
        measured.append((_sent_over_loopback() - before) / processes.count)
        rows.append(len(steps.model.item_table.grad._indices()[0]))
    parameters = [each.numel() for each in steps.model.parameters() if not each.grad.is_sparse]
    return {
        "measured_bytes": round(statistics.median(measured[1:])),
        "formula_bytes": round(statistics.median(formula[1:])),
        "rows_touched": round(statistics.median(rows[1:])),
        "other_parameters": sum(parameters),
    }


def _sent_over_loopback() -> int:
    """Return the bytes that this network namespace has sent over lo, headers included."""
    (line,) = (
        line for line in Path("/proc/self/net/dev").read_text().splitlines() if "lo:" in line
    )
    return int(line.split()[9])


def bytes_sent(items: list[int], counts: list[int], steps: int, output: Path | None) -> None:
    """Measure the bytes that a process sends per step; nothing else may use lo meanwhile."""
    lines: list[Case] = []
    for count, num_items in itertools.product(counts, items):
        config = settings(precision="float32", embedding_dim=64)
        found = in_processes(count, counted_bytes, config, num_items, steps)[0]
        table = num_items * config.embedding_dim * 4
        lines.append({"items": num_items, "processes": count, **found, "table_bytes": table})
        print(lines[-1], flush=True)
    _write(output, "bytes", lines, ("items", "processes"))


def timed(processes: Processes, config: ExperimentConfig, num_items: int, count: int) -> Case:
    """Return seconds of steps that the first process takes alone, and of shared ones, in turns."""
    shared, drawn = _large(processes, config, num_items)
    alone = _large(ALONE, config, num_items)[0] if processes.is_first else None
    seconds: dict[str, list[float]] = {"alone": [], "shared": []}
    for step in range(count + 2):
        batches = drawn()
        for name, steps in (("alone", alone), ("shared", shared)):
            processes.wait()
            clock = time.perf_counter()
            if steps is not None:
                steps.take(step, batches)
            if step > 1:
                seconds[name].append(time.perf_counter() - clock)
    return {f"{name}_s": statistics.median(each) for name, each in seconds.items()}


def speed(
    items: list[int], counts: list[int], sessions: int, steps: int, output: Path | None
) -> None:
    """Time steps of one process and of several, with one thread each, in turns."""
    lines: list[Case] = []
    for count, num_items in itertools.product(counts, items):
        config = settings(precision="float32", train_batch_size=sessions)
        found = in_processes(count, timed, config, num_items, steps)[0]
        line = {"items": num_items, "sessions": sessions, "processes": count, "steps": steps}
        lines.append({**line, **found})
        print(lines[-1], flush=True)
    _write(output, "speed", lines, ("items", "sessions", "processes"))


def kills(work: Path, number: int, counts: list[int], seed: int, output: Path | None) -> None:
    """Kill a random process of a run at a random moment, and compare the final weights.

    In turns torchrun may start the job again, or it ends and `--resume` continues it.
    """
    work.mkdir(parents=True, exist_ok=True)
    _write_small_dataset(work)
    random = np.random.default_rng(seed)
    whole: dict[int, tuple[Path, float]] = {}
    lines: list[Case] = []
    for count in counts:
        clock = time.perf_counter()
        job = Job(work, count, "--config", "config.py", "--name", f"whole-{count}")
        code, words = job.ended()
        assert code == 0, words
        whole[count] = (job.last(f"whole-{count}"), time.perf_counter() - clock)
    for place in range(number):
        count = counts[place % len(counts)]
        expected, seconds = whole[count]
        name, restarts = f"killed-{seed}-{place}", int(place // len(counts)) % 2
        job = Job(work, count, "--config", "config.py", "--name", name, restarts=restarts)
        rank, moment = int(random.integers(count)), float(random.uniform(0.2, 0.95) * seconds)
        killed_at = job.kill(rank, moment)
        code, _ = job.ended()
        last = job.last(name)
        line: Case = {
            "kill": f"{seed}-{place}", "processes": count, "rank": rank,
            "restarts_allowed": restarts, "killed_after_s": round(moment, 1),
            "after_logged_step": killed_at, "exit_code": code,
            "ended_after_s": round(time.perf_counter() - job.killed, 1),
        }  # fmt: skip
        if code and last.exists():
            line["resumed_from_step"] = _progress(last)
            Job(work, count, "--resume", f"runs/{name}").ended()
        elif code:
            line["resumed_from_step"] = None
            Job(work, count, "--config", "config.py", "--name", name).ended()
        line["weights_equal"] = _equal_weights(last, expected)
        lines.append(line)
        print(line, flush=True)
        _write(output, "kills", [line], ("kill",))
    equal = sum(line["weights_equal"] for line in lines)
    print(f"{number} kills: final weights equal, bit for bit, in {equal}")


class Job:
    """A torchrun of `tron train`."""

    def __init__(self, work: Path, count: int, *words: str, restarts: int = 0) -> None:
        self.work, self.killed = work, time.perf_counter()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- as long as the job
        self._torchrun = subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count),
                "--master-port", str(port), "--max-restarts", str(restarts),
                "-m", "tron_cli", "train", *words, "--data-dir", "data", "--device", "cpu",
            ],
            cwd=work, stdout=subprocess.DEVNULL, stderr=self._stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self._name = words[-1]

    def kill(self, rank: int, moment: float) -> int | None:
        """Kill a process so many seconds after the start; return the last step that was logged.

        Returns None where the process had not begun yet or had ended.
        """
        time.sleep(moment)
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self._torchrun.pid)],
            capture_output=True, text=True,
        ).stdout.split()  # fmt: skip
        for child in children:
            try:
                variables = Path(f"/proc/{child}/environ").read_text().split("\0")
                if f"RANK={rank}" in variables:
                    os.kill(int(child), signal.SIGKILL)
                    break
            except OSError:  # it has ended
                continue
        else:
            return None
        self.killed = time.perf_counter()
        metrics = self.work / "runs" / self._name / "metrics.jsonl"
        steps = re.findall(r'"step": (\d+)', metrics.read_text()) if metrics.exists() else []
        return int(steps[-1]) if steps else 0

    def ended(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and what was written to stderr."""
        code = self._torchrun.wait(timeout=120)
        self._stderr.seek(0)
        return code, self._stderr.read()

    def last(self, name: str) -> Path:
        return self.work / "runs" / name / "last.pt"


def _progress(last: Path) -> int:
    return int(torch.load(last, weights_only=True)["step"])


def _equal_weights(last: Path, expected: Path) -> bool:
    found, wanted = (torch.load(path, weights_only=True)["weights"] for path in (last, expected))
    return all(torch.equal(found[name], values) for name, values in wanted.items())


def _write_small_dataset(work: Path) -> None:
    random = np.random.default_rng(10)
    splits = {
        name: _packed([random.integers(1, 301, length) for length in random.integers(2, 10, count)])
        for name, count in (("train", 900), ("val", 60))
    }
    with DatasetWriter(work / "data" / "generated", force=True) as writer:
        writer.write_items(np.arange(101, 401))
        for name in ("train", "val", "test"):
            writer.write_split(name, [splits[name]] if name in splits else [])
        writer.finish(name="generated", protocol="every-step")
    words = ", ".join(f"{key}={value!r}" for key, value in KILLED.items())
    (work / "config.py").write_text(
        f"from tron_cli.config import ExperimentConfig\nconfig = ExperimentConfig({words})\n"
    )


def _write(output: Path | None, what: str, lines: list[Case], keys: tuple[str, ...]) -> None:
    """Put lines into the file's list `what`, in place of those with the same keys."""
    if output is None:
        return
    content = json.loads(output.read_text()) if output.exists() else {}
    kept = {tuple(line[key] for key in keys): line for line in content.get(what, [])}
    kept |= {tuple(line[key] for key in keys): line for line in lines}
    content |= {**circumstances(), what: [*kept.values()]}
    output.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for name, value in content.items():
        listed = isinstance(value, list)  # a line of the file for each of its elements
        shown = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if listed else json.dumps(value)
        parts.append(f"{json.dumps(name)}: {shown}")
    output.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("what", choices=["agreement", "bytes", "speed", "kills"])
    options.add_argument("work", type=Path, nargs="?", help="kills: a folder for the runs")
    options.add_argument("--items", type=int, nargs="+", default=[50_000, 500_000, 1_855_603])
    options.add_argument("--processes", type=int, nargs="+", default=[2])
    options.add_argument("--sessions", type=int, default=128, help="sessions per step, for speed")
    options.add_argument("--steps", type=int, default=50)
    options.add_argument("--dtypes", nargs="+", default=["float64", "float32"])
    options.add_argument("--only", nargs="+", default=[], help="words of the cases to compare")
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args(words)
    torch.set_num_threads(1)
    if given.what == "agreement":
        agreement(given.processes, given.dtypes, given.steps, given.only, given.output)
    elif given.what == "bytes":
        bytes_sent(given.items, given.processes, given.steps, given.output)
    elif given.what == "speed":
        speed(given.items, given.processes, given.sessions, given.steps, given.output)
    elif given.work is None:
        options.error("kills needs a folder for its runs")
    else:
        kills(given.work, given.kills, given.processes, given.seed, given.output)


if __name__ == "__main__":
    main()
