"""BSARec: the network beside its formula on padded windows, and what its filter rules out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import random_checkpoint
from helpers.datasets import cyclic_sessions, write_dataset
from helpers.networks import make_config, random_model
from helpers.packed import make_batch, states
from helpers.padded import Attention, check_same, padded_states, shaken
from torch import nn
from torch.nn import functional as F

from tron_cli.checkpoint import load_checkpoint
from tron_cli.config import ExperimentConfig
from tron_cli.data.dataset import Sessions
from tron_cli.errors import InputError
from tron_cli.evaluation.evaluate import EvaluationOptions, assess
from tron_cli.evaluation.predict import predict
from tron_cli.models.base import build_model
from tron_cli.models.sasrec import SASRec
from tron_cli.training.loop import train

BSAREC: dict[str, Any] = {
    "block": "bsarec",
    "activation": "gelu",
    "initialization": "normal",
    "training_windows": "prefixes",
}


def normalized(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    return F.layer_norm(x, x.shape[2:], norm.weight, norm.bias, 1e-12)


def described(block: nn.Module, x: torch.Tensor, attend: Attention) -> torch.Tensor:
    """alpha * LN(x + filter) + (1 - alpha) * LN(x + attention), then RecBole's feed-forward."""
    length = x.shape[1]
    spectrum = torch.fft.rfft(x, dim=1, norm="ortho")
    spectrum = spectrum * (torch.arange(spectrum.shape[1]) < 2)[:, None]  # 3 frequencies
    low = torch.fft.irfft(spectrum, n=length, dim=1, norm="ortho")
    filtered = low + block.filter.sqrt_beta_D**2 * (x - low)
    attended = attend(
        *(x @ block.query_key_value.weight.T + block.query_key_value.bias).chunk(3, 2)
    )
    attended = attended @ block.attention_output.weight.T + block.attention_output.bias
    mixed = 0.6 * normalized(x + filtered, block.filter_norm)
    mixed = mixed + 0.4 * normalized(x + attended, block.attention_norm)
    first, second = block.feed_forward[0], block.feed_forward[3]
    inner = F.gelu(mixed @ first.weight.T + first.bias)
    return normalized(mixed + inner @ second.weight.T + second.bias, block.feed_forward_norm)


@pytest.mark.parametrize("positions", ["end", "start", "none"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("key_padding_mask", [True, False])
def test_states_and_gradients_are_those_of_the_paper(
    positions: str, heads: int, key_padding_mask: bool
) -> None:
    """On windows whose padding is zero at the input of every layer."""
    settings = {
        "positions": positions, "num_heads": heads, "key_padding_mask": key_padding_mask,
        "feed_forward_dim": 32, "filter_weight": 0.6, "low_frequencies": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    model = shaken(build_model(make_config(**BSAREC, **settings), 30))
    batch = make_batch()
    expected_ND = padded_states(
        model, batch, described, num_heads=heads, positions=positions,
        key_padding_mask=key_padding_mask, embed=lambda x: normalized(x, model.input_norm),
    )  # fmt: skip
    check_same(model, model(batch), expected_ND)


def test_a_state_sees_later_events() -> None:
    model = random_model(SASRec, block="bsarec", positions="start", low_frequencies=3)
    changed = states(model, [3, 1, 4, 2]) - states(model, [3, 1, 4, 9])
    assert changed.abs().amax(dim=1).amin() > 1e-3
    assert not model.one_row_serves_all


def test_each_event_is_predicted_from_its_own_history(rng: np.random.Generator) -> None:
    """Later events of a session change no rank of earlier ones."""
    model = random_model(SASRec, block="bsarec", positions="start", low_frequencies=3)
    items = rng.integers(1, 41, 60).astype(np.int32)
    whole, cut = (
        predict(model, Sessions(items, np.arange(0, 61, step)), protocol="every-step")
        for step in (6, 3)
    )
    kept = {(s * 6 + e): rank for s, e, rank in zip(*columns(whole), strict=True) if e < 3}
    for s, e, rank in zip(*columns(cut), strict=True):
        assert s % 2 or kept[s * 3 + e] == rank


def columns(predictions: Any) -> list[list[int]]:
    found = (predictions.session_E, predictions.event_E, predictions.rank_E)
    return [column.tolist() for column in found]


@pytest.mark.parametrize("optimizer", ["adam", "row_adam"])
def test_it_learns_which_item_follows(optimizer: str, tmp_path: Path) -> None:
    dataset = write_dataset(
        tmp_path,
        train=cyclic_sessions(200, seed=1, cycle=8),
        val=cyclic_sessions(40, seed=2, cycle=8),
    )
    config = make_config(
        **BSAREC, dataset_name=dataset.name, embedding_dim=16, num_blocks=1, dropout_rate=0.1,
        num_uniform_negatives=8, num_batch_negatives=0, reject_in_batch_items=False, lr=2e-2,
        max_epochs=4, train_batch_size=20, optimizer=optimizer, metrics=("R@1",), val_metric="R@1",
    )  # fmt: skip
    best = train(config, dataset, tmp_path / "run", device=torch.device("cpu"))
    assert best.name.startswith("bsarec-")
    assert load_checkpoint(best).metrics["R@1"] > 0.95


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"training_windows": "last"}, "add training_windows=prefixes"),
        ({"training_windows": "all"}, "add training_windows=prefixes"),
        ({"model": "bert4rec", "training_windows": "last"}, "add model=sasrec"),
        ({"low_frequencies": 4}, "must be odd and at most sequence_length=6"),
        ({"low_frequencies": 7}, "must be odd and at most sequence_length=6"),
        ({"block": "post-norm", "filter_weight": 0.1}, "has no filter.*add filter_weight=0.7"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(InputError, match=found):
        make_config(**{**BSAREC, **changes})


def test_one_pass_is_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, train=[[1, 2, 3]], test=[[1, 2, 3]])
    checkpoint = random_checkpoint(dataset, tmp_path / "a.pt", **BSAREC)
    with pytest.raises(InputError, match="--one-pass does not apply to block=bsarec"):
        assess(checkpoint, dataset, EvaluationOptions(one_pass=True), torch.device("cpu"))


def test_packaged_settings_are_the_published_ones() -> None:
    from tron_cli.configs.config_beauty_bsarec import config

    assert isinstance(config, ExperimentConfig)
    assert (config.filter_weight, config.low_frequencies, config.lr) == (0.7, 5, 5e-4)
