"""Random tables, drawn by all threads at once.

Each stretch of a table has a generator of its own, seeded from torch's default generator: the
numbers depend on the state of that one alone, and not on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

_NUMBERS_AT_ONCE = 1 << 22
_SMALL = 0.02  # standard deviation


def xavier_uniform(rows: int, columns: int) -> torch.Tensor:
    """Draw [rows, columns] from the distribution of nn.init.xavier_uniform_."""
    bound = math.sqrt(6 / (rows + columns))
    return _drawn(
        rows, columns, lambda part, source: part.uniform_(-bound, bound, generator=source)
    )


def standard_normal(rows: int, columns: int) -> torch.Tensor:
    """Draw [rows, columns] from N(0, 1)."""
    return _drawn(rows, columns, lambda part, source: part.normal_(generator=source))


def small_normal(rows: int, columns: int) -> torch.Tensor:
    """Draw [rows, columns] from N(0, 0.02), RecBole's choice after BERT's."""
    return standard_normal(rows, columns).mul_(_SMALL)


def small_normal_weights(module: nn.Module) -> None:
    """Draw the matrix of a linear layer from N(0, 0.02) and set its bias to zero; skip others."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=_SMALL)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _drawn(
    rows: int, columns: int, draw: Callable[[torch.Tensor, torch.Generator], torch.Tensor]
) -> torch.Tensor:
    table = torch.empty(rows, columns)
    if table.is_meta:
        return table
    parts = table.view(-1).split(_NUMBERS_AT_ONCE)
    # Neighbouring seeds, so that no two are equal; torch's generator distinguishes 2**32 of them.
    first = int(torch.randint(1 << 32, ()))

    def fill(number: int) -> None:
        draw(parts[number], torch.Generator().manual_seed((first + number) % (1 << 32)))

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(fill, range(len(parts))))
    return table
