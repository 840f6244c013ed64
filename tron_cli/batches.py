"""Sessions -> packed batches: the events of all rows back to back, never padded.

Shapes: N events of a batch, B rows (sessions, or prefixes of sessions), L sequence_length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from tron_cli.dataset import Sessions


@dataclass(frozen=True)
class AttentionGroup:
    """Rows of like length, which attention pads among themselves.

    start, end: the rows' events in the packed order. gather_RW: int64, packed event at each place
    of the padded rows (places past a row's end repeat its last event: causal attention never looks
    there). keep: int64 [end - start], places of the padded rows that are events; None when the rows
    have one length and nothing is padded.
    """

    start: int
    end: int
    gather_RW: torch.Tensor
    keep: torch.Tensor | None


@dataclass(frozen=True)
class Batch:
    """Rows in ascending order of length, packed.

    inputs_N: int64 item ids. targets_N: int64, the item that follows each input, or None where only
    hidden states are wanted. lengths_B: int64. rows_N: int64, the row of each event.
    places_N: int64, place of each event in its row, from 0. groups: how attention splits the rows.
    """

    inputs_N: torch.Tensor
    targets_N: torch.Tensor | None
    lengths_B: torch.Tensor
    rows_N: torch.Tensor
    places_N: torch.Tensor
    groups: tuple[AttentionGroup, ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; copies do not block where the memory is pinned."""
        if device.type == "cpu":
            return self

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return Batch(
            inputs_N=move(self.inputs_N),
            targets_N=None if self.targets_N is None else move(self.targets_N),
            lengths_B=move(self.lengths_B),
            rows_N=move(self.rows_N),
            places_N=move(self.places_N),
            groups=tuple(
                AttentionGroup(
                    start=group.start,
                    end=group.end,
                    gather_RW=move(group.gather_RW),
                    keep=None if group.keep is None else move(group.keep),
                )
                for group in self.groups
            ),
        )


def pack(
    items: np.ndarray,
    starts_B: np.ndarray,
    lengths_B: np.ndarray,
    *,
    with_targets: bool,
) -> Batch:
    """Pack the slices items[start : start + length], each of at least one event.

    items: int32 [E]; starts_B, lengths_B: int64, lengths ascending. with_targets: whether
    items[start + 1 : start + length + 1] are the targets.
    """
    total = int(lengths_B.sum())
    first_B = np.cumsum(lengths_B) - lengths_B
    rows_N = np.repeat(np.arange(len(lengths_B)), lengths_B)
    places_N = np.arange(total) - first_B[rows_N]
    source_N = starts_B[rows_N] + places_N
    return Batch(
        inputs_N=torch.from_numpy(items[source_N].astype(np.int64)),
        targets_N=torch.from_numpy(items[source_N + 1].astype(np.int64)) if with_targets else None,
        lengths_B=torch.from_numpy(lengths_B),
        rows_N=torch.from_numpy(rows_N),
        places_N=torch.from_numpy(places_N),
        groups=tuple(_attention_groups(lengths_B, first_B)),
    )


def _attention_groups(lengths_B: np.ndarray, first_B: np.ndarray) -> Iterator[AttentionGroup]:
    """Cut ascending lengths where padding would waste more than a call to attention costs."""
    low = 0
    while low < len(lengths_B):
        longest = int(lengths_B[low]) * 5 // 4 + 1
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


def training_batch(sessions: Sessions, chosen: np.ndarray, sequence_length: int) -> Batch:
    """The last sequence_length + 1 events of each chosen session: inputs, and what follows each.

    chosen: int64 [B], sessions of at least two events.
    """
    ends = sessions.offsets[chosen + 1]
    lengths = np.minimum(ends - sessions.offsets[chosen] - 1, sequence_length)
    order = np.argsort(lengths, kind="stable")
    return pack(sessions.items, (ends - lengths - 1)[order], lengths[order], with_targets=True)


def session_order(num_sessions: int, style: str, *, seed: int, epoch: int) -> np.ndarray:
    """int64 [S]: the order in which an epoch visits the sessions, a function of seed and epoch."""
    if style == "no_shuffling":
        return np.arange(num_sessions)
    random = np.random.default_rng([seed, epoch])
    if style == "shuffle_with_replacement":
        return random.integers(num_sessions, size=num_sessions)
    return random.permutation(num_sessions)
