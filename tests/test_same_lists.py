"""The comparison of the lists of all ways of serving: its reasons by hand, and a tiny run."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from helpers.datasets import cyclic_sessions, write_dataset

from benchmarks import same_lists
from benchmarks.same_lists import OTHER, ROUNDING, TARGET_LAST, reason
from tron_cli.cli import app
from tron_cli.serving.recommender import Recommendation, Recommender

# Items 2, 3 and 4 tie.
OURS = Recommendation([1, 2, 3, 4, 5, 6], [9.0, 5.0, 5.0, 5.0, 4.0, 1.0])


@pytest.mark.parametrize(
    ("run", "found", "target", "expected"),
    [
        ([1, 3, 4, 2], [1, 2, 3, 4], 2, TARGET_LAST),
        ([1, 3], [1, 2], 2, TARGET_LAST),  # the target fell off the end
        ([1, 2, 4, 3], [1, 2, 3, 4], 3, TARGET_LAST),
        ([1, 3, 4, 5], [1, 2, 3, 4], 2, OTHER),  # it jumped over item 5, which scores less
        ([1, 3, 2, 4], [1, 2, 3, 4], 2, OTHER),  # item 4 is its equal, too
        ([1, 3, 4, 2], [1, 2, 3, 4], 6, OTHER),  # item 2 is not the target
        ([2, 1, 3, 4], [1, 2, 3, 4], 1, OTHER),
        ([1, 2, 3, 4], [1, 3, 2, 4], 6, OTHER),
        ([1, 2, 3, 4], [2, 1, 3, 4], 6, OTHER),
        ([1, 2, 3, 4], [1, 2, 3, 7], 6, OTHER),
        ([1, 2, 3, 4], [1, 2, 3], 6, OTHER),
    ],
)
def test_reasons_why_lists_differ(
    run: list[int], found: list[int], target: int, expected: str
) -> None:
    assert reason(run, found, OURS, [*OURS.scores], target, exact=True) == expected


@pytest.mark.parametrize(
    ("run", "found", "expected"),
    [
        ([1, 2, 3, 4], [1, 3, 2, 4], ROUNDING),
        ([1, 3, 2], [1, 2, 4], ROUNDING),
        ([1, 2, 3, 4], [2, 1, 3, 4], OTHER),
        ([1, 2, 3, 4], [1, 2, 3, 7], OTHER),
        ([1, 2, 3, 4], [1, 2, 3], OTHER),
    ],
)
def test_networks_may_swap_items_with_nearly_the_same_score(
    run: list[int], found: list[int], expected: str
) -> None:
    assert reason(run, found, OURS, [*OURS.scores], 6, exact=False) == expected


def test_a_tiny_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands run in this process; `recommend` and `serve` cut each list short."""
    write_dataset(tmp_path, train=[*cyclic_sessions(40, 1), [30, 1]], test=cyclic_sessions(9, 2))
    output = tmp_path / "result.json"

    def tron(words: list[str]) -> dict[str, Any]:
        printed = io.StringIO()
        with redirect_stdout(printed):
            app([*words, "--json"], standalone_mode=False)
        return json.loads(printed.getvalue())

    def short(checkpoint: str, histories: same_lists.Lists, k: int) -> same_lists.Lists:
        found = Recommender.load(checkpoint).recommend(histories, k=k - 1)
        return [[*each.items] for each in found]

    monkeypatch.setattr(same_lists, "tron", tron)
    monkeypatch.setattr(same_lists, "command", short)
    monkeypatch.setattr(same_lists, "server", short)
    small = (*same_lists.SMALL, "num_uniform_negatives=16", "topk_sampling=False")
    monkeypatch.setattr(same_lists, "SMALL", small)
    words = ["tiny", f"--data-dir={tmp_path}", "--sessions=8", "--steps=2"]
    with pytest.raises(SystemExit, match="1"):
        same_lists.main([*words, f"--output={output}", "--models", "tron", "popular"])
    network, popular = json.loads(output.read_text())["figures"]
    assert network["histories"] == sum(map(len, cyclic_sessions(9, 2)[:8])) - 8
    for side in ("Recommender", "onnx"):
        assert network[side]["differ"] == 0
    assert 0 < popular["Recommender"]["differ"] == popular["Recommender"][TARGET_LAST]
    assert "onnx" not in popular
    for figure in (network, popular):
        assert figure["recommend"][OTHER] == figure["serve"][OTHER] == figure["histories"]
    assert TARGET_LAST in capsys.readouterr().out
