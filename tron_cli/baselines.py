"""Two baselines without a model, with exact ranks over the full catalogue: popularity and Markov.

The rank of a target is 1 + the number of other items that score at least as high, as everywhere in
this project: ties count against the baseline. Ranks are counted in sorted tables, so that time and
memory grow with the events and never with events times items.

Legend: N = the predictions of a split (every event but the first of each session, in order).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tron_cli.dataset import Sessions


@dataclass(frozen=True)
class Steps:
    """The predictions of an every-step evaluation, three aligned int64 [N] arrays."""

    previous: np.ndarray  # the item before the target
    targets: np.ndarray
    sessions: np.ndarray  # index of the session, for standard errors


def every_step(split: Sessions) -> Steps:
    """Each event but the first of its session as a target, sessions in order."""
    items = np.asarray(split.items, dtype=np.int64)
    follows = np.ones(len(items), dtype=bool)
    starts = split.offsets[:-1]
    follows[starts[split.lengths > 0]] = False
    targets = np.flatnonzero(follows)
    sessions = np.repeat(np.arange(len(split)), np.maximum(split.lengths - 1, 0))
    return Steps(items[targets - 1], items[targets], sessions)


def popularity_ranks(train: Sessions, split: Sessions, num_items: int) -> np.ndarray:
    """Ranks when the items of `train` are scored by how often they occur: int64 [N]."""
    count = np.bincount(train.items, minlength=num_items + 1)
    return _items_as_popular(count)[count[every_step(split).targets]]


def markov_ranks(train: Sessions, split: Sessions, num_items: int) -> np.ndarray:
    """Ranks of a first-order Markov model: int64 [N].

    An item scores by how often it directly followed the previous item in `train`; items that did so
    equally often (never, for most) are ordered by popularity, and what is equal in both is a tie.
    """
    count = np.bincount(train.items, minlength=num_items + 1)
    observed = every_step(train)
    width = num_items + 1
    pairs, times = np.unique(observed.previous * width + observed.targets, return_counts=True)
    # Two extra entries keep the first successor of the last item and the end within the table.
    first_pair = np.searchsorted(pairs, np.arange(width + 1) * width)

    steps = every_step(split)
    wanted = steps.previous * width + steps.targets
    at = np.searchsorted(pairs, wanted)
    seen = np.zeros(len(wanted), dtype=bool)
    inside = at < len(pairs)
    seen[inside] = pairs[at[inside]] == wanted[inside]

    ranks = np.empty(len(wanted), dtype=np.int64)
    ranks[seen] = _ranks_among_successors(pairs // width, times, count[pairs % width])[at[seen]]

    # A target that never followed stands behind all successors and behind (or level with) the other
    # items that are at least as popular.
    previous = steps.previous[~seen]
    popularity = count[steps.targets[~seen]]
    span = int(count.max(initial=0)) + 1
    by_popularity = np.sort(pairs // width * span + count[pairs % width])
    less_popular = (
        np.searchsorted(by_popularity, previous * span + popularity) - first_pair[previous]
    )
    ranks[~seen] = _items_as_popular(count)[popularity] + less_popular
    return ranks


def _items_as_popular(count: np.ndarray) -> np.ndarray:
    """How many items occur at least c times, in entry c; count[0] is the padding and no item."""
    items_with = np.bincount(count[1:])
    return items_with[::-1].cumsum()[::-1]


def _ranks_among_successors(
    previous: np.ndarray, times: np.ndarray, popularity: np.ndarray
) -> np.ndarray:
    """Rank of each pair among the pairs of the same previous item; equal ones share the worst."""
    order = np.lexsort((-popularity, -times, previous))
    keys = np.stack((previous, times, popularity))[:, order]
    last = np.flatnonzero(np.append((keys[:, 1:] != keys[:, :-1]).any(axis=0), True))
    worst = np.repeat(last, np.diff(last, prepend=-1))
    first = np.searchsorted(keys[0], keys[0])
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = worst - first + 1
    return ranks
