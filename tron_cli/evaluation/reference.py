"""Reference figures of generated data: the best possible ranking and two baselines."""

from __future__ import annotations

import numpy as np

from tron_cli.baselines.markov import Markov
from tron_cli.baselines.popular import Popular
from tron_cli.baselines.predict import predict_baseline
from tron_cli.data.dataset import Sessions
from tron_cli.evaluation.metrics import parse_measures, score, values_of_ranks

MEASURES = "R@1 R@5 R@10 R@20 RR@5 RR@10 RR@20 nDCG@5 nDCG@10 nDCG@20"


def reference_figures(
    train: Sessions, split: Sessions, num_items: int, best_R: np.ndarray
) -> dict[str, dict[str, float]]:
    """Return figures of MEASURES on a split: `best` (expected), `markov`, `popularity` (realized).

    best_R: float [R], the probability that the best ranking has an event's target at rank 1, ..., R
    (at least 20, the largest cutoff), averaged over the events.
    """
    measures = parse_measures(MEASURES)
    value_of = values_of_ranks(measures, range(1, len(best_R) + 1), len(best_R))
    figures = {"best": {measure: float(best_R @ values) for measure, values in value_of.items()}}
    # Neither looks further back than the last item.
    settings = {"num_items": num_items, "sequence_length": 1}
    for name, baseline in (("markov", Markov(**settings)), ("popularity", Popular(**settings))):
        baseline.fit(train)
        found = predict_baseline(baseline, split, protocol="every-step", full_sessions=True)
        scored = score(found.rank_E, found.session_E, measures)
        figures[name] = {measure: figure.value for measure, figure in scored.items()}
    return figures
