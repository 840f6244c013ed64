"""Figures from ranks, compared with ir-measures on every query and a bootstrap over sessions."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import time

import ir_measures
import numpy as np
import pytest
from ir_measures import Qrel, ScoredDoc

from tron_cli.errors import InputError
from tron_cli.evaluation.metrics import Figure, figures, parse_measures, score, values_by_rank

MEASURES = "R@1 R@5 R@20 R@50 RR@10 RR@20 nDCG@5 nDCG@10 Success@1 Success@3 P@10 AP@10 Judged@10"
if shutil.which("perl"):  # ir-measures runs these two in a perl script
    MEASURES += " nDCG(dcg='exp-log2')@7 ERR@10"


def every_query(
    ranks: np.ndarray, num_items: int, measures: list[ir_measures.Measure]
) -> dict[str, float]:
    """Run ir-measures on a full ranking of the catalogue per event; a miss lacks its target."""
    qrels, run = [], []
    for event, rank in enumerate(ranks):
        qrels.append(Qrel(str(event), "target", 1))
        for place in range(1, num_items + 1):
            item = "target" if place == rank else f"other{place}"
            run.append(ScoredDoc(str(event), item, 1.0 / place))
    return {str(m): v for m, v in ir_measures.calc_aggregate(measures, qrels, run).items()}


@pytest.mark.parametrize("seed", range(4))
def test_equals_ir_measures_on_every_query(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_items = 60
    ranks = rng.integers(0, num_items + 1, 150)
    measures = parse_measures(MEASURES)
    figures = score(ranks, rng.integers(0, 30, 150), measures)
    expected = every_query(ranks, num_items, measures)
    assert list(figures) == [str(measure) for measure in measures]
    for name, figure in figures.items():
        assert figure.value == pytest.approx(expected[name], abs=1e-12), name


def test_cutoff_beyond_the_catalogue() -> None:
    ranks = np.array([1, 2, 3, 3, 0])
    measures = parse_measures("R@100 RR@100 nDCG@100 P@100 AP@100 Success@100")
    figures = score(ranks, np.arange(5), measures)
    for name, value in every_query(ranks, 3, measures).items():
        assert figures[name].value == pytest.approx(value, abs=1e-12), name


def test_hand_computed_values() -> None:
    ranks = np.array([1, 2, 5, 21, 0])
    figures = score(ranks, np.array([0, 0, 1, 2, 2]), parse_measures("R@20 RR@20 nDCG@10 P@10"))
    assert figures["R@20"].value == pytest.approx(3 / 5)
    assert figures["RR@20"].value == pytest.approx((1 + 1 / 2 + 1 / 5) / 5)
    assert figures["nDCG@10"].value == pytest.approx((1 + 1 / math.log2(3) + 1 / math.log2(6)) / 5)
    assert figures["P@10"].value == pytest.approx(3 / 50)
    # Sessions sum to 2, 1, 0 hits of 2, 1, 2 events at the mean 0.6: residuals 0.8, 0.4, -1.2.
    assert figures["R@20"].stderr == pytest.approx(math.sqrt(3 / 2 * (0.64 + 0.16 + 1.44)) / 5)


def test_a_miss_is_zero_everywhere() -> None:
    for figure in score(np.zeros(4, np.int64), np.arange(4), parse_measures(MEASURES)).values():
        assert figure == Figure(0.0, 0.0)


def test_stderr_with_one_event_per_session_is_the_iid_formula() -> None:
    ranks = np.random.default_rng(0).integers(1, 40, 500)
    figure = score(ranks, np.arange(500)[::-1], parse_measures("RR@20"))["RR@20"]
    values = np.where(ranks <= 20, 1 / ranks, 0)
    assert figure.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(500))


def test_stderr_equals_a_bootstrap_over_sessions() -> None:
    rng = np.random.default_rng(1)
    num_sessions = 400
    lengths = rng.geometric(0.2, num_sessions)
    sessions = np.repeat(np.arange(num_sessions), lengths)
    # Sessions differ in difficulty, so that the iid formula would be far off.
    hard = np.repeat(rng.random(num_sessions) < 0.5, lengths)
    ranks = np.where(hard, rng.integers(1, 400, len(sessions)), rng.integers(1, 12, len(sessions)))
    shuffled = rng.permutation(len(ranks))
    figures = score(ranks[shuffled], sessions[shuffled] * 3, parse_measures("R@20 RR@20 nDCG@10"))
    gains = {
        "R@20": (ranks <= 20).astype(float),
        "RR@20": np.where(ranks <= 20, 1 / ranks, 0),
        "nDCG@10": np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0),
    }
    drawn = rng.multinomial(num_sessions, np.full(num_sessions, 1 / num_sessions), size=4000)
    for name, gain in gains.items():
        sums = np.bincount(sessions, weights=gain)
        bootstrap = ((drawn @ sums) / (drawn @ lengths)).std()
        assert figures[name].stderr == pytest.approx(bootstrap, rel=0.06), name


def test_lost_events_are_misses_of_their_sessions() -> None:
    """Session 1 has lost events only, session 3 none of either."""
    ranks, sessions, lost = np.array([1, 2, 9]), np.array([0, 2, 2]), np.array([2, 1, 0, 0])
    value_of = values_by_rank(parse_measures("RR@5"))
    figure = figures(value_of, ranks, sessions, lost)["RR@5"]
    # Sums 1, 0, 0.5 of 3, 1, 2 events at the mean 0.25: residuals 0.25, -0.25, 0.
    assert figure.value == pytest.approx(1.5 / 6)
    assert figure.stderr == pytest.approx(math.sqrt(3 / 2 * (0.25**2 + 0.25**2)) / 6)


def test_stderr_of_one_session_is_unknown() -> None:
    figure = score(np.array([1, 3]), np.array([7, 7]), parse_measures(["R@1"]))["R@1"]
    assert figure == Figure(0.5, None)


def test_no_events() -> None:
    empty = np.zeros(0, np.int64)
    with pytest.raises(InputError, match="no event"):
        score(empty, empty, parse_measures("R@20"))


def test_names_are_ir_measures_and_repeats_are_dropped() -> None:
    assert [str(m) for m in parse_measures(["Recall@20", "R@20", "MRR@5"])] == ["R@20", "RR@5"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("R", r"needs a cutoff, such as R@20"),
        ("nDCG(dcg='exp-log2')", "needs a cutoff"),
        ("HR@10", r"did you mean R@10\?"),
        ("ndgc@5", r"did you mean nDCG@5\?"),
        ("ndcg@10", r"did you mean nDCG@10\?"),
        ("xyzzy", r"did you mean R@20\?"),
        ("R@0", "from 1 to 1000"),
        ("R@-3", "NAME@CUTOFF"),
        ("R@2.5", "whole number"),
        ("R@True", "whole number"),
        ("R@1001", "from 1 to 1000"),
        ("Rprec@10", "takes no cutoff"),
        ("IPrec@0.1", "takes no cutoff"),
        ("nDCG(foo=3)@10", "cannot compute"),
        ("Accuracy@10", "cannot compute"),
        ("RBP(p='x')@10", "cannot compute"),
        ("R(rel=2)@20", r"is 0 wherever the target stands.*try R@20 without"),
        ("RR(rel=3)@5", "is 0 wherever the target stands"),
        ("P(rel=2)@5", "is 0 wherever the target stands"),
        ("AP(rel=2)@5", "is 0 wherever the target stands"),
        ("Success(rel=2)@1000", "is 0 wherever the target stands"),
        ("R(judged_only=True)@3", "counts items beyond its cutoff of 3"),
        ("R(rel=0)@20", "cannot compute"),
        ("", "no measure given"),
        ([], "no measure given"),
    ],
)
def test_bad_names(names: str | list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_measures(names)


def test_ten_million_events_take_seconds() -> None:
    rng = np.random.default_rng(2)
    sessions = np.repeat(np.arange(1_250_000), 8)
    ranks = rng.integers(0, 1000, len(sessions))
    start = time.perf_counter()
    score(ranks, sessions, parse_measures("R@20 RR@20 nDCG@10"))
    assert time.perf_counter() - start < 10


def test_needs_no_torch() -> None:
    code = "import sys, tron_cli.evaluation.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_may_be_separated_by_commas():
    assert parse_measures("R@20, RR@20,nDCG@10") == parse_measures(["R@20", "RR@20", "nDCG@10"])
