"""Sessions -> packed batches: the events of all rows back to back, never padded.

Shapes: N events of a batch, B rows (sessions, or prefixes of sessions), L sequence_length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from tron_cli.data.dataset import Sessions
from tron_cli.data.histories import TrainingWindows

Prepared = TypeVar("Prepared")

# The events of a padded batch are a multiple of this.
_EVENTS = 128


@dataclass(frozen=True)
class AttentionGroup:
    """Rows of similar length, which attention pads to the longest of them.

    start, end: the rows' events in the packed order. gather_RW: int64, packed event at each place
    of the padded rows (places past a row's end repeat its last event: causal attention never looks
    there). keep: int64 [end - start], places of the padded rows that are events; None when the rows
    have one length and nothing is padded. In a padded batch its padding has the first place.
    whole: in a share of a batch, the number of the group's rows in the whole batch, and which of
    them these are, int64 [R], maybe none.
    """

    start: int
    end: int
    gather_RW: torch.Tensor
    keep: torch.Tensor | None
    whole: tuple[int, torch.Tensor] | None = None


@dataclass(frozen=True)
class Share:
    """Some rows of a batch, which one of several processes computes (`shares.py`).

    whole: the batch. rows_B, events_N, targets_P: int64, the places of the share's rows, events and
    targets among those of the whole. counts: False where a batch has fewer rows than there are
    processes, and this one has a row of another, which adds nothing to loss and gradients.
    """

    whole: Batch
    rows_B: torch.Tensor
    events_N: torch.Tensor
    targets_P: torch.Tensor
    counts: bool

    def to(self, device: torch.device) -> Share:
        return Share(
            whole=self.whole.to(device),
            rows_B=self.rows_B.to(device),
            events_N=self.events_N.to(device),
            targets_P=self.targets_P.to(device),
            counts=self.counts,
        )


@dataclass(frozen=True)
class Batch:
    """Rows in ascending order of length, packed.

    inputs_N: int64 item ids. targets_N: int64, the item that follows each input, or None where only
    hidden states are wanted. predicting_P: int64, the events that have a target, and targets_N then
    has an entry for each of them; None: all. lanes_B: int64, the lane of each row of a session-
    parallel batch (`lanes.py`), where a row is one event and place 0 the beginning of a session.
    lengths_B: int64. rows_N: int64, the row of each event.
    places_N: int64, place of each event in its row, from 0. groups: how attention splits the rows.
    padded: shapes are rounded up, for a device that computes the same shapes again and again: the
    last events may be padding, with item 0, target 0, row 0 and place 0, and all rows are one
    group. memory: int64, the tensor that all others are views of; None where each has its own.
    share: how the rows came from a larger batch; None where they are all rows.
    """

    inputs_N: torch.Tensor
    targets_N: torch.Tensor | None
    lengths_B: torch.Tensor
    rows_N: torch.Tensor
    places_N: torch.Tensor
    groups: tuple[AttentionGroup, ...]
    padded: bool = False
    memory: torch.Tensor | None = None
    predicting_P: torch.Tensor | None = None
    lanes_B: torch.Tensor | None = None
    share: Share | None = None

    @property
    def target_rows_P(self) -> torch.Tensor:
        """Row of each target: int64."""
        return self.rows_N if self.predicting_P is None else self.rows_N[self.predicting_P]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`, copied there at once and without waiting."""
        if device.type == "cpu":
            return self

        whole = self if self.memory is not None else self.in_one_piece(pinned=True)
        assert whole.memory is not None
        there = whole._over(whole.memory.to(device, non_blocking=True))
        return replace(there, share=None if self.share is None else self.share.to(device))

    def in_one_piece(self, *, pinned: bool) -> Batch:
        """Return the batch with all of its tensors in one stretch of memory, for a single copy."""
        tensors = self._tensors()
        size = sum(tensor.numel() for tensor in tensors)
        memory = torch.empty(size, dtype=torch.int64, pin_memory=pinned)
        torch.cat([tensor.flatten() for tensor in tensors], out=memory)
        return self._over(memory)

    def _tensors(self) -> list[torch.Tensor]:
        tensors = [self.inputs_N, self.lengths_B, self.rows_N, self.places_N]
        optional = (self.targets_N, self.predicting_P, self.lanes_B)
        tensors += [tensor for tensor in optional if tensor is not None]
        for group in self.groups:
            tensors.append(group.gather_RW)
            if group.keep is not None:
                tensors.append(group.keep)
        return tensors

    def _over(self, memory: torch.Tensor) -> Batch:
        """Return a batch of these shapes whose tensors are views of `memory`."""
        tensors = self._tensors()
        parts = memory.split([tensor.numel() for tensor in tensors])
        views = (part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))
        inputs_N, lengths_B, rows_N, places_N = (next(views) for _ in range(4))
        return Batch(
            inputs_N=inputs_N,
            targets_N=None if self.targets_N is None else next(views),
            predicting_P=None if self.predicting_P is None else next(views),
            lanes_B=None if self.lanes_B is None else next(views),
            lengths_B=lengths_B,
            rows_N=rows_N,
            places_N=places_N,
            groups=tuple(
                replace(
                    group,
                    gather_RW=next(views),
                    keep=None if group.keep is None else next(views),
                )
                for group in self.groups
            ),
            padded=self.padded,
            memory=memory,
            share=self.share,
        )


def whole(batch: Batch) -> Batch:
    """Return the batch of which a batch is a share, or the batch itself."""
    return batch if batch.share is None else batch.share.whole


def pack(
    items: np.ndarray,
    starts_B: np.ndarray,
    lengths_B: np.ndarray,
    *,
    with_targets: bool,
    appended_item: int | None = None,
    padded_width: int | None = None,
) -> Batch:
    """Pack the slices items[start : start + length], each of at least one event.

    items: int32 [E]; starts_B, lengths_B: int64, lengths ascending. with_targets: whether
    items[start + 1 : start + length + 1] are the targets. appended_item: an item to append to each
    slice. padded_width: pad the batch; rows have this width in attention, at least the length of
    the longest row.
    """
    if appended_item is not None:
        lengths_B = lengths_B + 1
    total = int(lengths_B.sum())
    first_B = np.cumsum(lengths_B) - lengths_B
    rows_N = np.repeat(np.arange(len(lengths_B)), lengths_B)
    places_N = np.arange(total) - first_B[rows_N]
    source_N = starts_B[rows_N] + places_N
    if appended_item is not None:
        source_N[first_B + lengths_B - 1] = 0  # a placeholder: the next entry may not be an item
    inputs_N = items[source_N].astype(np.int64)
    if appended_item is not None:
        inputs_N[first_B + lengths_B - 1] = appended_item
    targets_N = items[source_N + 1].astype(np.int64) if with_targets else None
    if padded_width is not None:
        padding = (0, -total % _EVENTS)
        rows_N, places_N, inputs_N = (np.pad(a, padding) for a in (rows_N, places_N, inputs_N))
        targets_N = None if targets_N is None else np.pad(targets_N, padding)
        group = _whole_group(lengths_B, first_B, rows_N, places_N, padded_width)
        groups: tuple[AttentionGroup, ...] = (group,)
    else:
        groups = tuple(_attention_groups(lengths_B, first_B))
    return Batch(
        inputs_N=torch.from_numpy(inputs_N),
        targets_N=None if targets_N is None else torch.from_numpy(targets_N),
        lengths_B=torch.from_numpy(lengths_B),
        rows_N=torch.from_numpy(rows_N),
        places_N=torch.from_numpy(places_N),
        groups=groups,
        padded=padded_width is not None,
    )


def _whole_group(
    lengths_B: np.ndarray,
    first_B: np.ndarray,
    rows_N: np.ndarray,
    places_N: np.ndarray,
    width: int,
) -> AttentionGroup:
    gather = first_B[:, None] + np.minimum(np.arange(width), lengths_B[:, None] - 1)
    keep = rows_N * width + places_N
    return AttentionGroup(0, len(rows_N), torch.from_numpy(gather), torch.from_numpy(keep))


def _attention_groups(lengths_B: np.ndarray, first_B: np.ndarray) -> Iterator[AttentionGroup]:
    """Cut ascending lengths where padding would waste more than a call to attention costs."""
    low = 0
    while low < len(lengths_B):
        longest = int(lengths_B[low]) * 3 // 2 + 3
        high = int(np.searchsorted(lengths_B, longest, side="right"))
        lengths, first = lengths_B[low:high], first_B[low:high]
        width = int(lengths[-1])
        place = np.arange(width)
        gather = first[:, None] + np.minimum(place, lengths[:, None] - 1)
        padded = lengths[0] < width
        keep = np.flatnonzero(place < lengths[:, None]) if padded else None
        yield AttentionGroup(
            start=int(first[0]),
            end=int(first[-1] + lengths[-1]),
            gather_RW=torch.from_numpy(gather),
            keep=None if keep is None else torch.from_numpy(keep),
        )
        low = high


def training_batch(
    sessions: Sessions,
    chosen: np.ndarray,
    sequence_length: int,
    *,
    padded: bool = False,
    windows: TrainingWindows | None = None,
    random: np.random.Generator | None = None,
    last_only: bool = False,
) -> Batch:
    """Pack windows of up to sequence_length events of sessions: inputs and their targets.

    windows: of which `chosen` are taken, int64 [B]; without them, the last one of each chosen
    session of at least two events. random: see `TrainingWindows.at`. last_only: only the last event
    of each window has a target. padded: see `Batch`.
    """
    windows = windows or TrainingWindows(sessions, sequence_length)
    starts, lengths = windows.at(chosen, random)
    order = np.argsort(lengths, kind="stable")
    batch = pack(
        sessions.items,
        starts[order],
        lengths[order],
        with_targets=True,
        padded_width=sequence_length if padded else None,
    )
    if not last_only:
        return batch
    assert batch.targets_N is not None
    predicting_P = batch.lengths_B.cumsum(0) - 1
    return replace(batch, predicting_P=predicting_P, targets_N=batch.targets_N[predicting_P])


def cloze_batch(
    sessions: Sessions,
    chosen: np.ndarray,
    sequence_length: int,
    *,
    num_items: int,
    mask_probability: float,
    random: np.random.Generator,
    windows: TrainingWindows | None = None,
    random_windows: np.random.Generator | None = None,
) -> Batch:
    """Pack windows of up to sequence_length + 1 events of sessions, some of the events masked.

    sessions, chosen, windows, random_windows: as in `training_batch`; a window and the target of
    its last event count here as one.

    BERT4Rec's cloze task (Sun et al., CIKM 2019), as RecTools trains it: each event is a target
    with mask_probability, and is then shown as a mask (item num_items + 1) in 80 % of the cases, as
    a random item in 10 %, and as it is in 10 %. A session without any target gets its last event
    masked, as in prediction.
    """
    windows = windows or TrainingWindows(sessions, sequence_length)
    starts, lengths = windows.at(chosen, random_windows)
    lengths = lengths + 1  # with the last event
    order = np.argsort(lengths, kind="stable")
    lengths = lengths[order]
    batch = pack(sessions.items, starts[order], lengths, with_targets=False)
    inputs_N, rows_N = batch.inputs_N.numpy(), batch.rows_N.numpy()
    draws_N = random.random(len(inputs_N)) / mask_probability  # below 1: a target
    without_B = np.bincount(rows_N[draws_N < 1], minlength=len(lengths)) == 0
    last_B = np.cumsum(lengths) - 1
    draws_N[last_B[without_B]] = 0.0
    random_items_N = random.integers(1, num_items + 1, size=len(inputs_N))
    shown_N = np.where(draws_N < 0.9, random_items_N, inputs_N)
    shown_N = np.where(draws_N < 0.8, num_items + 1, shown_N)
    predicting_P = np.flatnonzero(draws_N < 1)
    return replace(
        batch,
        inputs_N=torch.from_numpy(np.where(draws_N < 1, shown_N, inputs_N)),
        targets_N=torch.from_numpy(inputs_N[predicting_P]),
        predicting_P=torch.from_numpy(predicting_P),
    )


def prepared_ahead(
    prepare: Callable[[int], Prepared], steps: range, thread: Executor
) -> Iterator[Prepared]:
    """Yield prepare(step) for each step while a thread prepares the next; raise its errors here."""
    waiting = [thread.submit(prepare, step) for step in steps[:1]]
    for step in steps:
        prepared = waiting.pop().result()
        if step != steps[-1]:
            waiting.append(thread.submit(prepare, step + steps.step))
        yield prepared


def order_of_pass(
    windows: TrainingWindows,
    style: str,
    *,
    seed: int,
    data_pass: int,
    weight_S: np.ndarray | None = None,
) -> np.ndarray:
    """Return the numbers of the windows of a pass in their order, by seed and pass: integers [W].

    weight_S: draw windows with the weights of their sessions, see `TrainingWindows.drawn`; style is
    then shuffle_with_replacement.
    """
    if weight_S is None:
        return session_order(len(windows), style, seed=seed, epoch=data_pass)
    return windows.drawn(weight_S, np.random.default_rng([seed, data_pass]))


def session_order(num_sessions: int, style: str, *, seed: int, epoch: int) -> np.ndarray:
    """Return the order in which an epoch visits sessions or windows, by seed and epoch: int64 [S].

    uint32 [S] if it is a permutation.
    """
    if style == "no_shuffling":
        return np.arange(num_sessions)
    random = np.random.default_rng([seed, epoch])
    if style == "shuffle_with_replacement":
        return random.integers(num_sessions, size=num_sessions)
    order = np.arange(num_sessions, dtype=np.uint32)
    random.shuffle(order)
    return order
