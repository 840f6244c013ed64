"""`tron evaluate` and `tron compare`: what they print, and their options."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.command_lines import Command, is_one_sentence

from tron_cli.api import evaluation as api


def test_evaluate_json_is_one_object_with_the_promised_keys(
    shop: list[str], command: Command, tmp_path: Path
) -> None:
    best = command("train", *shop)[1].strip()
    data = shop[2:4]
    code, out, _ = command("evaluate", best, *data, "--json", "--metrics", "R@20 RR@20 nDCG@10")
    assert code == 0
    assert out.count("\n") == 1
    report = json.loads(out)
    promised = "metrics protocol split events sessions items checkpoint dataset"
    assert set(promised.split()) <= set(report)
    assert list(report["metrics"]) == ["R@20", "RR@20", "nDCG@10"]
    for figure in report["metrics"].values():
        assert {"value", "stderr"} <= set(figure)
        assert 0 <= figure["value"] <= 1
    assert (report["protocol"], report["split"]) == ("every-step", "test")
    assert (report["sessions"], report["items"], report["dataset"]) == (30, 30, "tiny")
    assert report["checkpoint"] == best


def test_evaluate_prints_a_table_with_what_it_rests_on(shop: list[str], command: Command) -> None:
    best = command("train", *shop)[1].strip()
    code, out, _ = command(
        "evaluate", Path(best).parent, *shop[2:4], "--one-pass", "--limit-sessions", 9
    )
    assert code == 0
    facts = ["R@5", "std. error", "every-step", "test split", "one pass", "ranked above"]
    for fact in (*facts, "9 sessions", "beyond the limit"):
        assert fact in out
    _, out, _ = command("evaluate", best, *shop[2:4])
    for fact in ("3 events whose item training lacks", "--full-sessions also gives", best):
        assert fact in out
    assert "lost as misses" not in out
    _, out, _ = command("evaluate", best, *shop[2:4], "--full-sessions")
    assert "lost as misses" in out


@pytest.mark.parametrize("option", ["--run", "--qrels"])
def test_evaluate_refuses_a_file_it_cannot_write(
    option: str, shop: list[str], command: Command, tmp_path: Path
) -> None:
    best = command("train", *shop, "max_epochs=1")[1].strip()
    for place in (tmp_path, tmp_path / "no" / "file"):
        code, out, err = command("evaluate", best, *shop[2:4], option, place)
        assert (code, out) == (2, "")
        assert "cannot write" in err
        assert is_one_sentence(err)


def test_a_checkpoint_needs_its_dataset_only(
    shop: list[str], command: Command, tmp_path: Path
) -> None:
    best = Path(command("train", *shop)[1].strip())
    before = json.loads(command("evaluate", best, *shop[2:4], "--json")[1])
    (tmp_path / "config.py").unlink()
    moved = best.rename(tmp_path / "moved.pt")
    after = json.loads(command("evaluate", moved, *shop[2:4], "--json")[1])
    assert after["metrics"] == before["metrics"]
    code, _, err = command("evaluate", moved, "--data-dir", tmp_path / "elsewhere")
    assert code == 2
    assert "elsewhere" in err


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the defaults of a function's parameters."""
    return {name: each.default for name, each in inspect.signature(function).parameters.items()}


def test_every_option_of_evaluate_arrives(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def evaluate(checkpoint: Path, **options: Any) -> SimpleNamespace:
        seen.append({"checkpoint": checkpoint, **options})
        return SimpleNamespace(report={})

    options = options_of(api.evaluate)
    monkeypatch.setattr("tron_cli.api.evaluation.evaluate", evaluate)
    code, out, _ = command("evaluate", "a.pt", "--json")
    assert (code, out) == (0, "{}\n")
    defaults = seen.pop()
    assert defaults.pop("checkpoint") == Path("a.pt")
    assert defaults.pop("by") == []
    assert defaults.pop("data_dir") == Path("datasets")
    assert defaults.items() <= options.items()
    assert command(
        "evaluate", "a.pt", "--json", "--dataset", "shop", "--split", "val",
        "--protocol", "last-item", "--metrics", "R@3", "--filter-rated", "--full-sessions",
        "--one-pass", "--limit-sessions", 7, "--run", "r", "--qrels", "q", "--data-dir", "d",
        "--device", "cpu", "--sample-sessions", 3, "--seed", 4, "--per-event", "e.csv",
        "--by", "repeat", "--by", "length", "--cutoff", 5, "--drop-unknown",
        "--table-sharding", "rows",
    )[0] == 0  # fmt: skip
    assert seen.pop() == {
        "checkpoint": Path("a.pt"), "dataset": "shop", "split": "val", "protocol": "last-item",
        "metrics": "R@3", "filter_rated": True, "full_sessions": True, "one_pass": True,
        "limit_sessions": 7, "run": Path("r"), "qrels": Path("q"), "sample_sessions": 3, "seed": 4,
        "per_event": Path("e.csv"), "by": ["repeat", "length"], "cutoff": 5, "drop_unknown": True,
        "data_dir": Path("d"), "device": "cpu", "table_sharding": "rows",
    }  # fmt: skip
    command("evaluate", "a.pt", "--no-filter-rated")
    assert seen.pop()["filter_rated"] is False


def test_every_option_of_compare_arrives(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def compare(checkpoints: list[Path], **options: Any) -> SimpleNamespace:
        seen.append({"checkpoints": checkpoints, **options})
        return SimpleNamespace(report={})

    options = options_of(api.compare)
    monkeypatch.setattr("tron_cli.api.evaluation.compare", compare)
    code, out, _ = command("compare", "a.pt", "b.pt", "--json")
    assert (code, out) == (0, "{}\n")
    defaults = seen.pop()
    assert defaults.pop("checkpoints") == [Path("a.pt"), Path("b.pt")]
    assert defaults.pop("data_dir") == Path("datasets")
    assert defaults.items() <= options.items()
    command(
        "compare", "a.pt", "b.pt", "--dataset", "shop", "--split", "val",
        "--protocol", "every-step", "--metrics", "R@3", "--no-filter-rated", "--full-sessions",
        "--limit-sessions", 7, "--sample-sessions", 3, "--seed", 4, "--drop-unknown",
        "--reference", 2, "--cutoff", 5, "--data-dir", "d", "--device", "cpu", "--json",
    )  # fmt: skip
    assert seen.pop() == {
        "checkpoints": [Path("a.pt"), Path("b.pt")], "dataset": "shop", "split": "val",
        "protocol": "every-step", "metrics": "R@3", "filter_rated": False, "full_sessions": True,
        "limit_sessions": 7, "sample_sessions": 3, "seed": 4, "drop_unknown": True,
        "reference": 2, "cutoff": 5, "data_dir": Path("d"), "device": "cpu",
    }  # fmt: skip
