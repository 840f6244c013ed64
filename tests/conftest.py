"""Fixtures of several test modules; what else they share is in helpers/."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first, so that no process waits for another's at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove what a test registered."""
    from tron_cli import registry
    from tron_cli.config import plugins

    names = ("MODELS", "BASELINES", "LOSSES", "CATALOGUE_LOSSES", "SAMPLERS")
    tables = [*(getattr(registry, name) for name in names), *registry.REGISTERED.values()]
    before = [dict(table) for table in tables]
    monkeypatch.setattr(plugins, "_named", {})
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `tron WORDS...` in this process: exit code, stdout, stderr."""
    import sys

    from tron_cli.cli import main

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tron", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, out, err

    return run


@pytest.fixture
def gpu_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the arithmetic do with tensors on the CPU what it does with those on CUDA."""
    import torch

    from tron_cli.ops import products, topk
    from tron_cli.sampling import logits

    def drop_targets(self: Any, logits_nC: torch.Tensor, ids: torch.Tensor, part: slice) -> None:
        logits_nC.masked_fill_(ids == self.batch.targets_N[part, None], -torch.inf)

    monkeypatch.setattr(logits._Candidates, "_drop_targets", drop_targets)
    monkeypatch.setattr(topk, "_columns", lambda values, count: values.topk(count, dim=1).indices)
    monkeypatch.setattr(products, "_one_dnn", lambda: False)
