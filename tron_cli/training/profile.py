"""Profile of some training steps by torch's profiler: a Chrome trace, and tables of the mean step.

Phases are wall-clock time. Operators are the time that the CPU spends in them and not in those that
they call; on CUDA the time of the kernels that they launch.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from tron_cli.errors import InputError
from tron_cli.files import written_aside
from tron_cli.text_table import format_table

TRACE = "trace.json"
WARM_UP = 5  # steps before those that count
PHASES = (
    "batch",
    "negatives",
    "lookup",
    "forward",
    "logits",
    "loss",
    "backward",
    "exchange",
    "optimizer",
)
BETWEEN_STEPS = ("validation", "save")  # in the trace, but no part of a step

_OPERATORS_SHOWN = 20
_NOTHING: AbstractContextManager[None] = nullcontext()
_profiled_device: torch.device | None = None


def phase(name: str) -> AbstractContextManager[None]:
    """Return a context named after one of PHASES or BETWEEN_STEPS; free unless it is profiled."""
    return _NOTHING if _profiled_device is None else _range(name, _profiled_device)


@contextmanager
def _range(name: str, device: torch.device) -> Iterator[None]:
    with record_function(name):
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the kernels launched in a phase belong to its time


@dataclasses.dataclass(frozen=True)
class Profile:
    """Mean of the profiled steps.

    phases, operators: each with its name, ms and calls per step, and share of the step. The last
    entry is the time in none of them, which has no calls, so that shares add up to 1.
    """

    steps: int
    step_ms: float
    phases: list[dict[str, Any]]
    operators: list[dict[str, Any]]
    trace: Path

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "trace": str(self.trace)}

    def as_text(self) -> str:
        """Return both tables, the duration of a step, and the path of the trace."""
        tables = []
        for title, parts in (("phase", self.phases), ("operator", self.operators)):
            cells = [
                [part["name"], f"{part['ms']:.3f}", f"{part['share']:.1%}",
                 "" if part["calls"] is None else f"{part['calls']:g}"]
                for part in parts
            ]  # fmt: skip
            tables.append(format_table([title, "ms", "share", "calls"], cells))
        about = f"means of {self.steps} steps of {self.step_ms:.3f} ms, profiling included"
        return "\n\n".join([*tables, f"{about}\ntrace  {self.trace}"])


class StepProfiler:
    """Profiler of `steps` steps, after WARM_UP others; with 0 steps it does nothing.

        with profiler.running(device, run_dir):
            ...                 # a step, with its parts in `phase`
            profiler.step()     # at the end of each

    result: the profile, once all those steps have ended.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.result: Profile | None = None
        self._steps_left = WARM_UP + steps

    def check_steps(self, steps_left: int) -> None:
        """Raise InputError where a run has too few steps left to profile."""
        if self.steps and steps_left < WARM_UP + self.steps:
            raise InputError(
                f"profiling takes {WARM_UP + self.steps:,} steps, warm-up included, and this run "
                f"has {steps_left:,} to go; profile fewer, or raise max_epochs"
            )

    @contextmanager
    def running(self, device: torch.device, run_dir: Path) -> Iterator[None]:
        """Profile the steps of the block on `device`, and write the trace to run_dir / TRACE."""
        global _profiled_device
        if not self.steps:
            yield
            return

        def keep(profiler: profile) -> None:
            if self._steps_left:
                return  # the run ended before
            with written_aside(run_dir / TRACE) as file:
                profiler.export_chrome_trace(file.name)
            tables = _tables(profiler, self.steps, device)
            self.result = Profile(steps=self.steps, trace=run_dir / TRACE, **tables)

        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # only errors
        on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *on_gpu],
            schedule=schedule(wait=0, warmup=WARM_UP, active=self.steps, repeat=1),
            on_trace_ready=keep,
        )
        _profiled_device = device
        try:
            with self._profiler:
                yield
        finally:
            _profiled_device = None

    def step(self) -> None:
        """End a step."""
        if self.steps:
            self._steps_left -= 1
            self._profiler.step()


def _tables(profiler: profile, steps: int, device: torch.device) -> dict[str, Any]:
    # Kernels count under the operators that launch them.
    on_cpu = torch.autograd.DeviceType.CPU
    events = [event for event in profiler.events() or () if event.device_type == on_cpu]
    between = [event.time_range for event in events if event.name in BETWEEN_STEPS]
    self_time = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    step_us = -sum(time.elapsed_us() for time in between)
    phases = {name: [0.0, 0] for name in PHASES}  # microseconds and calls
    operators: dict[str, list[Any]] = {}
    for event in events:
        if any(time.start <= event.time_range.start <= time.end for time in between):
            continue
        whole = event.time_range.elapsed_us()
        if event.name.startswith("ProfilerStep"):
            step_us += whole
            continue
        is_phase = event.name in phases
        total = (phases if is_phase else operators).setdefault(event.name, [0.0, 0])
        total[0] += whole if is_phase else getattr(event, self_time)
        total[1] += 1
    longest = sorted(operators.items(), key=lambda item: -item[1][0])
    shown = dict(longest[:_OPERATORS_SHOWN])
    if others := [total for _, total in longest[_OPERATORS_SHOWN:]]:
        shown["other operators"] = [sum(column) for column in zip(*others, strict=True)]

    def parts(totals: dict[str, list[Any]], rest: str) -> list[dict[str, Any]]:
        # Kernels that run at the same time on several streams can add up to more than the steps.
        left = max(0.0, step_us - sum(us for us, _ in totals.values()))
        return [
            {"name": name, "ms": us / steps / 1e3, "share": us / step_us,
             "calls": calls / steps if calls else None}
            for name, (us, calls) in {**totals, rest: [left, 0]}.items()
        ]  # fmt: skip

    called = {name: total for name, total in phases.items() if total[1]}
    return {
        "step_ms": step_us / steps / 1e3,
        "phases": parts(called, "between phases"),
        "operators": parts(shown, "outside operators"),
    }
