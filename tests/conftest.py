"""Tiny prepared datasets and configurations that several test modules train and evaluate on."""

from __future__ import annotations

from collections.abc import Callable

import pytest


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
