"""Profile of training steps by torch's profiler, as a Chrome trace and as tables."""

from __future__ import annotations

import dataclasses
import logging
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
PHASES = ("batch", "negatives", "lookup", "forward", "logits", "loss", "backward", "optimizer")
BETWEEN_STEPS = ("validation", "save")  # in the trace, but no part of a step

_OPERATORS_SHOWN = 20
_NOTHING: AbstractContextManager[None] = nullcontext()
_profiled_device: torch.device | None = None

log = logging.getLogger("tron")


def phase(name: str) -> AbstractContextManager[None]:
    """A named stretch, one of PHASES or BETWEEN_STEPS; costs nothing unless it is profiled."""
    return _NOTHING if _profiled_device is None else _range(name, _profiled_device)


@contextmanager
def _range(name: str, device: torch.device) -> Iterator[None]:
    with record_function(name):
        yield
        if device.type == "cuda":
            # What a phase has launched belongs to its time.
            torch.cuda.synchronize(device)


@dataclasses.dataclass(frozen=True)
class Part:
    """A phase or an operator: time in a step, share of the step, and calls in a step.

    What lies outside all of them has no calls.
    """

    name: str
    ms: float
    share: float
    calls: float | None

    def cells(self) -> list[str]:
        calls = "" if self.calls is None else f"{self.calls:g}"
        return [self.name, f"{self.ms:.3f}", f"{self.share:.1%}", calls]


@dataclasses.dataclass(frozen=True)
class Profile:
    """Time of the mean step, by phase and operator.

    Phases are wall-clock time. Operators are the time that the CPU spends in them and not in those
    that they call; on CUDA the time of the kernels that they launch. Both lists end with what is
    neither, so that their shares add up to 1.
    """

    steps: int
    step_ms: float
    phases: list[Part]
    operators: list[Part]
    trace: Path

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "trace": str(self.trace)}

    def as_text(self) -> str:
        """Both tables, and what they rest on."""
        tables = [
            format_table(
                [title, "ms", "share", "calls"],
                [part.cells() for part in parts],
            )
            for title, parts in (("phase", self.phases), ("operator", self.operators))
        ]
        rests_on = (
            f"means of {self.steps} steps of {self.step_ms:.3f} ms, profiling included\n"
            f"trace  {self.trace}"
        )
        return "\n\n".join([*tables, rests_on])


class StepProfiler:
    """Profiles `steps` steps, after WARM_UP others; with 0 steps it does nothing.

        with profiler.running(device, run_dir):
            ...                 # a step, its stretches in `phase`
            profiler.step()     # at the end of each

    result: what was found, once all those steps have ended.
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
        """Profile the steps on `device` meanwhile; the trace becomes run_dir / TRACE."""
        global _profiled_device
        if not self.steps:
            yield
            return

        def keep(profiler: profile) -> None:
            if self._steps_left:
                return  # the run ended before
            with written_aside(run_dir / TRACE) as file:
                profiler.export_chrome_trace(file.name)
            self.result = _summary(profiler, self.steps, device, run_dir / TRACE)

        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # only errors
        self._profiler = profile(
            activities=activities,
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
        if not self.steps:
            return
        self._steps_left -= 1
        self._profiler.step()


def _summary(profiler: profile, steps: int, device: torch.device, trace: Path) -> Profile:
    events = [
        event
        for event in profiler.events() or ()
        # Kernels count under the operators that launch them.
        if event.device_type == torch.autograd.DeviceType.CPU
    ]
    between = [event.time_range for event in events if event.name in BETWEEN_STEPS]
    total = -sum(time.elapsed_us() for time in between)
    phases: dict[str, tuple[float, int]] = {}
    operators: dict[str, tuple[float, int]] = {}
    for event in events:
        start = event.time_range.start
        if any(time.start <= start <= time.end for time in between):
            continue
        if event.name.startswith("ProfilerStep"):
            total += event.time_range.elapsed_us()
        elif event.name in PHASES:
            _add(phases, event.name, event.time_range.elapsed_us())
        elif device.type == "cuda":
            _add(operators, event.name, event.self_device_time_total)
        else:
            _add(operators, event.name, event.self_cpu_time_total)
    longest = sorted(operators.items(), key=lambda item: -item[1][0])
    shown = dict(longest[:_OPERATORS_SHOWN])
    others = [value for _, value in longest[_OPERATORS_SHOWN:]]
    if others:
        shown["other operators"] = sum(time for time, _ in others), sum(n for _, n in others)
    in_order = {name: phases[name] for name in PHASES if name in phases}
    return Profile(
        steps=steps,
        step_ms=total / steps / 1e3,
        phases=_parts(in_order, "between phases", total, steps),
        operators=_parts(shown, "outside operators", total, steps),
        trace=trace,
    )


def _add(times: dict[str, tuple[float, int]], name: str, time: float) -> None:
    before, calls = times.get(name, (0.0, 0))
    times[name] = before + time, calls + 1


def _parts(times: dict[str, tuple[float, int]], rest: str, total: float, steps: int) -> list[Part]:
    """times: microseconds and calls in all steps together."""
    parts = [
        Part(name, ms=time / steps / 1e3, share=time / total, calls=calls / steps)
        for name, (time, calls) in times.items()
    ]
    # Kernels that ran at the same time on several streams can add up to more than the steps.
    left = max(0.0, total - sum(time for time, _ in times.values()))
    return [*parts, Part(rest, ms=left / steps / 1e3, share=left / total, calls=None)]
