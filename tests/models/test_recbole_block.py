"""SASRec's options beside TRON's form: RecBole's block and LiGR's, attended padding."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.networks import name_in_ours
from helpers.packed import make_batch, states
from helpers.padded import Attention, check_same, padded_states, shaken, windows
from torch import nn

from tron_cli.data.batches import pack
from tron_cli.models.sasrec import Block, SASRec


def make_model(**changes: Any) -> SASRec:
    settings: dict[str, Any] = {
        "num_items": 30,
        "sequence_length": 6,
        "embedding_dim": 8,
        "num_blocks": 2,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "positions": "start",
        "reuse_item_embeddings": True,
        "output_bias": False,
        "block": "post-norm",
        "feed_forward_dim": 20,
        "activation": "gelu",
        **changes,
    }
    torch.manual_seed(5)
    return SASRec(**settings)


def norm(layer: nn.LayerNorm, x: torch.Tensor, eps: float) -> torch.Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * layer.weight + layer.bias


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("positions", ["start", "end"])
def test_post_norm_equals_torchs_encoder(positions, heads, activation):
    """Padding behind and learned places from the first one, as RecBole has them, or in front."""
    model = shaken(make_model(num_heads=heads, activation=activation, positions=positions))
    batch = make_batch()
    layer = nn.TransformerEncoderLayer(
        8, heads, dim_feedforward=20, dropout=0.0, activation=activation,
        layer_norm_eps=1e-12, batch_first=True, norm_first=False,
    )  # fmt: skip
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    with torch.no_grad():
        for name, weights in encoder.named_parameters():
            weights.copy_(model.get_parameter(name_in_ours(name)))

    inputs_BL = windows(batch, 6, at_end=positions == "end")
    x = model.item_embedding.weight[inputs_BL] + model.position_embedding.weight
    x = norm(model.input_norm, x, 1e-12)
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1) | (inputs_BL == 0)[:, None, :]
    hidden &= ~torch.eye(6, dtype=torch.bool)  # a place of padding sees itself: no NaN
    expected = encoder(x, mask=hidden.repeat_interleave(heads, dim=0))[inputs_BL > 0]
    torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-9)


def described(block: nn.Module, x: torch.Tensor, attend: Attention) -> torch.Tensor:
    """The forms of the block, in plain operations."""

    def attended(x: torch.Tensor) -> torch.Tensor:
        weights, biases = block.query_key_value.weight.chunk(3), block.query_key_value.bias.chunk(3)
        parts = [x @ weight.T + bias for weight, bias in zip(weights, biases, strict=True)]
        return attend(*parts) @ block.attention_output.weight.T + block.attention_output.bias

    def fed(x: torch.Tensor) -> torch.Tensor:
        first, second = block.feed_forward[0], block.feed_forward[3]
        if first.bias is None:  # SwiGLU, whose two inner layers are one matrix
            gate, value = x @ first.weight[:20].T, x @ first.weight[20:].T
            return (gate / (1 + torch.exp(-gate)) * value) @ second.weight.T
        x = x @ first.weight.T + first.bias
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return x @ second.weight.T + second.bias

    if block.attention_gate is not None:
        first, second = block.attention_gate, block.feed_forward_gate
        open_BLD = 1 / (1 + torch.exp(-(x @ first.weight.T + first.bias)))
        x = x + open_BLD * attended(norm(block.attention_norm, x, 1e-5))
        open_BLD = 1 / (1 + torch.exp(-(x @ second.weight.T + second.bias)))
        return x + open_BLD * fed(norm(block.feed_forward_norm, x, 1e-5))
    if block.norm_first:
        x = x + attended(norm(block.attention_norm, x, 1e-5))
        return x + fed(norm(block.feed_forward_norm, x, 1e-5))
    x = norm(block.attention_norm, x + attended(x), 1e-12)
    return norm(block.feed_forward_norm, x + fed(x), 1e-12)


@pytest.mark.parametrize("key_padding_mask", [True, False])
@pytest.mark.parametrize("positions", ["start", "end", "none"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("form", ["pre-norm", "post-norm", "ligr"])
def test_states_and_gradients_are_those_described(form, activation, positions, key_padding_mask):
    """Without the mask every event attends to the padding in front of its history."""
    model = shaken(
        make_model(
            block=form,
            activation=activation,
            positions=positions,
            key_padding_mask=key_padding_mask,
        )
    )
    batch = make_batch()
    first = form != "post-norm"
    expected = padded_states(
        model,
        batch,
        described,
        num_heads=2,
        positions=positions,
        key_padding_mask=key_padding_mask,
        embed=lambda x: x if first else norm(model.input_norm, x, 1e-12),
        finish=lambda x: norm(model.norm, x, 1e-5) if first else x,
    )
    check_same(model, model(batch), expected)


def test_attended_padding_matters_and_a_full_window_has_none():
    masked = shaken(make_model())
    attending = shaken(make_model(key_padding_mask=False))
    assert (states(masked, [3, 1, 4]) - states(attending, [3, 1, 4])).abs().max() > 1e-3
    window = [3, 1, 4, 1, 5, 9]
    torch.testing.assert_close(states(masked, window), states(attending, window))


def test_padding_in_a_batch_of_fixed_shape_is_attended_alike():
    """All rows are one group and the batch ends in events of padding, as on CUDA."""
    model = shaken(make_model(key_padding_mask=False))
    items, lengths = np.array([3, 1, 4, 1, 5, 9], np.int32), np.array([1, 2, 3])
    starts = np.array([0, 1, 3])
    expected = model(pack(items, starts, lengths, with_targets=False))
    fixed = model(pack(items, starts, lengths, with_targets=False, padded_width=6))
    torch.testing.assert_close(fixed[:6], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("form", "positions", "key_padding_mask"),
    list(
        itertools.product(
            ["pre-norm", "post-norm", "ligr"], ["start", "none", "end"], [True, False]
        )
    ),
)
def test_one_row_serves_all_where_later_events_change_nothing(form, positions, key_padding_mask):
    model = shaken(make_model(block=form, positions=positions, key_padding_mask=key_padding_mask))
    change = states(model, [3, 1]) - states(model, [3, 1, 4, 2])[:2]
    assert (change.abs().max() < 1e-12) == model.one_row_serves_all
    assert model.one_row_serves_all == (positions != "end" and key_padding_mask)


def test_without_positions_there_is_no_table_of_them():
    """With one block, the order of the events before an event has no effect."""
    model = shaken(make_model(positions="none", num_blocks=1))
    assert model.position_embedding is None
    assert not [name for name, _ in model.named_parameters() if "position" in name]
    one, other = states(model, [3, 1, 4])[-1], states(model, [1, 3, 4])[-1]
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("form", "activation"), [("pre-norm", "relu"), ("post-norm", "gelu"), ("ligr", "swiglu")]
)
@pytest.mark.parametrize("reuse", [True, False])
def test_normal_initialization(form, activation, reuse):
    """All matrices and tables N(0, 0.02), all biases 0, all scales 1."""
    model = make_model(
        block=form, initialization="normal", num_items=3000, embedding_dim=64, sequence_length=50,
        feed_forward_dim=128, reuse_item_embeddings=reuse, activation=activation,
    )  # fmt: skip
    for name, weights in model.named_parameters():
        if weights.dim() == 2:
            assert weights.std().item() == pytest.approx(0.02, rel=0.05), name
            assert weights.mean().item() == pytest.approx(0.0, abs=0.002), name
        else:
            assert (weights == float("norm" in name and "weight" in name)).all(), name


def test_the_feed_forward_has_the_width_asked_for():
    assert make_model(feed_forward_dim=20).blocks[0].feed_forward[0].weight.shape == (20, 8)
    assert make_model(feed_forward_dim=0).blocks[0].feed_forward[0].weight.shape == (8, 8)


def one_block(**changes: Any) -> tuple[Block, torch.Tensor, Any]:
    torch.manual_seed(0)
    batch = pack(np.ones(5, np.int32), np.zeros(1, int), np.array([5]), with_targets=False)
    return Block(8, 1, **changes), torch.randn(5, 8), batch.groups


def is_random(block: Block, x_ND: torch.Tensor, groups: Any) -> bool:
    return not torch.equal(block(x_ND, groups), block(x_ND, groups))


@pytest.mark.parametrize("norm_first", [True, False])
def test_attention_has_a_dropout_of_its_own(norm_first):
    """None is dropout_rate; at a rate near one nothing of what is attended to is left."""
    settings = {"norm_first": norm_first}
    assert not is_random(*one_block(dropout_rate=0.0, **settings))
    assert is_random(*one_block(dropout_rate=0.0, attention_dropout_rate=0.5, **settings))
    for rate, expected in ((None, 0.25), (0.0, 0.0), (0.5, 0.5)):
        block, _, _ = one_block(dropout_rate=0.25, attention_dropout_rate=rate, **settings)
        assert block.attention_dropout_rate == expected

    block, x_ND, groups = one_block(dropout_rate=0.0, attention_dropout_rate=0.99999, **settings)
    with torch.no_grad():
        block.attention_output.bias.zero_()
    if norm_first:
        alone = x_ND + block.feed_forward(block.feed_forward_norm(x_ND))
    else:
        alone = block.attention_norm(x_ND)
        alone = block.feed_forward_norm(alone + block.feed_forward(alone))
    torch.testing.assert_close(block(x_ND, groups), alone)
    block.eval()
    assert not is_random(block, x_ND, groups)
    assert not torch.allclose(block(x_ND, groups), alone, atol=1e-3)


def test_recboles_feed_forward_drops_its_output_only():
    for norm_first in (True, False):
        block, x_ND, groups = one_block(
            dropout_rate=0.5, attention_dropout_rate=0.0, norm_first=norm_first
        )
        block.dropout = nn.Identity()  # of what attention and feed-forward give
        assert is_random(block, x_ND, groups) == norm_first


def test_dropout_is_off_in_evaluation():
    model = make_model(dropout_rate=0.5, attention_dropout_rate=0.5)
    assert not torch.equal(states(model, [3, 1, 4]), states(model, [3, 1, 4]))
    model.eval()
    assert torch.equal(states(model, [3, 1, 4]), states(model, [3, 1, 4]))
