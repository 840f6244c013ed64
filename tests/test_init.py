"""Environment that importing `tron_cli` sets for libraries that are loaded after it."""

import os
import re
import subprocess
import sys

import pytest

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def spins(*words: str, **settings: str) -> str:
    """Return the spin count that torch's OpenMP library reports, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    done = subprocess.run(
        [sys.executable, *words],
        env=environment | settings | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
    )
    found = re.findall(r"GOMP_SPINCOUNT = '(.+)'", done.stderr)
    if not found:
        pytest.skip("torch is not built with GNU OpenMP here")
    return found[0]


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "tron_cli", "evaluate", "missing.pt"],
        ["-c", "import benchmarks.training_step"],
    ],
    ids=["command line", "benchmarks"],
)
def test_threads_wait_briefly_and_then_sleep(words: list[str]) -> None:
    """Left to itself the library spins 300,000 times, on the core that another training needs."""
    assert spins(*words) == "1000"


def test_a_persons_own_policy_of_waiting_stands() -> None:
    load = ("-c", "import tron_cli, torch")
    assert spins(*load, GOMP_SPINCOUNT="77") == "77"
    assert spins(*load, OMP_WAIT_POLICY="active") == spins(
        "-c", "import torch", OMP_WAIT_POLICY="active"
    )
