"""Cloze batches: which events they hide, and which negatives are drawn for them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.bert4rec import ITEMS, LENGTH, MASK, cloze, make_model
from helpers.datasets import pack_sessions, random_sessions

from tron_cli.data.batches import cloze_batch
from tron_cli.sampling.negatives import Distribution, sample_negatives

CPU = torch.device("cpu")


STYLES = ("eventwise", "sessionwise", "batchwise")


def test_a_hidden_item_is_nowhere_in_what_the_network_sees(rng: np.random.Generator) -> None:
    """Sessions that differ in it alone give the same inputs and the same hidden states.

    And a target that is not hidden is seen in its own place only.
    """
    rows = random_sessions(rng, 60, ITEMS, longest=9)
    model = make_model()
    targets = hidden_ones = 0
    for seed in range(40):
        batch = cloze(rows, seed=seed)
        # A row of the batch and a place in it, of the last LENGTH + 1 events of a session.
        order = sorted(range(len(rows)), key=lambda row: min(len(rows[row]), LENGTH + 1))
        changed = [list(row) for row in rows]
        for event in batch.predicting_P.tolist():
            row = changed[order[batch.rows_N[event]]]
            place = int(batch.places_N[event]) + len(row) - min(len(row), LENGTH + 1)
            row[place] = row[place] % ITEMS + 1
        other = cloze(changed, seed=seed)
        assert torch.equal(other.predicting_P, batch.predicting_P)
        assert torch.equal(other.targets_N, batch.targets_N % ITEMS + 1)
        kept = batch.inputs_N[batch.predicting_P] != other.inputs_N[batch.predicting_P]
        seen = batch.predicting_P[kept]
        expected = batch.inputs_N.clone()
        expected[seen] = expected[seen] % ITEMS + 1
        assert torch.equal(other.inputs_N, expected)
        assert torch.equal(batch.inputs_N[seen], batch.targets_N[kept])

        # Now the hidden ones alone.
        for event in seen.tolist():
            row = changed[order[batch.rows_N[event]]]
            place = int(batch.places_N[event]) + len(row) - min(len(row), LENGTH + 1)
            row[place] = (row[place] - 2) % ITEMS + 1
        other = cloze(changed, seed=seed)
        assert torch.equal(other.inputs_N, batch.inputs_N)
        assert torch.equal(other.targets_N != batch.targets_N, ~kept)
        with torch.no_grad():
            assert torch.equal(model(other), model(batch))
        targets += len(kept)
        hidden_ones += int((~kept).sum())
    # Sessions without a target have one hidden, so that somewhat more than 90 % are.
    assert 0.9 < hidden_ones / targets < 0.95


@pytest.mark.parametrize("probability", [0.15, 0.6, 1.0])
def test_shares_of_what_targets_are_shown_as(probability: float) -> None:
    """Sessions are of 1s or of 2s, which only kept events tell apart."""
    num_items, sessions, length = 50, 2500, 40
    ones, twos = (
        cloze(
            np.full((sessions, length), item).tolist(),
            length=50,
            probability=probability,
            num_items=num_items,
        )
        for item in (1, 2)
    )
    total = sessions * length
    targets = len(ones.predicting_P)
    shown_P = ones.inputs_N[ones.predicting_P]
    is_kept_P = shown_P != twos.inputs_N[twos.predicting_P]
    is_mask_P = shown_P == num_items + 1
    random_items = shown_P[~is_kept_P & ~is_mask_P]
    for found, count, share in (
        (targets, total, probability),
        (int(is_mask_P.sum()), targets, 0.8),
        (len(random_items), targets, 0.1),
        (int(is_kept_P.sum()), targets, 0.1),
    ):
        assert abs(found - count * share) <= 5 * math.sqrt(count * share * (1 - share))
    # Items 1..I alike: Pearson's statistic has mean I - 1 and variance 2 (I - 1).
    assert (random_items.min(), random_items.max()) == (1, num_items)
    expected = len(random_items) / num_items
    statistic = float(((random_items.bincount()[1:] - expected) ** 2 / expected).sum())
    assert abs(statistic - (num_items - 1)) <= 5 * math.sqrt(2 * (num_items - 1))
    # Targets are as frequent in each place of a session.
    at_place = ones.places_N[ones.predicting_P].bincount(minlength=length)
    deviation = 5 * math.sqrt(sessions * probability * (1 - probability))
    assert (at_place - sessions * probability).abs().max() <= deviation


def test_a_session_without_a_drawn_target_has_its_last_event_masked(
    rng: np.random.Generator,
) -> None:
    rows = random_sessions(rng, 300, ITEMS)
    batch = cloze(rows, probability=1e-9)  # nothing is drawn
    last_B = batch.lengths_B.cumsum(0) - 1
    assert torch.equal(batch.predicting_P, last_B)
    assert (batch.inputs_N[last_B] == MASK).all()
    # And not where something was: of pairs, both are targets with p^2, and the last is one with p
    # or where neither was drawn.
    pairs = rng.integers(1, ITEMS + 1, (20_000, 2)).tolist()
    batch = cloze(pairs, probability=0.3)
    targets_B = batch.rows_N[batch.predicting_P].bincount(minlength=len(pairs))
    assert targets_B.min() == 1
    last_ones = int((batch.places_N[batch.predicting_P] == 1).sum())
    for found, share in ((int((targets_B == 2).sum()), 0.3**2), (last_ones, 0.3 + 0.7**2)):
        assert abs(found - 20_000 * share) <= 5 * math.sqrt(20_000 * share * (1 - share))


def test_the_window_is_the_last_events_with_one_more_for_the_target(
    rng: np.random.Generator,
) -> None:
    """The window holds a history of sequence_length events and the mask, as in prediction."""
    rows = random_sessions(rng, 50, ITEMS, longest=14)
    chosen = rng.integers(0, len(rows), 80)
    batch = cloze_batch(
        pack_sessions(rows), chosen, LENGTH, num_items=ITEMS, mask_probability=0.5, random=rng
    )
    inputs_N = batch.inputs_N.clone()
    inputs_N[batch.predicting_P] = batch.targets_N
    found = [row.tolist() for row in inputs_N.split(batch.lengths_B.tolist())]
    assert found == sorted((rows[row][-(LENGTH + 1) :] for row in chosen), key=len)
    assert make_model().window == LENGTH + 1


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("rejects", [False, True])
@pytest.mark.parametrize("uniform", [False, True])
def test_a_mask_is_never_a_negative(style: str, rejects: bool, uniform: bool) -> None:
    """Nor does it reject anything; kept in-batch negatives are as many as there are candidates."""
    rng = np.random.default_rng(1)
    distribution = (
        Distribution(ITEMS)
        if uniform
        else Distribution.of(np.arange(1.0, ITEMS + 1), expected_of=None, device=CPU)
    )
    for seed, (rows, many) in enumerate(itertools.product((2, 12), (3, 500))):
        batch = cloze(random_sessions(rng, rows, ITEMS), seed=seed, probability=0.6)
        torch.manual_seed(seed)
        drawn = sample_negatives(
            batch,
            distribution,
            num_uniform=300,
            num_batch=many,
            sampling_style=style,
            reject_uniform_session_items=rejects,
            reject_in_batch_items=rejects,
        )
        shape = {"eventwise": (len(batch.targets_N), 300), "sessionwise": (rows, 300)}
        assert drawn.uniform.shape == shape.get(style, (300,))
        assert drawn.uniform.min() >= 1
        assert drawn.uniform.max() <= ITEMS
        keep_BM = drawn.in_batch_keep_BM
        for row in range(rows):
            own_N = batch.rows_N == row
            if rejects and style != "batchwise":
                sets = {"eventwise": batch.target_rows_P == row, "sessionwise": row}
                found = set(drawn.uniform[sets[style]].flatten().tolist())
                assert not found & set(batch.inputs_N[own_N].tolist())
            candidate_N = batch.inputs_N != MASK
            if rejects:
                candidate_N &= ~own_N
            index_M = drawn.in_batch_BM[row]
            index_M = index_M if keep_BM is None else index_M[keep_BM[row]]
            assert candidate_N[index_M].all()
            assert len(index_M.unique()) == len(index_M) == min(many, int(candidate_N.sum()))
