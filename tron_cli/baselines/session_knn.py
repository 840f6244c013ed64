"""Session-kNN in its strong form: similar training sessions vote for their items.

V-SKNN of Ludewig and Jannach, "Evaluation of Session-based Recommendation Algorithms", UMUAI 2018,
with the decay around the common item that VSTAN added to it ("Empirical Analysis of Session-based
Recommendation Algorithms", UMUAI 2021). For a history whose events are counted in steps from its
end (1: the last event; an item counts at its last event):

    sample      the knn_sample_size latest of the training sessions that share an item
    similarity  sum of w(step) over the shared items / sum over all items of the history,
                w(step) = 1 / log10(step + 0.7)
    neighbors   the knn_neighbors most similar of the sample, the latest first among equals
    score       of an item: (1 + idf) * sum over the neighbors that hold it of
                similarity / step * exp(-|place of the item - place of the common item| / 3),
                step and place being those of the latest shared item, in the history and in the
                neighbor; idf = ln(sessions / sessions with the item)

Items of the history are recommended like all others. The weights scored highest on the validation
splits of Diginetica and Yoochoose 1/64 together, first each by itself and then in combination.
Validation R@20, with 100 neighbors of 1,000 unless stated otherwise:

                                                      Diginetica   Yoochoose 1/64
    as above                                          .5164        .6954
    w of V-SKNN, linear in the place in the history   .5184        .6906
    that, without the decay around the common item    .5145        .6690
    and without idf                                   .5072        .6627
    and without 1 / step                              .5048        .6480
    as above, 200 neighbors of 2,500                  .5189        .7037
    500 neighbors of 5,000                            .5198        .7025

Dividing by the length of neighbors (cosine) lost on both. Weights that fall with the age of
sessions gained .006 on Diginetica and lost .001 on Yoochoose. Neither is used.

Shapes: E events, P (event, distinct item of its history) pairs, M matches of pairs and sessions,
N neighbors of all events, V votes of neighbors for items, C candidates.
"""

from __future__ import annotations

import numpy as np

from tron_cli.baselines.base import SparseBaseline
from tron_cli.baselines.ranking import Candidates
from tron_cli.data.dataset import Sessions
from tron_cli.data.histories import Histories, ranges

# Weights are integer multiples of 2^-28. Their sums are exact in float64 in any order, so that
# equal sums tie on every machine. With this many bits, an event, a similarity and a place in the
# sample also fit one integer to sort.
_GRID_BITS = 28
_REACH = 3.0  # places around the common item over which votes fall to 1 / e


class SessionKNN(SparseBaseline):
    """Rank items by the votes of the training sessions most similar to the history.

    knn_neighbors: sessions that vote. knn_sample_size: latest sessions that they are chosen from,
    at most a million. Training sessions must be in order of their start.
    """

    has_similar_items = True

    def __init__(
        self, *, num_items: int, sequence_length: int, knn_neighbors: int, knn_sample_size: int
    ) -> None:
        super().__init__(num_items=num_items, sequence_length=sequence_length)
        self.neighbors = knn_neighbors
        self.sample_size = knn_sample_size

    def learn(self, sessions: Sessions) -> dict[str, np.ndarray]:
        """Return the distinct items of each session: offsets int64 [S + 1], items and places int64.

        places: place of the last event of the item in its session, from 0.
        """
        session_N, place_N = ranges(np.zeros(len(sessions), dtype=np.int64), sessions.lengths)
        keys = session_N * (self.num_items + 1) + sessions.items
        # Search from the end, so that the last event of each item is found.
        keys, from_end = np.unique(keys[::-1], return_index=True)
        session_D, item_D = np.divmod(keys, self.num_items + 1)
        return {
            "offsets": np.searchsorted(session_D, np.arange(len(sessions) + 1)),
            "items": item_D,
            "places": place_N[::-1][from_end],
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        super().load_state_dict(state)
        self.offsets, self.items, self.places = state["offsets"], state["items"], state["places"]
        lengths = np.diff(self.offsets)
        self.num_sessions = len(lengths)
        self.mean_length = int(np.ceil(lengths.mean()))
        # Sessions of each item by age; age 0 is the latest session.
        order = np.argsort(self.items[::-1], kind="stable")
        self.ages = np.repeat(np.arange(self.num_sessions), lengths[::-1])[order]
        sessions_of_item = np.bincount(self.items, minlength=self.num_items + 1)
        self.age_offsets = np.concatenate(([0], np.cumsum(sessions_of_item)))
        self.idf = np.log(self.num_sessions / np.maximum(sessions_of_item, 1))

    def work(self, histories: Histories) -> np.ndarray:
        event_P, item_P, _ = histories.pairs()
        matches = np.minimum(np.diff(self.age_offsets)[item_P], self.sample_size)
        matches_E = np.bincount(event_P, weights=matches, minlength=len(histories))
        votes_E = np.minimum(matches_E, self.neighbors) * self.mean_length
        return (matches_E + votes_E).astype(np.int64) + 1

    def candidates(self, histories: Histories) -> Candidates:
        event_N, age_N, step_N, vote_N = self._neighbors(histories)
        session_N = self.num_sessions - 1 - age_N
        neighbor_V, place_V = ranges(self.offsets[session_N], self.offsets[session_N + 1])
        item_V, place_V = self.items[place_V], self.places[place_V]
        common_N = histories.items[histories.position_E[event_N] - step_N]
        is_common_V = item_V == common_N[neighbor_V]  # once in each neighbor
        distance_V = np.abs(place_V - place_V[is_common_V][neighbor_V])
        decay = np.exp(-np.arange(int(distance_V.max(initial=0)) + 1) / _REACH)
        vote_V = np.rint(vote_N[neighbor_V] * decay[distance_V])
        item_bits = self.num_items.bit_length()
        keys = (event_N << item_bits)[neighbor_V] + item_V
        order = np.argsort(keys)
        keys = keys[order]
        first = _firsts(keys)
        event_C, item_C = keys[first] >> item_bits, _low_bits(keys[first], item_bits)
        score_C = _sums(vote_V[order], first) * (1 + self.idf[item_C])
        return Candidates(_offsets(event_C, len(histories)), item_C, score_C)

    def _neighbors(
        self, histories: Histories
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return event, age, step of the latest shared item, and vote of each neighbor."""
        event_P, item_P, step_P = _last_steps(histories, self.num_items)
        steps = int(step_P.max(initial=0)) + 1
        weight_P = 1 / np.log10(step_P + 0.7)
        weight_P /= np.bincount(event_P, weight_P)[event_P]
        weight_ES = np.zeros((len(histories), steps))
        weight_ES[event_P, step_P] = np.rint(weight_P * 2.0**_GRID_BITS)

        # The latest sessions of each item include the latest of all.
        low_P = self.age_offsets[item_P]
        high_P = np.minimum(self.age_offsets[item_P + 1], low_P + self.sample_size)
        pair_M, place_M = ranges(low_P, high_P)
        step_bits, age_bits = steps.bit_length(), self.num_sessions.bit_length()
        key_P = (event_P << age_bits + step_bits) + step_P
        # Sort by event, age and step.
        keys = np.sort(key_P[pair_M] + (self.ages[place_M] << step_bits))
        first = _firsts(keys >> step_bits)
        weight_M = weight_ES[keys >> age_bits + step_bits, _low_bits(keys, step_bits)]
        similarity, keys = _sums(weight_M, first), keys[first]
        event = keys >> age_bits + step_bits
        place = _place_in_event(event, len(histories))
        sampled = place < self.sample_size
        similarity, keys, event, place = (
            each[sampled] for each in (similarity, keys, event, place)
        )

        # Sort by event, similarity and age; similarities are below 2^29.
        place_bits = int(place.max(initial=0)).bit_length()
        rest = (2 << _GRID_BITS) - similarity.astype(np.int64)
        order = np.sort((((event << _GRID_BITS + 2) + rest) << place_bits) + place)
        order = order[_place_in_event(event, len(histories)) < self.neighbors]
        begin_E = _offsets(event, len(histories))
        chosen = begin_E[order >> _GRID_BITS + 2 + place_bits] + _low_bits(order, place_bits)
        step_N = _low_bits(keys[chosen], step_bits)
        age_N = _low_bits(keys[chosen] >> step_bits, age_bits)
        return event[chosen], age_N, step_N, np.rint(similarity[chosen] / step_N)


def _last_steps(histories: Histories, num_items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return event, item and step of the last event of each distinct item of each history."""
    event_P, item_P, step_P = histories.pairs()
    keys = (event_P * (num_items + 1) + item_P)[::-1]
    keys, from_end = np.unique(keys, return_index=True)
    event_P, item_P = np.divmod(keys, num_items + 1)
    return event_P, item_P, step_P[::-1][from_end]


def _firsts(sorted_keys: np.ndarray) -> np.ndarray:
    """Return the places where runs of equal keys begin."""
    begins = np.ones(len(sorted_keys), dtype=bool)
    begins[1:] = sorted_keys[1:] != sorted_keys[:-1]
    return np.flatnonzero(begins)


def _low_bits(keys: np.ndarray, bits: int) -> np.ndarray:
    return keys & ((1 << bits) - 1)


def _sums(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Sum each group of values, given where the groups begin."""
    return np.add.reduceat(values, first) if len(first) else np.zeros(0)


def _offsets(event: np.ndarray, num_events: int) -> np.ndarray:
    """Return where each event begins in a sorted array, int64 [E + 1]."""
    return np.searchsorted(event, np.arange(num_events + 1))


def _place_in_event(event: np.ndarray, num_events: int) -> np.ndarray:
    """Number the entries of each event from 0, given sorted events."""
    return np.arange(len(event)) - _offsets(event, num_events)[event]
