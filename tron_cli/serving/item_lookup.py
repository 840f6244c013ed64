"""Items by original id: their numbers, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from tron_cli.errors import InputError

_DECIMAL = re.compile(r"(?:0|-?[1-9][0-9]{0,18})(?:\.0)?")  # pandas writes 5.0 beside NaN
_LOWEST, _HIGHEST = -(1 << 63), (1 << 63) - 1


class ItemLookup:
    """Numbers of items by original id.

    A catalogue of integers also knows them as decimal text, "5" or "5.0"; one of text also knows
    integers, as their decimal text.
    """

    def __init__(self, item_ids: np.ndarray) -> None:
        """Index the original ids: int64 [I] or str objects [I], entry i - 1 for item i."""
        self.item_ids = item_ids
        self.is_text = item_ids.dtype == object
        if self.is_text:
            self._number_of = {item: number for number, item in enumerate(item_ids, start=1)}
        else:
            # A dictionary of millions of integers would take more memory than their embeddings.
            self._order = np.argsort(item_ids, kind="stable")
            self._sorted_ids = item_ids[self._order]

    def numbers(self, ids: Iterable[Any], what: str) -> np.ndarray:
        """Return the number of each item, int64 [n]; 0 where the catalogue lacks it.

        what: name of the ids in errors. Raises InputError where they are no list of ids.
        """
        if not is_list(ids):
            raise InputError(
                f"{what}: expected a list of item ids, got {_shown(ids)}; one history is a list, "
                'such as ["a", "b"]'
            )
        values = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        for place, value in enumerate(values):
            if type(value) is not str and type(value) is not int:
                values[place] = _plain(value, what, place)
        if self.is_text:
            number_of = self._number_of
            return np.array([number_of.get(str(value), 0) for value in values], np.int64)
        return self._numbers_of_integers(values)

    def _numbers_of_integers(self, values: list[int | str]) -> np.ndarray:
        is_id = np.ones(len(values), dtype=bool)
        integers = np.zeros(len(values), dtype=np.int64)
        for place, value in enumerate(values):
            if isinstance(value, str):
                if not _DECIMAL.fullmatch(value):
                    is_id[place] = False
                    continue
                value = int(value.removesuffix(".0"))
            if _LOWEST <= value <= _HIGHEST:
                integers[place] = value
            else:
                is_id[place] = False
        at = np.searchsorted(self._sorted_ids, integers).clip(max=len(self._sorted_ids) - 1)
        found = is_id & (self._sorted_ids[at] == integers)
        return np.where(found, self._order[at] + 1, 0)

    def ids(self, numbers: np.ndarray) -> list[int] | list[str]:
        """Return the original ids of items, given their numbers."""
        return self.item_ids[numbers - 1].tolist()


def is_list(values: Any) -> bool:
    """Return True for what can be iterated over, but is not passed by mistake, as text is."""
    if isinstance(values, str | bytes | dict) or not isinstance(values, Iterable):
        return False
    return not isinstance(values, np.ndarray) or values.ndim > 0


def _plain(value: Any, what: str, place: int) -> int | str:
    """Return an id as int or str. Raises InputError for other types."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    raise InputError(
        f"{what}: expected item ids that are text or integers, got {_shown(value)} at place "
        f"{place + 1:,}"
    )


def _shown(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{text} ({type(value).__name__})"
