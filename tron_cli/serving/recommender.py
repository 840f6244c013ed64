"""Recommendations after any history, by any trained model, in original item ids.

The items and their order are those of `tron evaluate --run`, except that in a run the target comes
last among items with its score.

Shapes: E histories, K places of a list, I items, C items that may be recommended.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tron_cli.baselines.base import Baseline
from tron_cli.baselines.predict import pieces
from tron_cli.baselines.ranking import Eligible, Excluded, Popularity
from tron_cli.checkpoint import Checkpoint, load_checkpoint
from tron_cli.config.plugins import add_plugin
from tron_cli.data.dataset import Sessions
from tron_cli.data.histories import Histories, latest_histories
from tron_cli.errors import InputError, counted
from tron_cli.evaluation.boosted import boosted, numbers_in
from tron_cli.evaluation.predict import check_weights, float32_arithmetic, hidden_states
from tron_cli.evaluation.ranking import Catalogue, SeenItems
from tron_cli.models.base import Model
from tron_cli.ops.device import chosen_device
from tron_cli.serving.item_lookup import ItemLookup, is_list
from tron_cli.serving.pages import release
from tron_cli.serving.similar import CosineNeighbors

ON_UNKNOWN = ("skip", "warn", "raise")
ON_EMPTY = ("popular", "raise")
_HISTORIES_AT_ONCE = 1 << 12
_PLACES_AT_ONCE = 1 << 22  # of lists

log = logging.getLogger("tron")


@dataclass(frozen=True)
class Recommendation:
    """Recommended items, best first, by their original ids, and their scores."""

    items: list[int] | list[str]
    scores: list[float]


@dataclass(frozen=True)
class Scope:
    """Items that may be recommended.

    item_C: int64, their numbers, ascending; None: all but `barred`, int64 numbers. catalogue: for a
    network, with item_C as items 1 to C. eligible: for a baseline; None: all items. num_items: the
    number of items in the scope.
    """

    item_C: np.ndarray | None
    barred: np.ndarray
    catalogue: Catalogue | None
    eligible: Eligible | None
    num_items: int


class Recommender:
    """A trained model that recommends items after histories given by original item ids.

    checkpoint: the loaded checkpoint, with `config`, `dataset`, `step` and `metrics`. num_items:
    size of the catalogue. sequence_length: number of events of a history that the model sees.
    item_ids: original ids, int64 [I] or str objects [I], entry i - 1 for item i.

    Methods may be called from several threads at the same time.

    >>> import tron_cli
    >>> recommender = tron_cli.Recommender.load("runs/first")
    >>> (found,) = recommender.recommend([[1003, 4007]], k=3, exclude=[1003])
    >>> len(found.items), 1003 in found.items, found.scores == sorted(found.scores, reverse=True)
    (3, False, True)
    >>> len(recommender.similar(1003, k=5).items)
    5
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Build the model of a checkpoint. Raises InputError or RunError where it cannot serve."""
        self.checkpoint = checkpoint
        self._device = device
        self._model: Model | Baseline = checkpoint.build_model(device, mapped=True)
        self.num_items: int = self._model.num_items
        self.sequence_length: int = self._model.sequence_length
        self.item_ids = checkpoint.decoded_item_ids()
        self.lookup = ItemLookup(self.item_ids)
        self._catalogue: Catalogue | None = None
        if not isinstance(self._model, Baseline):
            check_weights(self._model)
            self._catalogue = Catalogue(self._model.scored_table())

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        plugins: Sequence[str] = (),
    ) -> Recommender:
        """Load a .pt file, or the best checkpoint of a run folder.

        device: "auto", "cpu", "cuda" or "cuda:N". plugins: code from outside tron that the
        checkpoint needs, as for `--plugin`. Raises InputError where there is no checkpoint that can
        be used, and RunError where its weights are not finite.
        """
        if not isinstance(path, str | Path) or not str(path).strip():
            raise InputError(f"path must be the path of a checkpoint, got {path!r}")
        if isinstance(plugins, str) or not isinstance(plugins, Sequence):
            raise InputError(f"plugins must be a list, such as ['mine.py:Mean'], got {plugins!r}")
        for reference in plugins:
            add_plugin(str(reference))
        return cls(load_checkpoint(Path(path)), chosen_device(device))

    def expect_many(self) -> None:
        """Prepare for thousands of histories now, instead of while they are answered.

        Large catalogues take a few seconds for this, and a quarter of their memory: of the table
        itself, only rows that are used stay in memory. See `Catalogue.expect`.
        """
        if self._catalogue is not None and self._catalogue.expect(1 << 20):
            release(self._catalogue.table)

    def recommend(
        self,
        histories: Iterable[Sequence[int | str]],
        *,
        k: int = 20,
        filter_rated: bool | None = None,
        exclude: Iterable[int | str] = (),
        candidates: Iterable[int | str] | None = None,
        on_unknown: str = "skip",
        on_empty: str = "popular",
    ) -> list[Recommendation]:
        """Return the k best items after each history, or all if there are fewer.

        histories: lists of original item ids, oldest event first. filter_rated: never recommend
        items of the history; None: as the checkpoint's config says. exclude: items that are never
        recommended. candidates: only these are ranked. on_unknown: skip events on items that the
        model does not know, skip them and "warn", or "raise" an error. on_empty: recommend the
        items with the most training events after a history without known items ("popular"), or
        "raise" an error.

        Scores are the model's own: dot products of networks, or the scores of a baseline, which are
        0 for items that follow by popularity alone. Raises InputError for bad arguments.
        """
        self.check_options(k, filter_rated, on_unknown, on_empty)
        scope = self.scope(exclude, candidates)
        known = []
        if not is_list(histories):
            raise InputError(
                f"histories: expected a list of histories, got {type(histories).__name__}; one "
                'history is a list of item ids, such as ["a", "b"]'
            )
        for place, history in enumerate(histories):
            numbers = self.known_numbers(history, f"history {place + 1:,}", on_unknown)
            if on_empty == "raise" and not len(numbers):
                raise self.no_known_item(f"history {place + 1:,}")
            known.append(numbers)
        return self.best(known, k=k, filter_rated=filter_rated, scope=scope)

    def similar(self, item: int | str, *, k: int = 10) -> Recommendation:
        """Return the k items most similar to an item, best first, without the item itself.

        For networks the scores are cosines of input embeddings, which with a shared table also
        score items. Some baselines have a measure of their own: how often items directly followed
        (markov), the weights (ease), or the votes of sessions with the item (session_knn); they
        list no items without a score. Raises InputError for an unknown item, and for other
        baselines.
        """
        return self.similar_to(self.item_numbers([item]), k=k)[0]

    def item_numbers(self, items: Sequence[int | str]) -> np.ndarray:
        """Return the numbers of items, int64. Raises InputError for an unknown one."""
        numbers = self.lookup.numbers(items, "similar")
        if not numbers.all():
            raise InputError(
                f"{items[int(np.argmin(numbers))]!r} is not in the catalogue of "
                f"{self.checkpoint.path}; {self.looks}"
            )
        return numbers

    @property
    def looks(self) -> str:
        """A clause that shows an id of the catalogue, to compare with an unknown one."""
        return f"its {self.num_items:,} ids look like {self.lookup.ids(np.array([1]))[0]!r}"

    def similar_to(self, item_E: np.ndarray, *, k: int) -> list[Recommendation]:
        """Return the items most similar to each of the item numbers int64; see `similar`."""
        self._check_k(k)
        best_EK, score_EK, count_E = self._similar(item_E, k)
        return [
            Recommendation(self.lookup.ids(best_EK[row, :count]), score_EK[row, :count].tolist())
            for row, count in enumerate(count_E.tolist())
        ]

    def _similar(self, item_E: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return similar items and scores, both [E, K], and the number of them in each row."""
        if not isinstance(self._model, Baseline):
            with torch.inference_mode(), float32_arithmetic(self._device):
                best, cosine = self._neighbors.nearest(torch.from_numpy(item_E).to(self._device), k)
            return (
                best.cpu().numpy(),
                cosine.float().cpu().numpy(),
                np.full(len(item_E), best.shape[1]),
            )
        if not self._model.has_similar_items:
            raise InputError(
                f"model={self.checkpoint.config.model} has no measure of similar items; expected a "
                "network, or one of the baselines markov, session_knn and ease"
            )
        offsets = np.arange(len(item_E) + 1)
        block = latest_histories(Sessions(item_E.astype(np.int32), offsets), 1)
        best_EK = np.zeros((len(item_E), k), np.int64)
        score_EK = np.zeros(best_EK.shape)
        for first, last in pieces(self._model.work(block)):
            part = block[first:last]
            best_EK[first:last], score_EK[first:last] = self._model.best(
                part, excluded=Excluded(*part.seen()), limit=k
            )
        return best_EK, score_EK, np.count_nonzero((best_EK > 0) & (score_EK != 0), axis=1)

    @cached_property
    def _neighbors(self) -> CosineNeighbors:
        assert not isinstance(self._model, Baseline)
        return CosineNeighbors(self._model.compared_rows())

    def check_options(
        self, k: int, filter_rated: bool | None, on_unknown: str, on_empty: str
    ) -> None:
        """Raise InputError where an option of `recommend` is not one of its values."""
        self._check_k(k)
        if filter_rated is not None and not isinstance(filter_rated, bool | np.bool_):
            raise InputError(f"filter_rated must be True, False or None, got {filter_rated!r}")
        if not isinstance(on_unknown, str) or on_unknown not in ON_UNKNOWN:
            raise InputError(f"on_unknown must be one of {ON_UNKNOWN}, got {on_unknown!r}")
        if not isinstance(on_empty, str) or on_empty not in ON_EMPTY:
            raise InputError(f"on_empty must be one of {ON_EMPTY}, got {on_empty!r}")

    def _check_k(self, k: int) -> None:
        if not isinstance(k, int | np.integer) or isinstance(k, bool):
            raise InputError(f"k must be an integer, got {k!r}")
        if not 1 <= k <= self.num_items:
            raise InputError(
                f"k must be from 1 to {self.num_items:,}, the number of items, got {k}"
            )

    def known_numbers(self, history: Any, what: str, on_unknown: str = "skip") -> np.ndarray:
        """Return the numbers of a history's known items, int64. what: its name in errors.

        Raises InputError where it is no list of ids, or holds unknown ones and on_unknown="raise".
        """
        if isinstance(history, Iterator | Set):
            history = list(history)
        numbers = self.lookup.numbers(history, what)
        if numbers.all():
            return numbers
        if on_unknown != "skip":
            unknown = np.flatnonzero(numbers == 0)
            sentence = (
                f"{what}: {self.checkpoint.path} does not know the items of {len(unknown):,} of "
                f"{counted(len(numbers), 'event')}, the first {history[unknown[0]]!r}"
            )
            if on_unknown == "raise":
                raise InputError(f"{sentence}; leave them out, or pass on_unknown=skip")
            log.warning("%s; they are left out", sentence)
        return numbers[numbers > 0]

    def no_known_item(self, what: str) -> InputError:
        """Return the error to raise for a history that holds no known item."""
        cure = "pass on_empty=popular to recommend the most popular items instead"
        if self.checkpoint.popularity is None and not isinstance(self._model, Baseline):
            cure = "leave it out"
        return InputError(f"{what} holds no item that {self.checkpoint.path} knows; {cure}")

    def scope(
        self,
        exclude: Iterable[int | str] = (),
        candidates: Iterable[int | str] | None = None,
    ) -> Scope:
        """Return the scope of the candidates without the excluded items.

        Raises InputError where candidates are not in the catalogue; excluded items need not be.
        """
        barred = np.unique(self.lookup.numbers(exclude, "exclude"))
        barred = barred[barred > 0]
        item_C = None
        if candidates is not None:
            candidates = list(candidates) if isinstance(candidates, Iterator) else candidates
            numbers = self.lookup.numbers(candidates, "candidates")
            unknown = np.flatnonzero(numbers == 0)
            if len(unknown):
                raise InputError(
                    f"candidates: the catalogue of {self.checkpoint.path} lacks {len(unknown):,} "
                    f"of {counted(len(numbers), 'id')}, the first "
                    f"{list(candidates)[unknown[0]]!r}; leave out what it lacks"
                )
            item_C = np.setdiff1d(numbers, barred)
        num_items = self.num_items - len(barred) if item_C is None else len(item_C)
        eligible, catalogue = None, self._catalogue
        if item_C is not None and self._catalogue is not None:
            rows = torch.from_numpy(np.concatenate(([0], item_C))).to(self._device)
            catalogue = Catalogue(self._catalogue.table[rows])
        if self._catalogue is None and num_items < self.num_items:
            is_eligible_I = np.ones(self.num_items + 1, dtype=bool)
            if item_C is not None:
                is_eligible_I[:] = False
                is_eligible_I[item_C] = True
            is_eligible_I[barred] = False
            eligible = Eligible(is_eligible_I, self.popularity)
        return Scope(item_C, barred, catalogue, eligible, num_items)

    def best(
        self,
        histories: Sequence[np.ndarray],
        *,
        k: int,
        filter_rated: bool | None = None,
        scope: Scope | None = None,
    ) -> list[Recommendation]:
        """Return the k best items after each history of item numbers, int64; see `recommend`.

        After an empty history these are the most popular items.
        """
        scope = self.scope() if scope is None else scope
        if filter_rated is None:
            filter_rated = self.checkpoint.config.filter_rated
        found: list[Recommendation] = [Recommendation([], [])] * len(histories)
        if not scope.num_items:
            return found
        k = min(k, scope.num_items)
        place_E = np.flatnonzero([len(history) > 0 for history in histories])
        size = min(_HISTORIES_AT_ONCE, max(1, _PLACES_AT_ONCE // k))
        for low in range(0, len(place_E), size):
            some = place_E[low : low + size].tolist()
            rows = [histories[place] for place in some]
            offsets = np.cumsum([0, *map(len, rows)])
            sessions = Sessions(np.concatenate(rows).astype(np.int32), offsets)
            block = latest_histories(sessions, self.sequence_length)
            for index_E, top_EK, score_EK in self._ranked(block, k, filter_rated, scope):
                count_E = np.count_nonzero(top_EK, axis=1)
                ids_EK = self.item_ids[top_EK - 1]
                for row, event in enumerate(index_E.tolist()):
                    shown = slice(count_E[row])
                    found[some[event]] = Recommendation(
                        ids_EK[row, shown].tolist(), score_EK[row, shown].tolist()
                    )
        if len(place_E) < len(histories):
            popular = self._most_popular(k, scope)
            for place in np.flatnonzero([len(history) == 0 for history in histories]).tolist():
                found[place] = Recommendation([*popular], [0.0] * len(popular))
        return found

    def _ranked(
        self, block: Histories, k: int, filter_rated: bool, scope: Scope
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield indices of histories, their best items int64 [E, K], 0 for none, and the scores."""
        if isinstance(self._model, Baseline):
            for first, last in pieces(self._model.work(block)):
                part = block[first:last]
                excluded = Excluded(*part.seen()) if filter_rated else None
                yield (
                    np.arange(first, last),
                    *self._model.best(part, excluded=excluded, limit=k, eligible=scope.eligible),
                )
            return
        assert scope.catalogue is not None
        batch_size = self.checkpoint.config.eval_batch_size
        with torch.inference_mode(), float32_arithmetic(self._device):
            for index_E, hidden_ED in hidden_states(self._model, block, batch_size):
                seen = self._seen(block[index_E], scope) if filter_rated else None
                barred = None
                if scope.item_C is None and len(scope.barred):
                    barred = torch.from_numpy(scope.barred).to(self._device)
                catalogue = boosted(
                    scope.catalogue, self._model.boost, block[index_E], scope.item_C
                )
                top_EK = catalogue.top_items(hidden_ED, None, k, seen, barred)
                event_P, place_P = top_EK.nonzero(as_tuple=True)
                score_EK = hidden_ED.new_zeros(top_EK.shape)
                score_EK[event_P, place_P] = catalogue.score(
                    hidden_ED, event_P, top_EK[event_P, place_P]
                ).float()
                top = top_EK.cpu().numpy()
                if scope.item_C is not None:
                    top = np.concatenate(([0], scope.item_C))[top]
                yield index_E, top, score_EK.cpu().numpy()

    def _seen(self, histories: Histories, scope: Scope) -> SeenItems:
        """Return the items of the whole histories, by their numbers in the scope's catalogue."""
        event_P, item_P = histories.seen()
        if scope.item_C is not None:
            is_in, item_P = numbers_in(scope.item_C, item_P)
            event_P = event_P[is_in]
        return SeenItems(
            torch.from_numpy(event_P).to(self._device), torch.from_numpy(item_P).to(self._device)
        )

    @cached_property
    def popularity(self) -> Popularity:
        """Training events of each item. Raises InputError where the checkpoint has none."""
        if isinstance(self._model, Baseline):
            return self._model.popularity
        if self.checkpoint.popularity is None:
            raise InputError(
                f"{self.checkpoint.path} does not hold the popularity of items, as published files "
                "and those of early versions of tron, so that nothing can be recommended after a "
                "history without known items; leave such histories out, or train again"
            )
        return Popularity(self.checkpoint.popularity.numpy())

    def _most_popular(self, k: int, scope: Scope) -> list[int] | list[str]:
        order = self.popularity.order
        if scope.item_C is not None:
            count_C = self.popularity.count[scope.item_C]
            best = scope.item_C[np.argsort(-count_C, kind="stable")][:k]
        else:
            best = order[: k + len(scope.barred)]
            best = best[~np.isin(best, scope.barred)][:k]
        return self.lookup.ids(best)
