"""Ranks by brute force."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch

from tron_cli.evaluation.ranking import Catalogue, SeenItems


def exact_scores(hidden: torch.Tensor, table: torch.Tensor) -> list[list[Fraction]]:
    """Dot products of float32 numbers without any rounding; entry 0 is no item."""
    rows = [[Fraction(value) for value in row] for row in table.double().tolist()]
    return [
        [
            sum((Fraction(h) * e for h, e in zip(state, row, strict=True)), Fraction())
            for row in rows
        ]
        for state in hidden.double().tolist()
    ]


def sorted_list(scores: list[Fraction], target: int, seen: set[int]) -> list[int]:
    """All eligible items best first; the target behind its equals, the others by id."""
    eligible = [item for item in range(1, len(scores)) if item not in seen - {target}]
    return sorted(eligible, key=lambda item: (-scores[item], item == target, item))


def as_seen(seen: list[set[int]], targets: list[int], device: torch.device) -> SeenItems:
    pairs = [(e, i) for e, items in enumerate(seen) for i in sorted(items - {targets[e]})]
    columns = torch.tensor(pairs, dtype=torch.int64, device=device).reshape(-1, 2)
    return SeenItems(columns[:, 0], columns[:, 1])


def check(
    hidden: torch.Tensor,
    table: torch.Tensor,
    targets: list[int],
    seen: list[set[int]] | None = None,
    limit: int = 5,
) -> None:
    """`ranks` and `top_items` against the sorted list."""
    scores = exact_scores(hidden, table)
    catalogue = Catalogue(table)
    seen_items = as_seen(seen, targets, hidden.device) if seen is not None else None
    target_E = torch.tensor(targets, dtype=torch.int64, device=hidden.device)
    ranks = catalogue.ranks(hidden, target_E, seen_items).tolist()
    up_to_limit = catalogue.ranks(hidden, target_E, seen_items, limit=limit).tolist()
    top = catalogue.top_items(hidden, target_E, limit, seen_items).tolist()
    for event, target in enumerate(targets):
        best = sorted_list(scores[event], target, seen[event] if seen else set())
        assert ranks[event] == 1 + best.index(target)
        assert min(up_to_limit[event], limit + 1) == min(ranks[event], limit + 1)
        assert top[event] == (best + [0] * limit)[:limit]


def with_ties(rng: np.random.Generator, num_items: int, dim: int) -> torch.Tensor:
    """A table in which rows repeat, some are zero, and some differ in the last bit."""
    table = torch.from_numpy(rng.standard_normal((num_items + 1, dim)).astype(np.float32))
    for item in range(1, num_items + 1):
        kind = rng.integers(5)
        other = int(rng.integers(1, num_items + 1))
        if kind == 0:
            table[item] = table[other]
        elif kind == 1:
            table[item] = 0
        elif kind == 2:
            table[item] = torch.nextafter(table[other], torch.full((dim,), torch.inf))
    return table
