"""One training step against a plain padded reference in float64, and the schedule of steps.

The reference scores the full [K + M] negatives of each position, sorts out what does not count with
Python loops, keeps the top-k with gradients through it and applies the formulas of TRON's paper. It
takes the negatives that were drawn, so that only arithmetic is compared.
"""

import ast
import inspect
import itertools
import json
import math
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.datasets import cyclic_sessions, write_dataset
from helpers.networks import build_pair, make_config, make_sessions
from helpers.steps import LENGTHS, draw, negatives_that_count, reference_loss, step_of_both
from torch.nn import functional as F

from tron_cli.checkpoint import LAST, load_checkpoint
from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import training_batch
from tron_cli.data.dataset import Sessions
from tron_cli.data.histories import TrainingWindows
from tron_cli.errors import InputError, RunError
from tron_cli.evaluation.predict import predict
from tron_cli.ops import products
from tron_cli.sampling.negatives import Distribution
from tron_cli.training.loop import train
from tron_cli.training.optim import build_optimizer, learning_rate
from tron_cli.training.step import training_loss


def check_step(config: ExperimentConfig, *, num_items: int, lengths: list[int]):
    """Check loss and every gradient; return how many negatives each position had."""
    ours, theirs, batch, negatives = step_of_both(config, num_items, lengths)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, theirs[name], rtol=0, atol=1e-9, msg=lambda text, n=name: n + text
        )
        assert gradient.isfinite().all()
    return [len(items) for items in negatives_that_count(batch, negatives, config)]


LOSSES = ("bce", "bpr-max", "ssm")
STYLES = ("eventwise", "sessionwise", "batchwise")
# Model settings take turns over the cases below; test_every_model_setting has all of them.
MODELS = [
    {"reuse_item_embeddings": reuse, "output_bias": bias, "positions": where, "num_heads": heads}
    for (reuse, bias), (where, heads) in zip(
        itertools.cycle([(True, False), (False, True), (True, True), (False, False)]),
        [("end", 1), ("start", 2), ("end", 4), ("start", 1), ("end", 2)],
        strict=False,
    )
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("topk", [0, 4])
def test_step_equals_padded_reference(loss, style, topk):
    """Every rejection and collision setting, on a catalogue small enough to collide."""
    switches = itertools.product([False, True], repeat=3)
    for model, (in_session, in_batch, mask) in zip(itertools.cycle(MODELS), switches, strict=False):
        config = make_config(
            loss=loss,
            sampling_style=style,
            topk_sampling=topk > 0,
            topk_sampling_k=topk or 1,
            reject_uniform_session_items=in_session,
            reject_in_batch_items=in_batch,
            mask_collisions=mask,
            bpr_penalty=0.3,
            **model,
        )
        check_step(config, num_items=45, lengths=LENGTHS)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_step_for_model_settings(model, loss):
    check_step(
        make_config(loss=loss, topk_sampling=True, topk_sampling_k=3, bpr_penalty=0.1, **model),
        num_items=45,
        lengths=LENGTHS,
    )


@pytest.mark.parametrize("topk", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("uniform", "in_batch"), [(5, 0), (0, 4), (1, 1)])
def test_step_with_one_kind_of_negatives(loss, topk, uniform, in_batch):
    for style in STYLES:
        config = make_config(
            loss=loss,
            sampling_style=style,
            num_uniform_negatives=uniform,
            num_batch_negatives=in_batch,
            topk_sampling=topk,
            topk_sampling_k=2 if uniform + in_batch > 1 else 1,
        )
        check_step(config, num_items=45, lengths=LENGTHS)


@pytest.mark.parametrize("topk", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("style", STYLES)
def test_step_where_negatives_run_out(loss, style, topk):
    """Three items: rejection exhausts them, the batch is too small for its in-batch negatives."""
    config = make_config(
        loss=loss,
        sampling_style=style,
        topk_sampling=topk,
        topk_sampling_k=5,
        num_batch_negatives=9,
        reject_uniform_session_items=True,
        bpr_penalty=0.3,
    )
    counts = check_step(config, num_items=3, lengths=[12, 2])
    assert min(counts) <= 1
    assert max(counts) > 1


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("topk", [False, True])
def test_step_where_a_position_has_no_negative_at_all(loss, topk):
    """One session that shows both items: nothing can be drawn, and nothing is NaN."""
    config = make_config(
        loss=loss,
        sampling_style="sessionwise",
        reject_uniform_session_items=True,
        topk_sampling=topk,
        bpr_penalty=0.3,
        topk_sampling_k=4,
    )
    model, reference = build_pair(config, 2)
    sessions = Sessions(np.array([1, 2, 1, 1], np.int32), np.array([0, 4]))
    batch = training_batch(sessions, np.arange(1), 6)
    negatives = draw(batch, 2, config)
    assert negatives_that_count(batch, negatives, config) == [[], [], []]
    loss_value = training_loss(model, batch, config, Distribution(2))
    loss_value.backward()
    expected = reference_loss(reference, batch, negatives, config)
    torch.testing.assert_close(loss_value, expected, rtol=0, atol=1e-9)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("loss", ["ce", "ssm"])
def test_the_losses_of_all_prefixes_are_those_of_all_events(loss):
    """A causal model with positions from the start sees the same before an event either way."""
    catalogue = {
        "num_uniform_negatives": 0, "num_batch_negatives": 0, "topk_sampling": False,
        "reject_in_batch_items": True,
    }  # fmt: skip
    # All other items are negatives, in any order.
    whole = {**catalogue, "num_uniform_negatives": 44, "sampling_style": "batchwise"}
    config = make_config(
        loss=loss, positions="start", dropout_rate=0.0, **(catalogue if loss == "ce" else whole)
    )
    model, _ = build_pair(config, 45)
    sessions = make_sessions([2, 5, 7, 3], 45)
    windows = TrainingWindows(sessions, 6, "prefixes")
    rows = np.arange(len(windows))
    prefixes = training_batch(sessions, rows, 6, windows=windows, last_only=True)
    events = training_batch(sessions, np.arange(4), 6)
    assert len(prefixes.targets_N) == len(events.targets_N) == 13
    losses = []
    for batch in (prefixes, events):
        torch.manual_seed(0)
        losses.append(training_loss(model, batch, config, Distribution(45)))
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)


@pytest.mark.parametrize("mask", [False, True])
def test_the_positive_can_be_its_own_negative(mask):
    """TRON's defect: in a catalogue of one item every negative is the target itself."""
    config = make_config(mask_collisions=mask, num_batch_negatives=0, reject_in_batch_items=False)
    model, _ = build_pair(config, 1)
    sessions = Sessions(np.array([1, 1, 1], np.int32), np.array([0, 3]))
    loss = training_loss(model, training_batch(sessions, np.arange(1), 6), config, Distribution(1))
    expected = 0.0 if mask else math.log(1 + config.num_uniform_negatives)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("loss", LOSSES)
def test_bf16_autocast_stays_near_float32(loss, style):
    config = make_config(
        loss=loss, sampling_style=style, topk_sampling=True, topk_sampling_k=4, bpr_penalty=0.1
    )
    model = build_pair(config, 45)[0].float()
    batch = training_batch(make_sessions(LENGTHS, 45), np.arange(len(LENGTHS)), 6)

    def step(enabled: bool):
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = training_loss(model, batch, config, Distribution(45))
        value.backward()
        return value, torch.cat([p.grad.flatten() for p in model.parameters()])

    (exact, exact_grad), (half, half_grad) = step(False), step(True)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(exact.item(), rel=0.03)
    assert F.cosine_similarity(half_grad, exact_grad, dim=0) > 0.99


@pytest.mark.parametrize("one_dnn", [True, False])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("optimizer", ["adam", "row_adam"])
def test_float32_as_trained_is_within_rounding_of_the_reference(
    monkeypatch, optimizer, style, one_dnn
):
    """The products, parts and selection of float32, which float64 does not go through."""
    if one_dnn and not products._one_dnn():
        pytest.skip("this processor or build has no AVX-512 oneDNN")
    monkeypatch.setattr(products, "_one_dnn", lambda: one_dnn)
    for topk, model_settings in zip([True, False, True], MODELS, strict=False):
        config = make_config(
            loss="ssm", optimizer=optimizer, sampling_style=style, topk_sampling=topk,
            topk_sampling_k=4, num_uniform_negatives=150, **model_settings,
        )  # fmt: skip
        model, reference = build_pair(config, 700)
        batch = training_batch(make_sessions(LENGTHS * 3, 700), np.arange(30), 6)
        assert len(batch.inputs_N) % 64
        torch.manual_seed(11)
        negatives = draw(batch, 700, config)
        torch.manual_seed(11)
        loss = training_loss(model.float(), batch, config, Distribution(700))
        loss.backward()
        expected = reference_loss(reference, batch, negatives, config)
        expected.backward()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        ours = dict(model.named_parameters())
        for name, parameter in reference.named_parameters():
            gradient = ours[reference.name_in_model(name)].grad.to_dense()
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(gradient.double(), parameter.grad, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("name", ["adam", "adagrad"])
def test_optimizers_are_torchs_reference(name):
    """Three steps of the textbook rule on one weight."""
    weight = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = build_optimizer(name, [weight], lr=0.1)
    expected, first, second = 1.0, 0.0, 0.0
    for step, gradient in enumerate([0.5, -2.0, 1.0], start=1):
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        if name == "adam":
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            corrected = math.sqrt(second / (1 - 0.999**step)) + 1e-8
            expected -= 0.1 * first / (1 - 0.9**step) / corrected
        else:
            second += gradient**2
            expected -= 0.1 * gradient / (math.sqrt(second) + 1e-10)
        assert weight.item() == pytest.approx(expected, rel=1e-12)


def test_learning_rate_warms_up_and_stays():
    rates = [
        learning_rate(step, lr=0.4, schedule="constant", warmup_steps=4, total_steps=8)
        for step in range(8)
    ]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4])


@pytest.mark.parametrize(("warmup_steps", "warned"), [(3, False), (4, True), (400, True)])
def test_a_warm_up_that_ends_after_the_run_is_warned_of(warmup_steps, warned, tmp_path, caplog):
    """Three steps in all: the learning rate would never be the one of the configuration."""
    dataset = write_dataset(tmp_path, train=cyclic_sessions(24, seed=1), val=[[1, 2]])
    config = make_config(
        lr=0.5, warmup_steps=warmup_steps, max_epochs=3, train_batch_size=24, clip_norm=1e-6
    )
    train(config, dataset, tmp_path / "run", device=CPU)
    said = [line for line in caplog.messages if "warmup_steps" in line]
    assert len(said) == warned
    if warned:
        assert f"warmup_steps={warmup_steps} is longer than the run of 3 steps" in said[0]
        assert f"ends at {0.5 * 3 / warmup_steps:.3g}" in said[0]


def test_learning_rate_follows_half_a_cosine_to_zero():
    rates = [
        learning_rate(step, lr=2.0, schedule="cosine", warmup_steps=2, total_steps=8)
        for step in range(9)
    ]
    half = math.sqrt(3) / 2
    assert rates == pytest.approx([1, 2, 2, 1 + half, 1.5, 1, 0.5, 1 - half, 0])
    # Nothing is left of the schedule: it stays at its end, and never rises again.
    after = learning_rate(100, lr=2.0, schedule="cosine", warmup_steps=2, total_steps=8)
    assert after == pytest.approx(0, abs=1e-12)


def test_learning_rate_when_all_steps_are_warm_up():
    rates = [
        learning_rate(step, lr=1.0, schedule="cosine", warmup_steps=4, total_steps=4)
        for step in range(4)
    ]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0])


# --- the loop: what is learned, and from which sessions -------------------------------------------

CPU = torch.device("cpu")


def test_row_adam_is_adam_where_each_step_touches_each_item(tmp_path):
    """A small catalogue, and no top-k that would leave negatives without a gradient."""
    dataset = write_dataset(tmp_path, train=cyclic_sessions(60, seed=1))
    weights = {}
    for optimizer in ("adam", "row_adam"):
        config = make_config(
            optimizer=optimizer, sampling_style="eventwise", num_uniform_negatives=40,
            dropout_rate=0.1, train_batch_size=20, max_epochs=4, lr=1e-3, precision="float32",
        )  # fmt: skip
        best = train(config, dataset, tmp_path / optimizer, device=CPU)
        weights[optimizer] = load_checkpoint(best).weights
    for name, values in weights["adam"].items():
        found = weights["row_adam"][name]
        if name.endswith("query_key_value.bias"):
            # Keys have one bias for all places, which softmax ignores: its gradient is rounding.
            values, found = (torch.cat([x[:8], x[16:]]) for x in (values, found))
        torch.testing.assert_close(found, values, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("optimizer", "lr", "reuse"), [("row_adam", 2e-2, True), ("adagrad", 0.2, False)]
)
def test_optimizers_of_rows_learn_a_cycle(tmp_path, optimizer, lr, reuse):
    """A step of two sessions and top-3 negatives leaves most items asleep."""
    dataset = write_dataset(
        tmp_path, train=cyclic_sessions(200, seed=1), val=cyclic_sessions(40, seed=2)
    )
    config = make_config(
        optimizer=optimizer, lr=lr, reuse_item_embeddings=reuse, embedding_dim=16, num_blocks=1,
        num_uniform_negatives=8, num_batch_negatives=0, reject_in_batch_items=False,
        topk_sampling=True, topk_sampling_k=3, train_batch_size=2, clip_norm=5.0, max_epochs=6,
        metrics=("R@1",), val_metric="R@1", precision="float32",
    )  # fmt: skip
    best = load_checkpoint(train(config, dataset, tmp_path / "run", device=CPU))
    assert best.metrics["R@1"] >= 0.95


def test_sessions_of_fewer_than_two_events_are_refused(tmp_path):
    """TRON crashes on them, or poisons the batch. Preparation leaves none; others are told so."""
    sessions = cyclic_sessions(10, seed=1)
    dataset = write_dataset(tmp_path, train=[[3], *sessions, [], [4]], val=sessions)
    with pytest.raises(InputError, match="3 sessions of fewer than two events"):
        train(make_config(), dataset, tmp_path, device=CPU)


@pytest.fixture
def seen_sessions(monkeypatch):
    """The first item of each session that a step trains on; each session has its own."""
    seen: list[list[int]] = []

    def record(sessions, chosen, sequence_length, **options):
        seen.append([int(sessions[session][0]) for session in chosen])
        return training_batch(sessions, chosen, sequence_length, **options)

    monkeypatch.setattr("tron_cli.training.feed.training_batch", record)
    return seen


def train_numbered(tmp_path, *, sessions: int, **settings) -> Path:
    """Train on sessions that begin with items 1, 2, ... and go on with one common item."""
    last = sessions + 1
    dataset = write_dataset(
        tmp_path, train=[[first, last, last] for first in range(1, last)], val=[[1, last]] * 30
    )
    config = make_config(precision="float32", metrics=("R@5",), val_metric="R@5", **settings)
    return train(config, dataset, tmp_path, device=CPU)


def test_each_pass_visits_each_session_once_in_a_new_order(tmp_path, seen_sessions):
    train_numbered(tmp_path, sessions=23, train_batch_size=5, max_epochs=3)
    assert [len(step) for step in seen_sessions] == [5, 5, 5, 5, 3] * 3
    passes = [list(itertools.chain(*seen_sessions[start : start + 5])) for start in (0, 5, 10)]
    assert all(sorted(one) == list(range(1, 24)) for one in passes)
    assert passes[0] != passes[1] != passes[2]


def test_short_epochs_go_on_where_the_last_one_ended(tmp_path, seen_sessions):
    train_numbered(tmp_path, sessions=23, train_batch_size=5, max_epochs=5, max_batches_per_epoch=2)
    assert len(seen_sessions) == 10
    for start in (0, 5):
        assert sorted(itertools.chain(*seen_sessions[start : start + 5])) == list(range(1, 24))


def test_no_shuffling_trains_in_the_order_of_the_file(tmp_path, seen_sessions):
    train_numbered(
        tmp_path, sessions=7, train_batch_size=3, max_epochs=2, shuffling_style="no_shuffling"
    )
    assert seen_sessions == [[1, 2, 3], [4, 5, 6], [7]] * 2


def test_overfit_batches_trains_and_validates_on_the_first_sessions(
    tmp_path, seen_sessions, monkeypatch
):
    validated = []

    def record(model, sessions, **options):
        validated.append([int(sessions[session][0]) for session in range(len(sessions))])
        return predict(model, sessions, **options)

    monkeypatch.setattr("tron_cli.training.validation.predict", record)
    train_numbered(tmp_path, sessions=23, train_batch_size=3, max_epochs=2, overfit_batches=2)
    assert len(seen_sessions) == 4
    assert {item for step in seen_sessions for item in step} == {1, 2, 3, 4, 5, 6}
    assert validated == [[1, 2, 3, 4, 5, 6]] * 2


@pytest.mark.parametrize(
    ("limit", "sessions"), [(1.0, 30), (0.5, 15), (0.01, 1), (2.0, 10), (50.0, 30)]
)
def test_limit_val_batches_is_a_share_or_a_number_of_batches(
    tmp_path, monkeypatch, limit, sessions
):
    validated = []

    def record(model, chosen, **options):
        validated.append(len(chosen))
        return predict(model, chosen, **options)

    monkeypatch.setattr("tron_cli.training.validation.predict", record)
    train_numbered(tmp_path, sessions=5, train_batch_size=5, max_epochs=1, limit_val_batches=limit)
    assert validated == [sessions]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, precision):
    dataset = write_dataset(tmp_path, train=cyclic_sessions(40, seed=1), val=[[1, 2]])
    config = make_config(lr=1e30, train_batch_size=4, precision=precision)
    with pytest.raises(RunError, match=r"loss is (nan|inf).*try a lower lr"):
        train(config, dataset, tmp_path, device=CPU)
    assert not list(tmp_path.glob("*loss=*.pt")), "a diverged model looks like a finished one"


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """The last update may overflow after a finite loss, and without validation nobody looks."""
    dataset = write_dataset(tmp_path, train=cyclic_sessions(40, seed=1))
    with pytest.raises(RunError, match="try a lower lr"):
        train(
            make_config(lr=1e38, max_epochs=1, precision="float32"), dataset, tmp_path, device=CPU
        )
    assert not list(tmp_path.glob("*.pt"))


def test_clipping_bounds_the_step(tmp_path):
    """Adagrad's state is the sum of the squares of the gradients that it was given."""
    dataset = write_dataset(tmp_path, train=cyclic_sessions(8, seed=1), val=[[1, 2]])
    norms = {}
    for clip_norm in (0.0, 1e-3):
        config = make_config(
            optimizer="adagrad", clip_norm=clip_norm, max_epochs=1, train_batch_size=8
        )
        train(config, dataset, tmp_path, device=CPU)
        state = load_checkpoint(tmp_path / LAST).training["optimizer"]["state"]
        norms[clip_norm] = sum(entry["square"].sum().item() for entry in state) ** 0.5
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)
    assert norms[0.0] > 0.01


def test_patience_ends_training(tmp_path):
    """A val_metric that cannot grow: two epochs after the first, the best one, are enough."""
    best = train_numbered(
        tmp_path, sessions=3, max_epochs=50, lr=1e-12, early_stopping_patience=2, dropout_rate=0.0
    )
    assert load_checkpoint(best).step == 1
    assert load_checkpoint(best.with_name(LAST)).step == 3


def test_the_loop_is_one_flat_loop_that_fits_a_screen():
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(train))).body
    loops = [node for node in ast.walk(function) if isinstance(node, ast.For | ast.While)]
    assert len(loops) == 1
    code = function.body[1:]  # without its docstring
    assert code[-1].end_lineno - code[0].lineno < 60


def test_the_loop_warms_up_and_decays_as_configured(tmp_path, monkeypatch):
    monkeypatch.setattr("tron_cli.training.loop._LOG_EVERY", 1)
    dataset = write_dataset(tmp_path, train=cyclic_sessions(8, seed=1), val=[[1, 2]])
    config = make_config(
        lr=0.8, lr_schedule="cosine", warmup_steps=2, train_batch_size=4, max_epochs=3
    )
    train(config, dataset, tmp_path / "run", device=CPU)
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    rates = [row["lr"] for row in rows if "lr" in row]
    decay = [0.4 * (1 + math.cos(math.pi * done / 4)) for done in range(4)]
    assert rates == pytest.approx([0.4, 0.8, *decay])
