"""Shares of a batch: each of several processes computes the gradients of some of its rows.

Shapes: N events of the whole batch, n of the share, R rows of an attention group, W its width.
"""

from __future__ import annotations

import torch

from tron_cli.data.batches import AttentionGroup, Batch, Share


def share_of(batch: Batch, rank: int, processes: int) -> Batch:
    """Return the rows rank, rank + processes, ... of a batch on the CPU, with its groups.

    Rows stand in order of length, so shares have about the same numbers of events. A process for
    which no row is left has the first one, which does not count. The batch must not be padded.
    """
    assert batch.targets_N is not None
    num_rows = len(batch.lengths_B)
    counts = rank < num_rows
    rows_B = torch.arange(rank if counts else 0, num_rows if counts else 1, processes)
    place_of_row = torch.full((num_rows,), -1).index_copy_(0, rows_B, torch.arange(len(rows_B)))
    row_of_event_N = place_of_row[batch.rows_N]
    events_N = (row_of_event_N >= 0).nonzero()[:, 0]
    place_of_event = torch.full((len(batch.rows_N),), -1)
    place_of_event[events_N] = torch.arange(len(events_N))
    predicting_P, targets_P = None, events_N
    if batch.predicting_P is not None:
        predicting_P = place_of_event[batch.predicting_P]
        targets_P = (predicting_P >= 0).nonzero()[:, 0]
        predicting_P = predicting_P[targets_P]
    return Batch(
        inputs_N=batch.inputs_N[events_N],
        targets_N=batch.targets_N[targets_P],
        predicting_P=predicting_P,
        lengths_B=batch.lengths_B[rows_B],
        rows_N=row_of_event_N[events_N],
        places_N=batch.places_N[events_N],
        lanes_B=None if batch.lanes_B is None else batch.lanes_B[rows_B],
        groups=_groups(batch, place_of_row, place_of_event),
        share=Share(batch, rows_B, events_N, targets_P, counts),
    )


def _groups(
    batch: Batch, place_of_row: torch.Tensor, place_of_event: torch.Tensor
) -> tuple[AttentionGroup, ...]:
    """Return the groups of the whole batch, each with the rows of the share, as wide as before."""
    groups, first_row, start = [], 0, 0
    for group in batch.groups:
        num_rows, width = group.gather_RW.shape
        own = slice(first_row, first_row + num_rows)
        rows_R = (place_of_row[own] >= 0).nonzero()[:, 0]
        length_R = batch.lengths_B[own][rows_R]
        end = start + int(length_R.sum())
        keep = None
        if group.keep is not None:
            keep = (torch.arange(width) < length_R[:, None]).flatten().nonzero()[:, 0]
        gather_RW = place_of_event[group.gather_RW[rows_R]]
        groups.append(AttentionGroup(start, end, gather_RW, keep, (num_rows, rows_R)))
        first_row, start = first_row + num_rows, end
    return tuple(groups)
