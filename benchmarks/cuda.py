"""Every claim about CUDA, measured in one run of at most ten minutes.

    python -m benchmarks.cuda [--items 1855603] [--sessions 12900000] [--steps 2000]
        [--minutes 9] [--output benchmarks/results/cuda.json]

On generated data of OTTO's size: the tests that need CUDA; TRON XL's training step, with and
without CUDA graphs, in bf16 and float32, with row-sparse and dense Adam; the plain step in TRON's
manner on the same card, in float32 (TRON's) and in bf16; exact ranks by the Triton kernel and in
chunks, which must agree. A part that fails is reported and the others go on; what is known so far
is written after each part. Needs torch, numpy and tqdm, and pytest for the tests.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.generated import LENGTHS, generate_sessions
from benchmarks.machine import ROOT, circumstances
from tron_cli.config import ExperimentConfig
from tron_cli.data.dataset import Sessions

OTTO_SESSIONS = 12_900_000
OTTO_TEST_EVENTS = 10_700_000
TESTS = ("tests/test_cuda.py", "tests/test_rank_kernel.py")
# Precision, optimizer, with graphs; the ones that matter most come first.
VARIANTS = (
    ("bf16", "row_adam", True),
    ("bf16", "row_adam", False),
    ("float32", "row_adam", True),
    ("bf16", "adam", True),
    ("float32", "row_adam", False),
)
_COMPARED = 50  # losses


def stand_in_for_missing_packages() -> None:
    """Let the loop be imported where ir-measures is not installed: no measure is computed."""
    try:
        import ir_measures  # noqa: F401
    except ImportError:
        missing: Any = types.ModuleType("ir_measures")
        missing.Measure = missing.Qrel = missing.ScoredDoc = object
        sys.modules["ir_measures"] = missing


def run_tests(timeout: float) -> dict[str, Any]:
    """Run the tests in a process of their own, so that a device error ends only that process."""
    script = (
        "import sys; from benchmarks.cuda import stand_in_for_missing_packages as s; s(); "
        f"import pytest; sys.exit(pytest.main(['-rfEs', '-p', 'no:cacheprovider', *{TESTS!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    text = done.stdout + done.stderr
    print(text[-6000:], flush=True)
    return {"exit_code": done.returncode, "result": text.strip().splitlines()[-1:], "output": text}


class Steps:
    """Training steps as `tron train` takes them, one after the other."""

    def __init__(
        self,
        config: ExperimentConfig,
        sessions: Sessions,
        num_items: int,
        device: torch.device,
        *,
        graphs: bool,
    ) -> None:
        from tron_cli.models.base import build_model
        from tron_cli.sampling.negatives import Distribution
        from tron_cli.training.feed import WholeSessions
        from tron_cli.training.graphs import CUDARecorder, GraphedSteps
        from tron_cli.training.optim import optimizer_of
        from tron_cli.training.step import seed_generators, training_step

        self._config, self._seed = config, seed_generators
        self._feed = WholeSessions(config, sessions, padded=True)
        self.device = device
        seed_generators(config.seed, step=0)
        self.model = build_model(config, num_items).to(device).train()
        self.optimizer = optimizer_of(config, self.model)
        dtype = {"bf16": torch.bfloat16, "float32": torch.float32}[config.precision]
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        self.take_step = GraphedSteps(
            lambda batch: training_step(
                self.model, self.optimizer, scaler, batch, config, Distribution(num_items), dtype
            ),
            device,
            batch_size=config.train_batch_size,
            recorder=CUDARecorder(device) if graphs else None,
        )
        self.losses: list[float] = []
        self._next = 0
        self.events = 0

    def prepare(self, step: int) -> Any:
        """Prepare the batch of a step as the training loop does."""
        return self._feed.batch(step).in_one_piece(pinned=self.device.type == "cuda")

    def run(self, count: int) -> float:
        """Return the seconds that `count` steps take."""
        from tron_cli.data.batches import prepared_ahead

        loss_sum = torch.zeros((), device=self.device)
        steps = range(self._next, self._next + count)
        self.events = 0
        with ThreadPoolExecutor(1) as thread:
            self.prepare(steps[0])  # the order of the sessions is no part of a step
            wait(self.device)
            clock = time.perf_counter()
            for step, batch in zip(steps, prepared_ahead(self.prepare, steps, thread), strict=True):
                self._seed(self._config.seed, step=step + 1)
                loss = self.take_step(batch)
                loss_sum += loss
                self.events += int(batch.lengths_B.sum())
                if step < _COMPARED:
                    self.losses.append(float(loss))
                if step % 20 == 19:
                    loss_sum.item()
            wait(self.device)
        self._next += count
        return time.perf_counter() - clock

    def replay_seconds(self, count: int) -> float | None:
        """Return the seconds of replaying the last recorded size, without the work on the CPU."""
        replays = [size.replay for size in self.take_step._sizes.values() if size.replay]
        if not replays:
            return None
        wait(self.device)
        clock = time.perf_counter()
        for _ in range(count):
            replays[-1]()
        wait(self.device)
        return (time.perf_counter() - clock) / count


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_steps(steps: Steps, count: int, *, num_sessions: int) -> dict[str, Any]:
    """Measure milliseconds per step over `count` steps after a warm-up, epochs per hour, memory."""
    on_gpu = steps.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    first = steps.run(count)
    seconds = steps.run(count) / count
    config = steps._config
    table = sum(p.numel() * p.element_size() for p in steps.model.parameters())
    moments = sum(v.nbytes for state in steps.optimizer.state.values() for v in state.values())
    found: dict[str, Any] = {
        "step_ms": seconds * 1e3,
        "epochs_an_hour": 3600 / seconds / (num_sessions / config.train_batch_size),
        "events_a_step": steps.events / count,
        "warm_up_s": first,
        "sizes": sorted(steps.take_step._sizes),
        "recorded": sum(size.replay is not None for size in steps.take_step._sizes.values()),
        "replay_only_ms": None,
        "losses": steps.losses[:_COMPARED],
    }
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
        found |= {
            "peak_memory_mb": peak / 1e6,
            "peak_memory_above_weights_and_state_mb": (peak - table - moments) / 1e6,
        }
    replay = steps.replay_seconds(200)
    return found | {"replay_only_ms": None if replay is None else replay * 1e3}


def kernels(steps: Steps, count: int = 5) -> dict[str, Any]:
    """Measure the time that a step spends in each kernel of the device."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = steps.device.type == "cuda"
    with profile(
        activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    ) as profiled:
        steps.run(count)
    lines = [
        (line.key[:120], line.self_device_time_total / count / 1e3, line.count / count)
        for line in profiled.key_averages()
        if line.self_device_time_total > 0
    ]
    lines.sort(key=lambda line: -line[1])
    for name, ms, calls in lines[:30]:
        print(f"{ms:8.4f} ms {calls:7.1f} calls  {name}")
    return {
        "kernels_a_step": sum(calls for _, _, calls in lines),
        "device_ms_a_step": sum(ms for _, ms, _ in lines),
        "most": lines[:60],
    }


def measure_reference(
    config: ExperimentConfig,
    sessions: Sessions,
    num_items: int,
    device: torch.device,
    *,
    steps: int,
) -> dict[str, Any]:
    """Measure the plain step, with batches made in advance (as by loaders) and with collating."""
    from benchmarks.reference import PaddedBatch
    from benchmarks.training_step import plain

    model = plain(config, num_items).to(device).train()
    random = np.random.default_rng(1)
    batches, collate_s = [], []
    for _ in range(steps + 2):
        clock = time.perf_counter()
        chosen = random.integers(len(sessions), size=config.train_batch_size)
        batch = model.collate(sessions, chosen)
        collate_s.append(time.perf_counter() - clock)
        batches.append(PaddedBatch(*(getattr(batch, field.name).to(device)
                                     for field in dataclasses.fields(batch))))  # fmt: skip
    found: dict[str, Any] = {"collate_ms": float(np.median(collate_s)) * 1e3}
    for name, cast in (
        ("float32", nullcontext()),
        ("bf16", torch.autocast(device.type, torch.bfloat16)),
    ):
        seconds = []
        for batch in batches:
            wait(device)
            clock = time.perf_counter()
            model.optimizer.zero_grad()
            with cast:
                loss = model.loss(batch)
            loss.backward()
            model.optimizer.step()
            wait(device)
            seconds.append(time.perf_counter() - clock)
        found[f"step_{name}_ms"] = float(np.median(seconds[2:])) * 1e3
    if device.type == "cuda":
        found["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return found


def measure_evaluation(
    model: Any, sessions: Sessions, device: torch.device, batch_size: int
) -> dict[str, Any]:
    """Measure ranking `sessions` by the kernel and in chunks; estimate seconds for OTTO's test."""
    from tron_cli.evaluation.predict import predict
    from tron_cli.ops import rank_kernel

    usable = rank_kernel.usable
    found: dict[str, Any] = {}
    ranks = {}
    small = Sessions(sessions.items, sessions.offsets[:65])
    sides = {"kernel": usable, "chunks": lambda device: False}
    try:
        for name, chooses in sides.items():
            rank_kernel.usable = chooses
            predict(model, small, protocol="every-step", batch_size=batch_size)  # compiles
            wait(device)
            clock = time.perf_counter()
            predicted = predict(model, sessions, protocol="every-step", batch_size=batch_size)
            wait(device)
            seconds = time.perf_counter() - clock
            ranks[name] = predicted.rank_E
            events = len(predicted.rank_E)
            found[name] = {
                "events": events,
                "events_a_second": events / seconds,
                "minutes_for_otto": OTTO_TEST_EVENTS / events * seconds / 60,
            }
    finally:
        rank_kernel.usable = usable
    found["kernel_usable"] = usable(device)  # which it is no more after it failed
    found["ranks_differ"] = int((ranks["kernel"] != ranks["chunks"]).sum())
    return found


class Report:
    """Results of the parts, each of which may fail; written as one JSON file."""

    def __init__(self, output: Path, minutes: float, content: dict[str, Any]) -> None:
        self._output, self._content = output, content
        self._end = time.monotonic() + 60 * minutes

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def part(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of `measure`, or {"error": ...}; start nothing after the time limit."""
        clock = time.monotonic()
        if self.seconds_left <= 0:
            found = {"error": "no time was left"}
        else:
            print(f"\n{name}", flush=True)
            try:
                found = measure()
            except Exception as error:
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
        found["took_s"] = round(time.monotonic() - clock, 1)
        shown = {
            key: value for key, value in found.items() if key not in ("losses", "output", "most")
        }
        print(json.dumps(shown, indent=1, default=str), flush=True)
        self.add(**{name: found})
        return found

    def add(self, **more: Any) -> None:
        self._content |= more
        self._output.parent.mkdir(parents=True, exist_ok=True)
        self._output.write_text(json.dumps(self._content, indent=2, default=str) + "\n")


def measure_all(
    report: Report,
    config: ExperimentConfig,
    device: torch.device,
    *,
    num_items: int,
    num_sessions: int,
    steps: int,
    evaluated_sessions: int,
) -> None:
    """Measure everything except the tests."""
    sessions = generate_sessions(LENGTHS["OTTO"], num_items, num_sessions)
    evaluated = generate_sessions(LENGTHS["OTTO"], num_items, evaluated_sessions, seed=2)
    made: list[Steps] = []

    def measure(precision: str, optimizer: str, graphs: bool) -> dict[str, Any]:
        changed = dataclasses.replace(config, precision=precision, optimizer=optimizer)
        made.append(Steps(changed, sessions, num_items, device, graphs=graphs))
        count = steps if graphs else max(1, steps // 4)
        return measure_steps(made[0], count, num_sessions=OTTO_SESSIONS)

    def parts_of_the_first() -> None:
        report.part("kernels", lambda: kernels(made[0]))
        report.part(
            "evaluation",
            lambda: measure_evaluation(made[0].model, evaluated, device, config.eval_batch_size),
        )

    def reference() -> dict[str, Any]:
        count = max(2, min(10, steps // 10))
        return measure_reference(config, sessions, num_items, device, steps=count)

    found = {}
    for place, (precision, optimizer, graphs) in enumerate(VARIANTS):
        name = f"{'graphs' if graphs else 'eager'}, {precision}, {optimizer}"
        on_gpu = device.type == "cuda"
        found[name] = report.part(
            name, functools.partial(measure, precision, optimizer, graphs and on_gpu)
        )
        if made and not place:
            parts_of_the_first()
        made.clear()
        gc.collect()  # steps refer to themselves
        if on_gpu:
            torch.cuda.empty_cache()
        if place == 1:
            found["reference"] = report.part("reference", reference)
    report.add(summary=summary(found))


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return ratios to the reference, and the difference of losses with and without graphs."""
    result: dict[str, Any] = {}
    reference = found["reference"]
    for precision in ("bf16", "float32"):
        graphs = found[f"graphs, {precision}, row_adam"]
        eager = found[f"eager, {precision}, row_adam"]
        if "step_ms" not in graphs:
            continue
        for other in ("float32", "bf16"):
            if f"step_{other}_ms" in reference:
                result[f"{precision}: times as fast as the reference in {other}"] = (
                    reference[f"step_{other}_ms"] / graphs["step_ms"]
                )
        if "step_ms" in eager:
            result[f"{precision}: graphs to eager"] = eager["step_ms"] / graphs["step_ms"]
            one, two = np.array(graphs["losses"]), np.array(eager["losses"])
            count = min(len(one), len(two))
            result[f"{precision}: largest difference of {count} losses"] = float(
                np.abs(one[:count] - two[:count]).max(initial=0)
            )
    print("\n" + json.dumps(result, indent=1), flush=True)
    return result


def main(words: list[str] | None = None) -> None:
    assert __doc__ is not None
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--items", type=int, default=1_855_603)
    options.add_argument("--sessions", type=int, default=OTTO_SESSIONS)
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--evaluated-sessions", type=int, default=1 << 14)
    options.add_argument("--minutes", type=float, default=9, help="begin no part after these")
    options.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/cuda.json")
    arguments = options.parse_args(words)
    if not torch.cuda.is_available():
        print("no CUDA device: torch.cuda.is_available() is False; nothing was measured",
              file=sys.stderr)  # fmt: skip
        raise SystemExit(1)
    stand_in_for_missing_packages()
    from benchmarks.training_step import settings

    device = torch.device("cuda", 0)
    report = Report(
        arguments.output,
        arguments.minutes,
        {**circumstances(device), "items": arguments.items, "sessions": arguments.sessions},
    )
    report.part("tests", lambda: run_tests(timeout=min(200, report.seconds_left)))
    measure_all(
        report,
        settings(),
        device,
        num_items=arguments.items,
        num_sessions=arguments.sessions,
        steps=arguments.steps,
        evaluated_sessions=arguments.evaluated_sessions,
    )


if __name__ == "__main__":
    main()
