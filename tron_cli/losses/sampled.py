"""Losses over sampled negatives: logits of the positive and of its negatives -> loss [N].

Shapes: N positions, K negatives of a position. keep_NK marks the negatives that count (bool; None:
all). The others have weight zero; a position without any kept negative has only its positive term
(bce, gbce) or a loss of zero (bpr, bpr-max, ssm). Logits come in float32 at least.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from tron_cli.registry import REGISTERED, load, settings_of

if TYPE_CHECKING:
    from tron_cli.config import ExperimentConfig


@functools.lru_cache
def build_loss(config: ExperimentConfig, num_items: int) -> Callable[..., torch.Tensor]:
    """Return the loss that `config.loss` names, with its settings: tensors -> loss_N."""
    entry = REGISTERED["loss"][config.loss]
    return functools.partial(load(entry), **settings_of(entry, config, num_items=num_items))


def bce(
    positive_N: torch.Tensor, negative_NK: torch.Tensor, keep_NK: torch.Tensor | None
) -> torch.Tensor:
    """Binary cross-entropy with averaged negatives: softplus(-p) + mean_j softplus(n_j)."""
    # softplus(x) = -logsigmoid(-x), which torch computes without a cut-off.
    terms_NK = -F.logsigmoid(-negative_NK)
    if keep_NK is None:
        negative_N = terms_NK.mean(dim=1)
    else:
        kept_N = keep_NK.sum(dim=1).clamp(min=1)
        negative_N = (terms_NK * keep_NK).sum(dim=1) / kept_N
    return negative_N - F.logsigmoid(positive_N)


def gbce(
    positive_N: torch.Tensor,
    negative_NK: torch.Tensor,
    keep_NK: torch.Tensor | None,
    *,
    gbce_t: float,
    num_uniform_negatives: int,
    num_items: int,
) -> torch.Tensor:
    """Generalized binary cross-entropy: (beta softplus(-p) + sum_j softplus(n_j)) / (1 + K).

    Petrov and Macdonald, gSASRec (RecSys 2023), in closed form instead of a transformed logit. The
    mean is over the kept negatives and the positive. See `gbce_beta`.
    """
    beta = gbce_beta(gbce_t, num_uniform_negatives, num_items)
    terms_NK = -F.logsigmoid(-negative_NK)
    kept_N: torch.Tensor | int = negative_NK.shape[1]
    if keep_NK is not None:
        terms_NK = terms_NK * keep_NK
        kept_N = keep_NK.sum(dim=1)
    return (terms_NK.sum(dim=1) - beta * F.logsigmoid(positive_N)) / (kept_N + 1)


def gbce_beta(t: float, num_negatives: int, num_items: int) -> float:
    """Return the power that corrects the overconfidence due to sampling, fully at t = 1."""
    sampled = num_negatives / max(1, num_items - 1)
    return sampled * (t * (1 - 1 / sampled) + 1 / sampled)


def ssm(
    positive_N: torch.Tensor, negative_NK: torch.Tensor, keep_NK: torch.Tensor | None
) -> torch.Tensor:
    """Sampled softmax: cross-entropy of the positive, log(e^p + sum_j e^n_j) - p."""
    if keep_NK is not None:
        negative_NK = negative_NK.masked_fill(~keep_NK, torch.finfo(negative_NK.dtype).min)
    return -F.logsigmoid(positive_N - negative_NK.logsumexp(dim=1))


def bpr(
    positive_N: torch.Tensor, negative_NK: torch.Tensor, keep_NK: torch.Tensor | None
) -> torch.Tensor:
    """BPR: mean_j -log sigmoid(p - n_j).

    Rendle et al., BPR (UAI 2009); RecBole adds 1e-10 inside the logarithm, which the closed form
    does not need.
    """
    terms_NK = -F.logsigmoid(positive_N[:, None] - negative_NK)
    if keep_NK is None:
        return terms_NK.mean(dim=1)
    return (terms_NK * keep_NK).sum(dim=1) / keep_NK.sum(dim=1).clamp(min=1)


def bpr_max(
    positive_N: torch.Tensor,
    negative_NK: torch.Tensor,
    keep_NK: torch.Tensor | None,
    *,
    bpr_penalty: float,
) -> torch.Tensor:
    """BPR-max: -log sum_j s_j sigmoid(p - n_j) + bpr_penalty * sum_j s_j n_j^2, s = softmax(n).

    Hidasi and Karatzoglou, Recurrent Neural Networks with Top-k Gains (CIKM 2018).
    """
    weighed_NK = negative_NK
    if keep_NK is not None:
        weighed_NK = negative_NK.masked_fill(~keep_NK, torch.finfo(negative_NK.dtype).min)
    log_weight_NK = weighed_NK.log_softmax(dim=1)
    log_gain_NK = F.logsigmoid(positive_N[:, None] - negative_NK)
    penalty_N = bpr_penalty * (log_weight_NK.exp() * negative_NK.square()).sum(dim=1)
    loss_N = penalty_N - (log_weight_NK + log_gain_NK).logsumexp(dim=1)
    if keep_NK is not None:
        loss_N = loss_N.where(keep_NK.any(dim=1), 0.0)
    return loss_N
