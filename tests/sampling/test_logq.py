"""The logQ correction: the loss of sampled negatives estimates that of the whole catalogue.

With negatives j, of which E_j are expected to be item j, the sum of exp(s_j) / E_j over what was
drawn has the mean of the sum of exp(s_i) over all items but the target, whose own term is there
without any sampling and so needs no correction.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import pack_sessions, tiny_settings
from torch.nn import functional as F

from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import Batch, cloze_batch, training_batch
from tron_cli.data.dataset import Sessions
from tron_cli.errors import InputError
from tron_cli.losses import sampled as losses
from tron_cli.models.base import build_model
from tron_cli.sampling.logits import sampled_logits
from tron_cli.sampling.negatives import Negatives, sample_negatives
from tron_cli.training.feed import build_feed, expected_in_batch
from tron_cli.training.start import _distribution

CPU = torch.device("cpu")
STYLES = ("eventwise", "sessionwise", "batchwise")
ITEMS = 25


def make_config(**changes: Any) -> ExperimentConfig:
    settings = {
        "logq_correction": True,
        "topk_sampling": False,
        "reject_in_batch_items": False,
        "sequence_length": 3,
        **changes,
    }
    return ExperimentConfig(**tiny_settings(**settings))


def skewed_sessions(count: int, *, shortest: int, longest: int, seed: int = 1) -> Sessions:
    """Popularity differs by factors, and what comes last (or too early) is mostly other items."""
    random = np.random.default_rng(seed)
    rows = []
    for length in random.integers(shortest, longest + 1, count):
        row = np.minimum(random.geometric(0.12, length), ITEMS)
        row[-1] = random.integers(18, ITEMS + 1)
        row[: max(0, length - 4)] = 20
        rows.append(row.tolist())
    return pack_sessions(rows)


def draw(batch: Batch, config: ExperimentConfig, sessions: Sessions) -> Negatives:
    return sample_negatives(
        batch,
        _distribution(config, sessions, ITEMS, CPU),
        num_uniform=config.num_uniform_negatives,
        num_batch=config.num_batch_negatives,
        sampling_style=config.sampling_style,
        reject_uniform_session_items=config.reject_uniform_session_items,
        reject_in_batch_items=config.reject_in_batch_items,
    )


def estimates(
    batch: Batch, negatives: Negatives, hidden_ND: torch.Tensor, table_VD: torch.Tensor
) -> torch.Tensor:
    """[N]: what the loss takes for the sum of exp(score) over all items but the target."""
    positive_N, negative_NK, keep_NK = sampled_logits(
        hidden_ND, table_VD, batch, negatives, topk=None, mask_collisions=True
    )
    loss_N = losses.ssm(positive_N, negative_NK, keep_NK)
    return positive_N.exp() * (loss_N.exp() - 1)


def full_sums(
    batch: Batch, hidden_ND: torch.Tensor, table_VD: torch.Tensor, items: np.ndarray
) -> torch.Tensor:
    """[N]: the sum of exp(score) over some items but the target, one by one."""
    assert batch.targets_N is not None
    scores_NV = (hidden_ND @ table_VD.T).exp().tolist()
    return torch.tensor(
        [
            sum(scores[item] for item in items if item != target)
            for scores, target in zip(scores_NV, batch.targets_N.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )


def scene(num_events: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(num_events, 3, dtype=torch.float64, generator=generator)
    table_VD = torch.randn(ITEMS + 1, 3, dtype=torch.float64, generator=generator)
    return hidden_ND, table_VD


SAMPLED = [
    {"negative_sampler": "uniform"},
    {"negative_sampler": "popularity", "popularity_alpha": 1.0},
    {"negative_sampler": "popularity", "popularity_alpha": 0.5},
    {"negative_sampler": "mixed", "popularity_alpha": 1.0, "mixed_share": 0.7},
]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("sampler", SAMPLED, ids=str)
def test_drawn_negatives_estimate_the_sum_over_the_catalogue(
    style: str, sampler: dict[str, Any]
) -> None:
    """The means of very many draws, to within five of their standard errors."""
    sessions = skewed_sessions(300, shortest=2, longest=7)
    count = 100_000
    config = make_config(
        sampling_style=style, num_batch_negatives=0, num_uniform_negatives=count, **sampler
    )
    batch = training_batch(sessions, np.arange(4), config.sequence_length)
    hidden_ND, table_VD = scene(len(batch.inputs_N))
    torch.manual_seed(0)
    found_N = estimates(batch, draw(batch, config, sessions), hidden_ND, table_VD)

    count_I = np.bincount(sessions.items, minlength=ITEMS + 1)[1:].astype(float)
    popular_I = count_I ** sampler.get("popularity_alpha", 0.0)
    share = sampler.get("mixed_share", 1.0)
    chance_I = share * popular_I / popular_I.sum() + (1 - share) / ITEMS
    drawn = np.flatnonzero(chance_I) + 1
    expected_N = full_sums(batch, hidden_ND, table_VD, drawn)
    # The mean of exp(s_j) / q_j over draws of q: its variance by hand, the target's term being 0.
    assert batch.targets_N is not None
    for event, target in enumerate(batch.targets_N.tolist()):
        terms = (hidden_ND[event] @ table_VD[drawn].T).exp().numpy() * (drawn != target)
        chances = chance_I[drawn - 1]
        error = np.sqrt(((terms**2 / chances).sum() - terms.sum() ** 2) / count)
        assert abs(found_N[event] - expected_N[event]) < 5 * error + 1e-5 * expected_N[event]


@pytest.mark.parametrize(
    ("num_uniform", "sampler"),
    [(0, SAMPLED[0]), (6, SAMPLED[0]), (20, SAMPLED[1]), (20, SAMPLED[3])],
    ids=str,
)
@pytest.mark.parametrize("others_only", [False, True])
def test_in_batch_negatives_estimate_it_too(
    num_uniform: int, sampler: dict[str, Any], others_only: bool
) -> None:
    """Mean over many batches of sessions at random; alone over all that is ever an input."""
    sessions = skewed_sessions(200, shortest=6, longest=6)  # of one length: exact in the mean
    config = make_config(
        num_uniform_negatives=num_uniform, num_batch_negatives=30, train_batch_size=64,
        sampling_style="sessionwise", reject_in_batch_items=others_only, **sampler,
    )  # fmt: skip
    inputs = np.unique(
        np.concatenate([sessions.items[e - 4 : e - 1] for e in sessions.offsets[1:]])
    )
    items = np.arange(1, ITEMS + 1) if sampler["negative_sampler"] == "mixed" else inputs
    if num_uniform:
        items = np.unique(np.append(sessions.items, inputs))
        if sampler["negative_sampler"] != "popularity":
            items = np.arange(1, ITEMS + 1)
    random = np.random.default_rng(2)
    torch.manual_seed(2)
    ratios = []
    distribution = _distribution(config, sessions, ITEMS, CPU)
    hidden_D, table_VD = scene(1)[0][0], scene(1)[1]
    for _ in range(400):
        batch = training_batch(sessions, random.integers(200, size=64), 3)
        hidden_ND = hidden_D.expand(len(batch.inputs_N), -1).contiguous()
        negatives = sample_negatives(
            batch, distribution, num_uniform=num_uniform, num_batch=30,
            sampling_style="sessionwise", reject_uniform_session_items=False,
            reject_in_batch_items=others_only,
        )  # fmt: skip
        found_N = estimates(batch, negatives, hidden_ND, table_VD)
        expected_N = full_sums(batch, hidden_ND, table_VD, items)
        ratios.append(float((found_N / expected_N).mean()))
    error = np.std(ratios) / np.sqrt(len(ratios))
    assert error < 0.01
    # Sessions are among their own candidates, or their neighbours' are a little more likely.
    assert abs(np.mean(ratios) - 1) < 5 * error + (0 if others_only else 0.02)


@pytest.mark.parametrize("sampler", SAMPLED, ids=str)
def test_the_gradient_tends_to_that_of_the_full_cross_entropy(sampler: dict[str, Any]) -> None:
    """In the hidden states and in the table; a hundred times as many are ten times as near."""
    every = [[item, item % ITEMS + 1, (item + 3) % ITEMS + 1] for item in range(1, ITEMS + 1)]
    sessions = pack_sessions([*every, *[[1, 2, 3, 4]] * 40])  # every item is seen
    batch = training_batch(sessions, np.arange(5), 3)
    hidden_ND, table_VD = (x.requires_grad_() for x in scene(len(batch.inputs_N)))
    assert batch.targets_N is not None
    exact = torch.autograd.grad(
        F.cross_entropy(hidden_ND @ table_VD[1:].T, batch.targets_N - 1), (hidden_ND, table_VD)
    )
    errors = []
    for count in (1000, 100_000):
        config = make_config(
            num_uniform_negatives=count, num_batch_negatives=0, sampling_style="eventwise",
            **sampler,
        )  # fmt: skip
        distances = []
        for seed in range(3):
            torch.manual_seed(seed)
            positive_N, negative_NK, keep_NK = sampled_logits(
                hidden_ND, table_VD, batch, draw(batch, config, sessions),
                topk=None, mask_collisions=True,
            )  # fmt: skip
            found = torch.autograd.grad(
                losses.ssm(positive_N, negative_NK, keep_NK).mean(), (hidden_ND, table_VD)
            )
            distances.append(
                [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
            )
        errors.append(np.mean(distances, axis=0))
    assert (errors[1] < 0.02).all()
    assert (errors[1] < 0.3 * errors[0]).all()


def test_without_the_correction_the_sum_is_another() -> None:
    """The checks above can tell: popular items count too often."""
    sessions = skewed_sessions(300, shortest=2, longest=7)
    batch = training_batch(sessions, np.arange(5), 3)
    config = make_config(num_uniform_negatives=100_000, num_batch_negatives=0, **SAMPLED[1])
    negatives = draw(batch, config, sessions)
    hidden_ND, table_VD = scene(len(batch.inputs_N))
    corrected_N = estimates(batch, negatives, hidden_ND, table_VD)
    plain = dataclasses.replace(negatives, uniform_log_expected=None)
    plain_N = estimates(batch, plain, hidden_ND, table_VD) * (ITEMS / 100_000)
    assert (plain_N / corrected_N - 1).abs().max() > 0.3, plain_N / corrected_N


# --- how many in-batch negatives of each item to expect -----------------------------------------


@pytest.mark.parametrize("others_only", [False, True])
@pytest.mark.parametrize(
    ("model", "more"),
    [("sasrec", {}), ("gru4rec", {"session_parallel": True})],
    ids=["sasrec", "session-parallel"],
)
def test_the_expected_in_batch_negatives_are_those_of_many_batches(
    model: str, more: dict[str, Any], others_only: bool
) -> None:
    sessions = skewed_sessions(500, shortest=2, longest=7)
    config = make_config(
        model=model, num_uniform_negatives=0, num_batch_negatives=20, train_batch_size=50,
        reject_in_batch_items=others_only, **more,
    )  # fmt: skip
    network = build_model(config, ITEMS)
    expected_I = expected_in_batch(config, sessions, ITEMS)
    assert expected_I.sum() == pytest.approx(20)
    feed = build_feed(config, sessions, network, padded=False)
    distribution = _distribution(config, sessions, ITEMS, CPU)
    found_V = np.zeros(ITEMS + 1)
    rows = 0
    for step in range(300):
        batch = feed.batch(step)
        torch.manual_seed(step)
        negatives = sample_negatives(
            batch, distribution, num_uniform=0, num_batch=20, sampling_style="batchwise",
            reject_uniform_session_items=False, reject_in_batch_items=others_only,
        )  # fmt: skip
        assert negatives.in_batch_keep_BM is None or negatives.in_batch_keep_BM.all()
        found_V += np.bincount(
            batch.inputs_N[negatives.in_batch_BM].flatten().numpy(), minlength=ITEMS + 1
        )
        rows += len(batch.lengths_B)
    found_I = found_V[1:] / rows
    np.testing.assert_allclose(found_I, expected_I, rtol=0.03, atol=0.01)


def test_no_more_are_expected_than_a_batch_has() -> None:
    """Three sessions of two inputs each: four candidates of others, of which all are drawn."""
    sessions = pack_sessions([[1, 2, 3], [4, 5, 6], [1, 4, 6]])
    config = make_config(
        num_batch_negatives=100, reject_in_batch_items=True, sampling_style="sessionwise"
    )
    found_I = expected_in_batch(config, sessions, 6)
    assert found_I.tolist() == pytest.approx([4 / 3, 2 / 3, 0, 4 / 3, 2 / 3, 0])


def test_what_is_cut_off_by_the_window_is_not_expected() -> None:
    sessions = pack_sessions([[1, 2, 3, 4, 5, 6]])
    found_I = expected_in_batch(make_config(num_batch_negatives=2), sessions, 6)
    assert found_I.tolist() == pytest.approx([0, 0, 2 / 3, 2 / 3, 2 / 3, 0])


# --- the arithmetic, and what is refused ----------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("cloze", [False, True])
def test_each_logit_has_its_own_correction(style: str, cloze: bool) -> None:
    """Score minus the logarithm for each negative of each position, found by loops."""
    sessions = skewed_sessions(60, shortest=3, longest=7)
    config = make_config(
        sampling_style=style, num_uniform_negatives=9, num_batch_negatives=5,
        negative_sampler="popularity",
    )  # fmt: skip
    chosen = np.arange(6)
    batch = (
        cloze_batch(
            sessions, chosen, 3, num_items=ITEMS, mask_probability=0.5,
            random=np.random.default_rng(0),
        )
        if cloze
        else training_batch(sessions, chosen, 3)
    )  # fmt: skip
    negatives = draw(batch, config, sessions)
    log_expected_V = _distribution(config, sessions, ITEMS, CPU).log_expected_V
    assert batch.targets_N is not None
    assert log_expected_V is not None
    hidden_ND = scene(len(batch.targets_N))[0]
    table_VD = torch.cat([scene(1)[1], torch.zeros(1, 3, dtype=torch.float64)])
    _, negative_NK, keep_NK = sampled_logits(
        hidden_ND, table_VD, batch, negatives, topk=None, mask_collisions=True
    )
    assert keep_NK is not None
    events = range(len(batch.inputs_N)) if batch.predicting_P is None else batch.predicting_P
    for position, event in enumerate(events):
        row = int(batch.rows_N[event])
        own = {"batchwise": (), "sessionwise": (row,), "eventwise": (position,)}[style]
        in_batch = negatives.in_batch_BM[row]
        if negatives.in_batch_keep_BM is not None:
            in_batch = in_batch[negatives.in_batch_keep_BM[row]]
        items = [*negatives.uniform[own].tolist(), *batch.inputs_N[in_batch].tolist()]
        expected = [
            float(table_VD[item] @ hidden_ND[position] - log_expected_V[item])
            for item in items
            if item != batch.targets_N[position]
        ]
        found = negative_NK[position][keep_NK[position]].tolist()
        assert sorted(found) == pytest.approx(sorted(expected), abs=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"mask_collisions": False},  # the target would be in the sum twice
        {"topk_sampling": True},
        {"final_activation": True},
        {"reject_in_batch_items": True},
        {"sampling_style": "eventwise", "reject_uniform_session_items": True},
        {"loss": "bce"},
        {"model": "bert4rec"},  # in-batch negatives are masked at random
        {"loss": "ce", "num_uniform_negatives": 0, "num_batch_negatives": 0},
    ],
    ids=str,
)
def test_what_has_no_correction_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="logq_correction"):
        make_config(**change)


def test_rejection_that_concerns_in_batch_negatives_alone_is_no_matter() -> None:
    make_config(reject_in_batch_items=True, sampling_style="eventwise")
    make_config(reject_in_batch_items=True, num_uniform_negatives=0)
