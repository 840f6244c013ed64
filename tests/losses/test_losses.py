"""Losses against closed forms in float64 and finite differences."""

import math
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.datasets import pack_sessions, random_sessions, tiny_settings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import pack, training_batch
from tron_cli.losses import sampled as losses
from tron_cli.models.base import build_model
from tron_cli.sampling import logits
from tron_cli.sampling.negatives import Negatives, sample_negatives
from tron_cli.training import start, step

LOSSES = {
    "bce": losses.bce,
    "gbce": partial(losses.gbce, gbce_t=0.75, num_uniform_negatives=2, num_items=11),
    "ssm": losses.ssm,
    "bpr": losses.bpr,
    "bpr-max": partial(losses.bpr_max, bpr_penalty=0.0),
    "bpr-max with penalty": partial(losses.bpr_max, bpr_penalty=0.7),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def closed_form(name: str, positive: float, negatives: list[float]) -> float:
    """The loss of one position in plain Python floats."""
    if name == "bce":
        mean = sum(map(_softplus, negatives)) / len(negatives) if negatives else 0.0
        return _softplus(-positive) + mean
    if name == "gbce":
        # beta = 0.2 * (0.75 * (1 - 1 / 0.2) + 1 / 0.2) = 0.4 for 2 negatives of 11 items
        terms = [0.4 * _softplus(-positive), *map(_softplus, negatives)]
        return sum(terms) / len(terms)
    if not negatives:
        return 0.0
    if name == "bpr":
        return sum(_softplus(x - positive) for x in negatives) / len(negatives)
    if name == "ssm":
        return math.log(sum(math.exp(x) for x in [positive, *negatives])) - positive
    total = sum(math.exp(x) for x in negatives)
    weights = [math.exp(x) / total for x in negatives]
    gain = sum(w / (1 + math.exp(x - positive)) for w, x in zip(weights, negatives, strict=True))
    penalty = 0.7 if name == "bpr-max with penalty" else 0.0
    return -math.log(gain) + penalty * sum(
        w * x * x for w, x in zip(weights, negatives, strict=True)
    )


scores = st.floats(-20, 20, allow_nan=False)


@every_loss
@given(
    positive=scores, negatives=st.lists(st.tuples(scores, st.booleans()), min_size=1, max_size=6)
)
@settings(max_examples=60, deadline=None)
def test_value_is_the_closed_form_of_the_kept_negatives(name, positive, negatives):
    values = torch.tensor([[value for value, _ in negatives]], dtype=torch.float64)
    keep = torch.tensor([[kept for _, kept in negatives]])
    positive_N = torch.tensor([positive], dtype=torch.float64)

    masked = LOSSES[name](positive_N, values, keep).item()
    kept_only = closed_form(name, positive, [value for value, kept in negatives if kept])
    assert masked == pytest.approx(kept_only, rel=1e-10, abs=1e-10)

    unmasked = LOSSES[name](positive_N, values, None).item()
    everything = closed_form(name, positive, [value for value, _ in negatives])
    assert unmasked == pytest.approx(everything, rel=1e-10, abs=1e-10)


@every_loss
def test_gradients_by_finite_differences(name):
    generator = torch.Generator().manual_seed(1)
    positive_N = torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True)
    negative_NK = torch.randn(5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    keep_NK = torch.rand(5, 4, generator=generator) < 0.6
    keep_NK[0] = False
    assert torch.autograd.gradcheck(LOSSES[name], (positive_N, negative_NK, keep_NK))
    assert torch.autograd.gradcheck(LOSSES[name], (positive_N, negative_NK, None))


@every_loss
def test_masked_negatives_are_as_good_as_absent(name):
    """Value and gradients, whatever the masked logits are."""
    generator = torch.Generator().manual_seed(2)
    positive_N = torch.randn(3, dtype=torch.float64, generator=generator, requires_grad=True)
    kept_NK = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    for masked in (0.0, 1e4, -1e4):
        wide_NK = torch.cat([kept_NK, torch.full((3, 2), masked, dtype=torch.float64)], dim=1)
        keep_NK = torch.tensor([[True] * 4 + [False] * 2]).expand(3, 6)
        with_masked = LOSSES[name](positive_N, wide_NK, keep_NK)
        without = LOSSES[name](positive_N, kept_NK, None)
        torch.testing.assert_close(with_masked, without, rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(
            torch.autograd.grad(with_masked.sum(), (positive_N, kept_NK)),
            torch.autograd.grad(without.sum(), (positive_N, kept_NK)),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@every_loss
def test_no_negative_left_gives_no_pull_on_negatives_and_no_nan(name):
    positive_N = torch.tensor([0.3, -1.0], requires_grad=True)
    negative_NK = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    loss_N = LOSSES[name](positive_N, negative_NK, torch.zeros(2, 2, dtype=torch.bool))
    loss_N.sum().backward()
    expected = [closed_form(name, value, []) for value in (0.3, -1.0)]
    assert loss_N.tolist() == pytest.approx(expected, abs=1e-6)
    assert not negative_NK.grad.any()
    assert positive_N.grad.isfinite().all()
    assert positive_N.grad.any() == (name in ("bce", "gbce"))


@every_loss
def test_large_logits_stay_finite(name):
    """float32 scores of +-1e4, with and without masked negatives, in the loss and its gradients."""
    extremes = [-1e4, 0.0, 1e4]
    rows = torch.cartesian_prod(*[torch.tensor(extremes)] * 4)
    for keep_NK in (None, torch.tensor([[True, False, True]]).expand(len(rows), 3)):
        positive_N = rows[:, 0].clone().requires_grad_()
        negative_NK = rows[:, 1:].clone().requires_grad_()
        loss_N = LOSSES[name](positive_N, negative_NK, keep_NK)
        loss_N.sum().backward()
        assert loss_N.isfinite().all()
        assert positive_N.grad.isfinite().all()
        assert negative_NK.grad.isfinite().all()


def test_bpr_max_with_masked_negatives_is_not_nan():
    """A mask of -inf would be 0 * inf in softmax * logit^2."""
    loss_N = losses.bpr_max(
        torch.tensor([1.0]),
        torch.tensor([[2.0, 3.0]]),
        torch.tensor([[True, False]]),
        bpr_penalty=1.0,
    )
    assert loss_N.item() == pytest.approx(_softplus(1.0) + 4.0, rel=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("num_negatives", "num_items"), [(1, 3416), (256, 3416), (99, 100)])
def test_gbce_is_bce_of_the_published_transformation(t, num_negatives, num_items):
    """log(1 / (sigmoid(p) ^ -beta - 1)) as the positive's logit, in float64, mean over k + 1."""
    generator = torch.Generator().manual_seed(3)
    positive_N = torch.rand(50, dtype=torch.float64, generator=generator) * 12 - 6
    negative_NK = torch.randn(50, num_negatives, dtype=torch.float64, generator=generator) * 3
    alpha = num_negatives / (num_items - 1)
    beta = alpha * ((1 - 1 / alpha) * t + 1 / alpha)
    transformed_N = (1 / (torch.sigmoid(positive_N) ** -beta - 1)).log()
    logits_N1K = torch.cat([transformed_N[:, None], negative_NK], dim=1)
    labels_N1K = torch.zeros_like(logits_N1K)
    labels_N1K[:, 0] = 1
    expected = F.binary_cross_entropy_with_logits(logits_N1K, labels_N1K, reduction="none").mean(1)
    found_beta = losses.gbce_beta(t, num_negatives, num_items)
    assert found_beta == pytest.approx(beta, rel=1e-12)
    gbce = partial(losses.gbce, gbce_t=t, num_uniform_negatives=num_negatives, num_items=num_items)
    found = gbce(positive_N, negative_NK, None)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    # In float32 too, where the transformation is lost in its clamps.
    single = gbce(positive_N.float() * 20, negative_NK.float(), None)
    exact = gbce(positive_N * 20, negative_NK, None)
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-6)


def test_nan_in_a_negative_shows_in_the_loss():
    """Some negatives may not count."""
    batch = pack(np.array([1, 2, 3, 4], np.int32), np.array([0]), np.array([3]), with_targets=True)
    negatives = Negatives(torch.tensor([5, 6, 7]), None, torch.zeros(1, 0, dtype=torch.int64), None)
    table_VD = torch.randn(8, 4)
    table_VD[6] = torch.nan
    for topk in (None, 2):
        for mask_collisions in (False, True):
            positive_N, negative_NK, keep_NK = logits.sampled_logits(
                torch.randn(3, 4), table_VD, batch, negatives, topk=topk,
                mask_collisions=mask_collisions,
            )  # fmt: skip
            assert losses.ssm(positive_N, negative_NK, keep_NK).isnan().all()


# --- the loss of a training step ------------------------------------------------------------------

STEP = {
    "bce": {},
    "bpr": {},
    "ssm": {},
    "ssm with logQ": {"logq_correction": True, "negative_sampler": "popularity"},
    "bpr-max": {},
    "bpr-max with penalty": {"bpr_penalty": 0.7},
    # beta is 0.4, as in the closed form above
    "gbce": {"num_uniform_negatives": 2, "num_batch_negatives": 0, "gbce_t": 0.75},
}
WITHOUT_ELU = ("gbce", "ssm with logQ")


@pytest.mark.parametrize("style", ["eventwise", "sessionwise", "batchwise"])
@pytest.mark.parametrize(
    ("name", "final_activation"),
    [(name, False) for name in STEP] + [(name, True) for name in STEP if name not in WITHOUT_ELU],
)
def test_the_loss_of_a_step_is_the_mean_of_the_formula(name, style, final_activation):
    """In float64: scores by loops, ELU by hand, for hidden states that the model gives."""
    num_items = 11
    generator = np.random.default_rng(4)
    sessions = pack_sessions(
        [*random_sessions(generator, 12, num_items), [*range(1, num_items + 1)]]
    )
    config = ExperimentConfig(
        **tiny_settings(
            loss=name.split()[0],
            sampling_style=style,
            final_activation=final_activation,
            **{
                "num_uniform_negatives": 7,
                "num_batch_negatives": 3,
                "topk_sampling": False,
                "reject_in_batch_items": False,
                "dropout_rate": 0.0,
                **STEP[name],
            },
        )
    )
    torch.manual_seed(6)
    model = build_model(config, num_items).double()
    with torch.no_grad():
        model.item_table.mul_(4.0)  # scores on both sides of zero, and far from it
    batch = training_batch(sessions, np.arange(5), config.sequence_length)
    distribution = start._distribution(config, sessions, num_items, torch.device("cpu"))
    drawn = []

    def note(*arguments, **options):
        drawn.append(sample_negatives(*arguments, **options))
        return drawn[0]

    with mock.patch.object(step, "sample_negatives", note):
        loss = step.training_loss(model, batch, config, distribution)
    (negatives,) = drawn
    hidden_ND, table_VD = model(batch).detach(), model.item_table.detach()
    total = 0.0
    for event, target in enumerate(batch.targets_N.tolist()):
        row = int(batch.rows_N[event])
        own = {"batchwise": (), "sessionwise": (row,), "eventwise": (event,)}[style]
        items = [
            *negatives.uniform[own].tolist(),
            *batch.inputs_N[negatives.in_batch_BM[row]].tolist(),
        ]
        scores = []
        for item in items:
            score = float(table_VD[item] @ hidden_ND[event])
            if distribution.log_expected_V is not None:
                score -= float(distribution.log_expected_V[item])
            if item != target:
                scores.append(score)
        positive = float(table_VD[target] @ hidden_ND[event])
        if final_activation:
            positive, *scores = (x if x > 0 else 0.5 * math.expm1(x) for x in (positive, *scores))
        total += closed_form(name.removesuffix(" with logQ"), positive, scores)
    assert loss.item() == pytest.approx(total / len(batch.targets_N), rel=1e-9)
