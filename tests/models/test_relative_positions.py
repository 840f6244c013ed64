"""Relative positions: a learned bias of attention for each head and distance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.networks import make_config, random_model
from helpers.packed import states

from tron_cli.config import ExperimentConfig
from tron_cli.data.dataset import Sessions
from tron_cli.errors import InputError
from tron_cli.evaluation.predict import predict
from tron_cli.models.base import build_model
from tron_cli.models.bert4rec import BERT4Rec
from tron_cli.models.gsasrec import GSASRec
from tron_cli.models.sasrec import SASRec

NETWORKS = (SASRec, GSASRec, BERT4Rec)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_without_position_embeddings_knows_the_order(network: type[SASRec]) -> None:
    """Without either, the last state does not depend on the order of the earlier events."""

    def change(**settings: bool) -> float:
        # One block: in a causal network of several, states depend on how many events come before.
        model = random_model(network, positions="none", num_blocks=1, **settings)
        last = [states(model, [*earlier, 9])[-1] for earlier in ([3, 1, 4], [4, 3, 1])]
        return float((last[0] - last[1]).detach().abs().max())

    assert change() < 1e-5
    assert change(relative_positions=True) > 1e-2


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("positions", ["start", "end", "none"])
def test_a_new_network_is_that_without_relative_positions(
    network: type[SASRec], positions: str
) -> None:
    """The biases begin at zero and draw no random numbers."""
    models = []
    for relative in (False, True):
        torch.manual_seed(0)
        settings = {"relative_positions": relative, "positions": positions, "num_heads": 2}
        config = make_config(model=network.__name__.lower(), **settings)
        models.append(build_model(config, 30).eval())
    without, with_biases = models
    torch.testing.assert_close(
        states(with_biases, [3, 1, 4, 9]), states(without, [3, 1, 4, 9]), rtol=0, atol=1e-6
    )
    named = dict(with_biases.named_parameters())
    more = named.keys() - dict(without.named_parameters()).keys()
    assert sorted(more) == [f"blocks.{block}.relative_bias.bias_HK" for block in range(2)]
    assert {len(named[name]) for name in more} == {2 * (13 if network is BERT4Rec else 6)}


@pytest.mark.parametrize("network", [SASRec, GSASRec])
@pytest.mark.parametrize("positions", ["start", "none"])
def test_one_pass_and_the_last_event_of_each_history_agree(
    network: type[SASRec], positions: str, rng: np.random.Generator
) -> None:
    model = random_model(network, positions=positions, relative_positions=True)
    assert model.one_row_serves_all
    lengths = rng.integers(2, 7, 40)
    items = rng.integers(1, 41, lengths.sum()).astype(np.int32)
    sessions = Sessions(items, np.append(0, np.cumsum(lengths)))
    one_pass = predict(model, sessions, protocol="every-step", top_items=10)
    model.one_row_serves_all = False
    each = predict(model, sessions, protocol="every-step", top_items=10)
    assert np.array_equal(one_pass.rank_E, each.rank_E)
    assert np.array_equal(one_pass.top_EK, each.top_EK)


def test_distances_to_attended_padding_are_refused() -> None:
    with pytest.raises(InputError, match="add key_padding_mask=True"):
        ExperimentConfig(dataset_name="x", relative_positions=True, key_padding_mask=False)
