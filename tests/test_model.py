"""The packed network against torch's own padded transformer, and what a position means."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import pack, training_batch
from tron_cli.data.dataset import Sessions
from tron_cli.models.base import build_model

LENGTHS = [1, 9, 2, 4, 5, 3, 6, 7, 2, 1, 12]  # of the sessions, targets included


def make_sessions(lengths: list[int], num_items: int, seed: int = 0) -> Sessions:
    items = np.random.default_rng(seed).integers(1, num_items + 1, sum(lengths))
    return Sessions(items.astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]))


def make_config(**values) -> ExperimentConfig:
    defaults = {
        "dataset_name": "test",
        "sequence_length": 6,
        "embedding_dim": 8,
        "dropout_rate": 0.0,
        "num_uniform_negatives": 7,
        "num_batch_negatives": 3,
        "topk_sampling": False,
    }
    return ExperimentConfig(**{**defaults, **values})


class PaddedReference(nn.Module):
    """SASRec as TRON describes it, padded to [B, L], around torch.nn.TransformerEncoder.

    Takes its weights from a packed model; `parameter` names say which is which.
    """

    def __init__(self, model: nn.Module, config: ExperimentConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embedding_dim
        layer = nn.TransformerEncoderLayer(
            d_model=dim, nhead=config.num_heads, dim_feedforward=dim, dropout=0.0,
            batch_first=True, norm_first=True,
        )  # fmt: skip
        self.encoder = nn.TransformerEncoder(
            layer, config.num_blocks, norm=nn.LayerNorm(dim), enable_nested_tensor=False
        )
        weights = dict(model.named_parameters())
        self.items = copy.deepcopy(model.item_embedding)
        self.positions = copy.deepcopy(model.position_embedding)
        self.outputs = self.items if config.shares_table else copy.deepcopy(model.output_embedding)
        self.double()
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(weights[self.name_in_model(name)])

    @staticmethod
    def name_in_model(name: str) -> str:
        for theirs, ours in (
            ("items.", "item_embedding."),
            ("positions.", "position_embedding."),
            ("outputs.", "output_embedding."),
            ("encoder.norm.", "norm."),
            ("encoder.layers.", "blocks."),
            ("self_attn.in_proj_", "query_key_value."),
            ("self_attn.out_proj", "attention_output"),
            ("linear1", "feed_forward.0"),
            ("linear2", "feed_forward.3"),
            ("norm1", "attention_norm"),
            ("norm2", "feed_forward_norm"),
        ):
            name = name.replace(theirs, ours)
        return name

    def forward(self, histories: list[list[int]]) -> list[torch.Tensor]:
        """The hidden states [length, D] of each history of up to L items.

        positions="end" pads in front as TRON does, "start" behind: place p of the window has
        position embedding p either way.
        """
        config = self.config
        length = config.sequence_length
        before = [length - len(items) if config.positions == "end" else 0 for items in histories]
        inputs = torch.zeros(len(histories), length, dtype=torch.int64)
        for row, (items, start) in enumerate(zip(histories, before, strict=True)):
            inputs[row, start : start + len(items)] = torch.tensor(items)
        embedded = self.items(inputs)[..., : config.embedding_dim]
        x = embedded * math.sqrt(config.embedding_dim) + self.positions.weight
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        forbidden = future | (inputs == 0)[:, None, :]
        forbidden &= ~torch.eye(length, dtype=torch.bool)  # a padded place sees itself: no NaN
        hidden = self.encoder(x, mask=forbidden.repeat_interleave(config.num_heads, dim=0))
        if config.output_bias:
            hidden = torch.cat([hidden, torch.ones_like(hidden[..., :1])], dim=-1)
        return [
            hidden[row, start : start + len(items)]
            for row, (items, start) in enumerate(zip(histories, before, strict=True))
        ]


def build_pair(config: ExperimentConfig, num_items: int):
    """A packed model in float64, with every weight drawn anew, and its reference."""
    torch.manual_seed(5)
    model = build_model(config, num_items).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)  # no bias is zero, no scale is one
    return model, PaddedReference(model, config)


@pytest.mark.parametrize("positions", ["end", "start"])
@pytest.mark.parametrize(("heads", "blocks"), [(1, 2), (4, 1), (2, 3)])
@pytest.mark.parametrize(
    ("reuse", "bias"), [(True, False), (True, True), (False, True), (False, False)]
)
def test_hidden_states_equal_a_padded_transformer(positions, heads, blocks, reuse, bias):
    config = make_config(
        positions=positions,
        num_heads=heads,
        num_blocks=blocks,
        reuse_item_embeddings=reuse,
        output_bias=bias,
    )
    model, reference = build_pair(config, num_items=30)
    sessions = make_sessions([length + 1 for length in LENGTHS], 30)
    batch = training_batch(sessions, np.arange(len(LENGTHS)), 6)
    histories = [row.tolist() for row in batch.inputs_N.split(batch.lengths_B.tolist())]
    torch.testing.assert_close(
        model(batch), torch.cat(reference(histories)), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("positions", ["end", "start"])
def test_a_hidden_state_does_not_depend_on_other_rows(positions):
    """Whatever rows share the batch, however attention groups them."""
    model, _ = build_pair(make_config(positions=positions), num_items=30)
    sessions = make_sessions([length + 1 for length in LENGTHS], 30)
    together = training_batch(sessions, np.arange(len(LENGTHS)), 6)
    alone = [training_batch(sessions, np.array([row]), 6) for row in range(len(LENGTHS))]
    alone.sort(key=lambda batch: int(batch.lengths_B[0]))
    expected = torch.cat([model(batch) for batch in alone])
    torch.testing.assert_close(model(together), expected, rtol=1e-10, atol=1e-10)


def _states(model, items: list[int]) -> torch.Tensor:
    length = np.array([len(items)])
    return model(pack(np.array(items, np.int32), np.zeros(1, int), length, with_targets=False))


def test_no_state_sees_a_later_item():
    for positions in ("end", "start"):
        model, _ = build_pair(make_config(positions=positions), num_items=30)
        changed = _states(model, [3, 1, 4, 2, 9]) - _states(model, [3, 1, 4, 7, 8])
        assert not changed[:3].any()
        assert changed[3:].all()


def test_counting_from_the_end_tells_how_many_events_are_to_come():
    """FIELD's leak in one pass: end-aligned states change with the number of later events alone."""
    at_end, _ = build_pair(make_config(positions="end"), num_items=30)
    from_start, _ = build_pair(make_config(positions="start"), num_items=30)
    leak = _states(at_end, [3, 1, 4])[:2] - _states(at_end, [3, 1])
    assert leak.abs().max() > 0.1
    same = _states(from_start, [3, 1, 4])[:2] - _states(from_start, [3, 1])
    assert same.abs().max() < 1e-12


def test_the_output_bias_shifts_a_score_by_itself():
    config = make_config(output_bias=True)
    model, _ = build_pair(config, num_items=30)
    scores = _states(model, [3, 1]) @ model.item_table.T
    with torch.no_grad():
        model.item_table[5, -1] += 2.0
    shift = _states(model, [3, 1]) @ model.item_table.T - scores
    expected = torch.zeros_like(shift)
    expected[:, 5] = 2.0
    torch.testing.assert_close(shift, expected)


def test_initial_weights():
    """Xavier-uniform item and position embeddings; a separate output table is N(0, 1)."""
    config = make_config(embedding_dim=64, sequence_length=50, reuse_item_embeddings=False)
    torch.manual_seed(0)
    model = build_model(config, 3000)
    for table in (model.item_embedding.weight, model.position_embedding.weight):
        bound = math.sqrt(6 / sum(table.shape))
        assert table.abs().max() <= bound
        assert table.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    outputs = model.output_embedding.weight
    assert outputs.std().item() == pytest.approx(1.0, rel=0.02)
    assert outputs.mean().item() == pytest.approx(0.0, abs=0.02)


def test_shared_embeddings_are_one_table():
    shared = build_model(make_config(), 30)
    separate = build_model(make_config(reuse_item_embeddings=False), 30)
    assert shared.item_table is shared.item_embedding.weight
    assert separate.item_table is not separate.item_embedding.weight
    assert len(list(separate.parameters())) == len(list(shared.parameters())) + 1


def test_dropout_is_off_in_evaluation_and_on_in_training():
    model = build_model(make_config(dropout_rate=0.5), 30)
    torch.manual_seed(0)
    assert not torch.equal(_states(model, [3, 1, 4]), _states(model, [3, 1, 4]))
    model.eval()
    assert torch.equal(_states(model, [3, 1, 4]), _states(model, [3, 1, 4]))
