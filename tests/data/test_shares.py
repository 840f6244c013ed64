"""Shares of a batch: every row in one of them, with its own events, targets and groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.bert4rec import cloze
from helpers.datasets import pack_sessions, random_sessions

from tron_cli.data.batches import Batch, training_batch
from tron_cli.data.shares import share_of


def rows_of(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of each row, as lists; of a masked batch the targets with their places."""
    assert batch.targets_N is not None
    rows = []
    for row in range(len(batch.lengths_B)):
        assert len(batch.inputs_N[batch.rows_N == row]) == batch.lengths_B[row]
        targets = batch.targets_N[batch.target_rows_P == row].tolist()
        if batch.predicting_P is not None:
            predicting = batch.predicting_P[batch.target_rows_P == row]
            targets += batch.places_N[predicting].tolist()
        rows.append((batch.inputs_N[batch.rows_N == row].tolist(), targets))
    return rows


def make(kind: str, rng: np.random.Generator) -> Batch:
    rows = random_sessions(rng, 11, 40)
    if kind == "cloze":
        return cloze(rows)
    return training_batch(
        pack_sessions(rows), np.arange(len(rows)), 6, last_only=kind == "prefixes"
    )


@pytest.mark.parametrize("processes", [2, 3, 11, 14])
@pytest.mark.parametrize("kind", ["whole", "prefixes", "cloze"])
def test_shares_are_the_rows_of_a_batch_dealt_out(
    kind: str, processes: int, rng: np.random.Generator
) -> None:
    batch = make(kind, rng)
    expected = rows_of(batch)
    for rank in range(processes):
        part = share_of(batch, rank, processes)
        assert part.share is not None
        assert part.share.counts == (rank < len(expected))
        assert rows_of(part) == (expected[rank::processes] or expected[:1])
        assert torch.equal(part.inputs_N, batch.inputs_N[part.share.events_N])
        assert part.targets_N is not None
        assert batch.targets_N is not None
        assert torch.equal(part.targets_N, batch.targets_N[part.share.targets_P])
        last = 0
        for group, whole in zip(part.groups, batch.groups, strict=True):
            assert group.start == last
            last = group.end
            assert group.whole is not None
            count, rows = group.whole
            assert count == len(whole.gather_RW)
            assert len(rows) == len(group.gather_RW)
            padded = batch.inputs_N[whole.gather_RW[rows]]
            assert torch.equal(part.inputs_N[group.gather_RW], padded)
            kept = part.inputs_N[group.gather_RW].flatten()
            kept = kept if group.keep is None else kept[group.keep]
            assert torch.equal(kept, part.inputs_N[group.start : group.end])
        assert last == len(part.inputs_N)
