"""The batch of each step: a function of the configuration and of the step's number alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import pack_sessions, random_sessions, tiny_settings

from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import Batch, session_order
from tron_cli.data.dataset import Sessions
from tron_cli.data.lanes import Lanes
from tron_cli.models.base import build_model
from tron_cli.training.feed import Cloze, Feed, WholeSessions, build_feed

ITEMS, LENGTH, ROWS = 30, 6, 45  # sequence_length; 45 sessions in batches of 8 are 6 steps
KINDS: dict[str, dict[str, Any]] = {
    "whole sessions": {},
    "cloze": {"model": "bert4rec", "mask_probability": 0.4},
    "lanes": {"model": "gru4rec", "session_parallel": True},
}
WINDOWS: dict[str, dict[str, Any]] = {
    "random": {"training_windows": "random"},
    "all": {"training_windows": "all", "window_stride": 4},
    "prefixes": {"training_windows": "prefixes"},
    "random cloze": {**KINDS["cloze"], "training_windows": "random"},
    "all cloze": {**KINDS["cloze"], "training_windows": "all"},
}
RECENT: dict[str, Any] = {
    "recency_half_life_sessions": 9, "shuffling_style": "shuffle_with_replacement"
}  # fmt: skip
STYLES = ("no_shuffling", "shuffle_without_replacement", "shuffle_with_replacement")


def feed_of(sessions: Sessions, *, padded: bool = False, **changes: Any) -> Feed:
    config = ExperimentConfig(**tiny_settings(**changes))
    return build_feed(config, sessions, build_model(config, ITEMS), padded=padded)


@pytest.fixture
def rows(rng: np.random.Generator) -> list[list[int]]:
    return random_sessions(rng, ROWS, ITEMS, longest=11)


@pytest.fixture
def sessions(rows: list[list[int]]) -> Sessions:
    return pack_sessions(rows)


def values(batch: Batch) -> list[Any]:
    """All that a batch holds, as plain lists."""
    groups = [(group.start, group.end, group.gather_RW.tolist()) for group in batch.groups]
    keeps = [None if group.keep is None else group.keep.tolist() for group in batch.groups]
    names = ("inputs", "targets", "lengths", "rows", "places", "predicting", "lanes")
    axes = "NNBNNPB"
    tensors = [getattr(batch, f"{name}_{axis}") for name, axis in zip(names, axes, strict=True)]
    return [groups, keeps, *(None if each is None else each.tolist() for each in tensors)]


def real_rows(batch: Batch, *, is_cloze: bool = False) -> list[list[int]]:
    """The items of each row, with the targets of a cloze batch in their places, else behind."""
    inputs_N = batch.inputs_N.clone()
    if batch.predicting_P is not None and not is_cloze:
        rows = inputs_N.split(batch.lengths_B.tolist())
        last = batch.lengths_B.cumsum(0) - 1
        assert torch.equal(batch.predicting_P, last)
        return [
            [*row.tolist(), target]
            for row, target in zip(rows, batch.targets_N.tolist(), strict=True)
        ]
    if batch.predicting_P is not None:
        inputs_N[batch.predicting_P] = batch.targets_N
        return [row.tolist() for row in inputs_N.split(batch.lengths_B.tolist())]
    lengths = batch.lengths_B.tolist()
    pairs = zip(inputs_N.split(lengths), batch.targets_N.split(lengths), strict=True)
    return [[*row.tolist(), int(targets[-1])] for row, targets in pairs]


def test_each_kind_has_its_feed(sessions: Sessions) -> None:
    kinds = [WholeSessions, Cloze, Lanes]
    assert [type(feed_of(sessions, **changes)) for changes in KINDS.values()] == kinds


@pytest.mark.parametrize("kind", [*KINDS, *WINDOWS])
@pytest.mark.parametrize("style", STYLES)
def test_a_batch_is_a_function_of_configuration_and_step(
    kind: str, style: str, sessions: Sessions
) -> None:
    """From whatever step on they are asked for, and whatever else is random in the process."""
    settings = {**(KINDS | WINDOWS)[kind], "shuffling_style": style}
    feed = feed_of(sessions, **settings)
    expected = [values(feed.batch(step)) for step in range(20)]
    for first in (0, 1, 5, 6, 13, 19):
        torch.manual_seed(first)
        np.random.seed(first)  # noqa: NPY002 - the global state must not matter
        late = feed_of(sessions, **settings)
        assert [values(late.batch(step)) for step in range(first, 20)] == expected[first:]
    seeded = feed_of(sessions, seed=1, **settings)
    same = [values(seeded.batch(step)) == expected[step] for step in range(20)]
    # Without shuffling, masks and drawn windows nothing is random.
    is_drawn = "cloze" in kind or kind == "random"
    assert all(same) == (style == "no_shuffling" and not is_drawn)
    assert any(same) == (style == "no_shuffling" and "cloze" not in kind)  # some fit the window


@pytest.mark.parametrize("kind", ["whole sessions", "cloze"])
@pytest.mark.parametrize("style", STYLES)
def test_passes_go_on_one_after_the_other(
    kind: str, style: str, rows: list[list[int]], sessions: Sessions
) -> None:
    """All sessions of a pass in its order, the last batch with what is left, then the next pass.

    Epochs play no part: a feed knows of none.
    """
    settings = {**KINDS[kind], "shuffling_style": style}
    feed = feed_of(sessions, **settings)
    # Shorter epochs, or more of them, change no batch.
    short = feed_of(sessions, max_batches_per_epoch=4, max_epochs=9, **settings)
    assert feed.steps_per_pass == short.steps_per_pass == 6
    for data_pass in range(3):
        order = session_order(ROWS, style, seed=42, epoch=data_pass)
        for place, size in enumerate([8, 8, 8, 8, 8, 5]):
            step = data_pass * 6 + place
            batch = feed.batch(step)
            chosen = order[place * 8 : place * 8 + size]
            expected = sorted((rows[row][-(LENGTH + 1) :] for row in chosen), key=len)
            assert real_rows(batch, is_cloze=kind == "cloze") == expected
            assert values(short.batch(step)) == values(batch)


def windows_of_loops(rows: list[list[int]], kind: str) -> list[list[int]]:
    """The windows of the sessions in order, each with its last target."""
    if kind == "prefixes":
        return [row[max(0, end - LENGTH) : end + 1] for row in rows for end in range(1, len(row))]
    stride = LENGTH if "cloze" in kind else 4
    found = []
    for row in rows:
        ends = [len(row) - 1]
        while ends[-1] > LENGTH:
            ends.append(ends[-1] - stride)
        found += [row[max(0, end - LENGTH) : end + 1] for end in reversed(ends)]
    return found


@pytest.mark.parametrize("kind", ["all", "prefixes", "all cloze"])
@pytest.mark.parametrize("style", STYLES)
def test_a_pass_has_every_window(
    kind: str, style: str, rows: list[list[int]], sessions: Sessions
) -> None:
    """In the order of the pass, the last batch with what is left, then the next pass."""
    feed = feed_of(sessions, shuffling_style=style, **WINDOWS[kind])
    expected = windows_of_loops(rows, kind)
    assert feed.steps_per_pass == -(-len(expected) // 8)
    for data_pass in range(2):
        order = session_order(len(expected), style, seed=42, epoch=data_pass)
        for place in range(feed.steps_per_pass):
            batch = feed.batch(data_pass * feed.steps_per_pass + place)
            chosen = order[place * 8 : (place + 1) * 8]
            found = real_rows(batch, is_cloze="cloze" in kind)
            assert found == sorted((expected[number] for number in chosen), key=len)


@pytest.mark.parametrize("kind", ["random", "random cloze"])
def test_random_windows_differ_from_pass_to_pass(
    kind: str, rows: list[list[int]], sessions: Sessions
) -> None:
    """Each session once per pass, in the end with all of its windows."""
    feed = feed_of(sessions, shuffling_style="no_shuffling", **WINDOWS[kind])
    assert feed.steps_per_pass == 6
    found: list[set[tuple[int, ...]]] = [set() for _ in range(6)]
    for step in range(6 * 60):
        batch = real_rows(feed.batch(step), is_cloze="cloze" in kind)
        found[step % 6] |= {tuple(row) for row in batch}
    for place in range(6):
        expected = {
            tuple(row[start : start + LENGTH + 1])
            for row in rows[place * 8 : place * 8 + 8]
            for start in range(max(1, len(row) - LENGTH))
        }
        assert found[place] == expected


@pytest.mark.parametrize(
    ("count", "size", "steps"), [(45, 8, 6), (48, 8, 6), (49, 8, 7), (3, 8, 1), (5, 1, 5)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_a_pass(
    kind: str, count: int, size: int, steps: int, rng: np.random.Generator
) -> None:
    rows = random_sessions(rng, count, ITEMS, longest=11)
    feed = feed_of(pack_sessions(rows), train_batch_size=size, **KINDS[kind])
    if kind == "lanes":  # as many events as a pass has, one a lane and step
        steps = -(-sum(min(len(row) - 1, LENGTH) for row in rows) // size)
    assert feed.steps_per_pass == steps


@pytest.mark.parametrize("windows", ["last", "all", "prefixes"])
@pytest.mark.parametrize("has_times", [False, True])
def test_later_sessions_are_drawn_more_often(
    windows: str, has_times: bool, rng: np.random.Generator
) -> None:
    """Half as often for each half-life, each window of a session as often as its others."""
    rows = [[number] * int(rng.integers(2, 14)) for number in range(1, 31)]  # item: its session
    sessions = pack_sessions(rows)
    settings: dict[str, Any] = {**RECENT, "training_windows": windows}
    age_S = np.arange(30)[::-1] / 9
    if has_times:  # in hours, in no order
        last_S = rng.permutation(30) * 3_600_000
        times = np.repeat(last_S, list(map(len, rows))) - rng.integers(9, size=len(sessions.items))
        times[sessions.offsets[1:] - 1] = last_S
        sessions = Sessions(sessions.items, sessions.offsets, times)
        settings |= {"recency_half_life_sessions": 0, "recency_half_life_days": 9 / 24}
        age_S = (29 - last_S // 3_600_000) / 9
    feed = feed_of(sessions, **settings)
    kinds = {"last": [1] * 30, "prefixes": [len(row) - 1 for row in rows],
             "all": [-(-(len(row) - 1) // LENGTH) for row in rows]}  # fmt: skip
    expected = np.array(kinds[windows]) * 0.5**age_S
    found = np.zeros(31)
    steps = 100 * feed.steps_per_pass
    for step in range(steps):
        found += np.bincount([row[0] for row in real_rows(feed.batch(step))], minlength=31)
    share = expected / expected.sum()
    deviation = 5 * np.sqrt(share * (1 - share) / found.sum())
    assert (np.abs(found[1:] / found.sum() - share) <= deviation).all()


def test_lanes_begin_later_sessions_more_often() -> None:
    sessions = pack_sessions([[number, number] for number in range(1, 31)])
    feed = feed_of(sessions, **KINDS["lanes"], **RECENT)
    found = np.zeros(31)
    for step in range(2_000):  # one input per session
        found += np.bincount(feed.batch(step).inputs_N, minlength=31)
    share = 0.5 ** (np.arange(30)[::-1] / 9)
    share /= share.sum()
    deviation = 5 * np.sqrt(share * (1 - share) / found.sum())
    assert (np.abs(found[1:] / found.sum() - share) <= deviation).all()


def test_all_windows_of_a_session_are_drawn_as_often() -> None:
    sessions = pack_sessions([[1] * 3, list(range(1, 14))])
    settings = {**RECENT, **WINDOWS["prefixes"], "recency_half_life_sessions": 2}
    feed = feed_of(sessions, **settings)
    targets = np.concatenate(
        [feed.batch(step).targets_N for step in range(1_000 * feed.steps_per_pass)]
    )
    counts = np.bincount(targets[targets > 1], minlength=14)[2:]
    assert counts.sum() > 10_000
    assert np.abs(counts / counts.sum() - 1 / 12).max() < 5 * np.sqrt(1 / 12 / counts.sum())


def test_masks_differ_from_step_to_step(rows: list[list[int]], sessions: Sessions) -> None:
    """They differ even one pass later, with the same sessions in the same order."""
    feed = feed_of(sessions, shuffling_style="no_shuffling", **KINDS["cloze"])

    def masks(step: int) -> tuple[int, ...]:
        return tuple(feed.batch(step).predicting_P.tolist())

    assert len({masks(step) for step in range(0, 60, 6)}) == 10
    # Nothing else differs there.
    whole = feed_of(sessions, shuffling_style="no_shuffling")
    assert all(values(whole.batch(step)) == values(whole.batch(step + 6)) for step in range(6))


def test_two_feeds_do_not_disturb_each_other(rng: np.random.Generator) -> None:
    """Alternate between passes of as many sessions and of others."""
    kinds: list[tuple[Sessions, int]] = [
        (pack_sessions(random_sessions(rng, count, ITEMS)), seed)
        for count, seed in ((45, 1), (45, 2), (30, 1))
    ]

    def steps(feed: Feed) -> Iterator[list[Any]]:
        return (values(feed.batch(step)) for step in range(12))

    alone = [list(steps(feed_of(sessions, seed=seed))) for sessions, seed in kinds]
    in_turn = zip(*(steps(feed_of(sessions, seed=seed)) for sessions, seed in kinds), strict=True)
    assert [list(each) for each in zip(*in_turn, strict=True)] == alone


def test_padded_prefixes_predict_the_same_events(sessions: Sessions) -> None:
    plain, padded = (
        feed_of(sessions, padded=each, **WINDOWS["prefixes"]) for each in (False, True)
    )
    for step in range(3):
        batch, wide = plain.batch(step), padded.batch(step)
        assert (batch.padded, wide.padded) == (False, True)
        assert torch.equal(batch.predicting_P, wide.predicting_P)
        assert torch.equal(batch.targets_N, wide.targets_N)
        assert torch.equal(wide.inputs_N[: len(batch.inputs_N)], batch.inputs_N)


def test_padding_changes_no_session(rows: list[list[int]], sessions: Sessions) -> None:
    """On CUDA batches of whole sessions have rounded shapes; cloze batches never do."""
    plain, padded = (feed_of(sessions, padded=padded) for padded in (False, True))
    for step in range(7):
        batch, wide = plain.batch(step), padded.batch(step)
        assert (batch.padded, wide.padded) == (False, True)
        events = len(batch.inputs_N)
        for name in ("inputs_N", "targets_N", "rows_N", "places_N"):
            assert torch.equal(getattr(wide, name)[:events], getattr(batch, name))
        assert not wide.inputs_N[events:].any()
    assert not feed_of(sessions, padded=True, **KINDS["cloze"]).batch(0).padded


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_in_one_piece_is_the_same(kind: str, sessions: Sessions) -> None:
    """A device gets it in this form: views of one stretch of memory, also of masks and lanes."""
    batch = feed_of(sessions, **KINDS[kind]).batch(3)
    whole = batch.in_one_piece(pinned=False)
    assert values(whole) == values(batch)
    assert torch.equal(whole.target_rows_P, batch.target_rows_P)
    begin = whole.memory.data_ptr()
    for name in ("inputs_N", "predicting_P", "lanes_B"):
        tensor = getattr(whole, name)
        if tensor is not None:
            assert 0 <= tensor.data_ptr() - begin < 8 * whole.memory.numel()
