"""Events in = events out + reported drops."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from tron_cli.data.dataset import SPLITS, Dataset
from tron_cli.prepare.summary import summary_text


def assert_balanced(dataset: Dataset, *, events: int, sessions: int | None = None) -> None:
    """The steps lead from what the source holds to what the arrays hold, and all are printed."""
    chains = [dataset.info["filters"]]
    last_item = dataset.protocol == "last-item"
    parts = {name: dataset.split(name) for name in SPLITS}
    # Where a row of val or test is a whole history, only its last event is new.
    kept = [
        len(part) if last_item and name != "train" else len(part.items)
        for name, part in parts.items()
    ]
    rows = [len(part) for part in parts.values()]
    if last_item:
        ids = [dataset.user_ids(name) for name in SPLITS]
        users = {user for of in ids if of is not None for user in of[np.arange(len(of))].tolist()}
        ends = [(len(users), sum(kept))]
    elif "test_filters" in dataset.info:
        chains.append(dataset.info["test_filters"])
        ends = [(sum(rows[:2]), sum(kept[:2])), (rows[2], kept[2])]
    else:
        ends = [(sum(rows), sum(kept))]
    assert sum(chain[0]["events"] for chain in chains) == events
    if sessions is not None:
        assert sum(chain[0]["sessions"] for chain in chains) == sessions
    text = [line.split() for line in summary_text(dataset).splitlines()]
    for chain, end in zip(chains, ends, strict=True):
        for before, after in pairwise(chain):
            assert before["events"] - after["dropped_events"] == after["events"]
            assert after["dropped_events"] >= 0
            if before["sessions"] is not None:
                assert before["sessions"] - after["dropped_sessions"] == after["sessions"]
                assert after["dropped_sessions"] >= 0
            assert after["why"]
            printed = [line for line in text if line[:1] == after["step"].split()[:1]]
            assert any(f"{after['dropped_events']:,}" in line for line in printed)
        assert (chain[-1]["sessions"], chain[-1]["events"]) == end
