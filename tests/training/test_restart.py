"""Folders of runs that torchrun starts again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tron_cli.errors import InputError
from tron_cli.training.restart import claimed_again

SETTINGS = {"config": {"seed": 1}, "init_from": None}


def claim(folder: Path, *files: str, settings: Any = SETTINGS, numbered: bool = False) -> Path:
    """Claim the folder of a run, and let the run write some files."""
    with claimed_again(folder, numbered=numbered, settings=settings) as claimed:
        for name in files:
            (claimed / name).touch()
    return claimed


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("run_id", ["none", "job-7"])
def test_a_restarted_job_gets_the_folder_that_it_made(
    run_id: str, numbered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --name, the name of the folder is the time of the first start."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    first, later = tmp_path / "run", tmp_path / ("later" if numbered else "run")
    made = claim(first, "config.json", "best.pt", numbered=numbered)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert claim(later, numbered=numbered) == made
    assert not (made / "best.pt").exists()  # nothing to continue without last.pt
    claim(later, "best.pt", "last.pt", numbered=numbered)
    assert claim(later, numbered=numbered) == made
    assert (made / "best.pt").exists()
    assert [path.name for path in tmp_path.iterdir()] == [made.name]


def test_a_run_of_another_job_or_with_other_settings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(run: str, *, settings: Any = SETTINGS) -> None:
        with pytest.raises(InputError, match="holds a run already; continue it with"):
            claim(tmp_path / run, settings=settings)

    claim(tmp_path / "without-torchrun", "last.pt")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "monday")
    claim(tmp_path / "run", "last.pt")
    refused("run")  # not restarted
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    refused("without-torchrun")
    refused("run", settings={**SETTINGS, "init_from": "other.pt"})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "tuesday")
    refused("run")


def test_a_run_that_is_refused_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    claim(tmp_path / "runs" / "run")
    assert not (tmp_path / "runs").exists()
