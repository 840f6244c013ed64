"""gSASRec's network against its description, in plain operations on padded windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.packed import make_batch, states
from helpers.padded import Attention, check_same, padded_states, shaken
from torch import nn
from torch.nn import functional as F

from tron_cli.data.batches import pack
from tron_cli.models.gsasrec import GSASRec


def make_model(**changes: Any) -> GSASRec:
    settings: dict[str, Any] = {
        "num_items": 30,
        "sequence_length": 6,
        "embedding_dim": 8,
        "num_blocks": 2,
        "num_heads": 1,
        "dropout_rate": 0.0,
        "positions": "end",
        "reuse_item_embeddings": False,
        "output_bias": False,
        **changes,
    }
    torch.manual_seed(5)
    return GSASRec(**settings)


def described(block: nn.Module, x: torch.Tensor, attend: Attention) -> torch.Tensor:
    """Queries normalized, keys and values not; both residuals start from what was normalized."""
    queries = F.layer_norm(x, x.shape[2:], block.attention_norm.weight, block.attention_norm.bias)
    k_weight, v_weight = block.key_value.weight.chunk(2)
    k_bias, v_bias = block.key_value.bias.chunk(2)
    attended = attend(
        queries @ block.query.weight.T + block.query.bias,
        x @ k_weight.T + k_bias,
        x @ v_weight.T + v_bias,
    )
    norm, (first, second) = block.feed_forward_norm, (block.feed_forward[0], block.feed_forward[3])
    x = F.layer_norm(attended + queries, x.shape[2:], norm.weight, norm.bias)
    inner = (x @ first.weight.T + first.bias).clamp_min(0)
    return x + inner @ second.weight.T + second.bias


@pytest.mark.parametrize("key_padding_mask", [True, False])
@pytest.mark.parametrize("positions", ["end", "start", "none"])
@pytest.mark.parametrize("heads", [1, 2])
def test_states_and_gradients_are_those_described(heads, positions, key_padding_mask):
    model = shaken(
        make_model(
            num_heads=heads,
            positions=positions,
            reuse_item_embeddings=True,
            key_padding_mask=key_padding_mask,
        )
    )
    batch = make_batch()
    expected = padded_states(
        model,
        batch,
        described,
        num_heads=heads,
        positions=positions,
        key_padding_mask=key_padding_mask,
        finish=lambda x: F.layer_norm(x, x.shape[2:], model.norm.weight, model.norm.bias),
    )
    check_same(model, model(batch), expected)


def test_tables_begin_as_torch_draws_embeddings():
    """N(0, 1), as in gSASRec's code, and inputs apart from outputs."""
    model = make_model(num_items=3000, embedding_dim=64, sequence_length=50)
    for table in (model.item_embedding, model.position_embedding, model.output_embedding):
        assert table.weight.std().item() == pytest.approx(1.0, rel=0.03)
        assert table.weight.mean().item() == pytest.approx(0.0, abs=0.03)
    assert model.item_table is model.output_embedding.weight
    assert not torch.equal(model.item_table, model.item_embedding.weight)


def test_later_events_change_nothing_where_one_row_serves_all():
    for positions in ("end", "start", "none"):
        for key_padding_mask in (True, False):
            model = shaken(make_model(positions=positions, key_padding_mask=key_padding_mask))
            shorter = states(model, [3, 1]) - states(model, [3, 1, 4, 2])[:2]
            assert (shorter.abs().max() < 1e-12) == model.one_row_serves_all
            serves = positions != "end" and key_padding_mask
            assert model.one_row_serves_all == serves


def test_the_output_bias_is_a_column_of_the_separate_table():
    model = shaken(make_model(output_bias=True))
    assert model.item_embedding.weight.shape == (31, 8)
    assert model.item_table.shape == (31, 9)
    assert (states(model, [3, 1])[:, -1] == 1).all()


def test_dropout_is_off_in_evaluation_and_on_in_training():
    model = make_model(dropout_rate=0.5)
    assert not torch.equal(states(model, [3, 1, 4]), states(model, [3, 1, 4]))
    model.eval()
    assert torch.equal(states(model, [3, 1, 4]), states(model, [3, 1, 4]))


def test_the_second_layer_of_the_feed_forward_is_dropped_too():
    """At a rate near one nothing is left of attention and feed-forward but their residuals."""
    block = make_model(dropout_rate=0.99999).blocks[0].double()
    x_ND = torch.randn(3, 8, dtype=torch.float64)
    batch = pack(np.ones(3, np.int32), np.zeros(1, int), np.array([3]), with_targets=False)
    alone = block.feed_forward_norm(block.attention_norm(x_ND))
    torch.testing.assert_close(block(x_ND, batch.groups), alone)
