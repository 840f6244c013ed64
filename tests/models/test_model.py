"""The packed network against torch's own padded transformer, and what a position means."""

import math

import numpy as np
import pytest
import torch
from helpers.networks import build_pair, make_config, make_sessions

from tron_cli.data.batches import pack, training_batch
from tron_cli.models.base import build_model

LENGTHS = [1, 9, 2, 4, 5, 3, 6, 7, 2, 1, 12]  # of the sessions, targets included


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
