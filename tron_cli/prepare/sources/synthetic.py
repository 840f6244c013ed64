"""A generated shop whose transition structure, and so the best possible figures, are known.

An item is a pair (category, brand); its original id is 1000 * category + brand. A shopper walks
along related categories and compares two brands. The next item has

- one of the few categories that follow the *last* item's category, and
- the brand of the item *before* the last one (LOYALTY), or else any brand, by its share;
- but sometimes (NOISE) the shopper jumps to any item, by the shares of its category and brand.

The second item of a session has nothing before the last one: its brand is drawn by share. So the
next item depends on the last two items and on nothing else, a first-order Markov model sees half of
what matters, and the probability of every item after every prefix is a short formula. How long a
session is and when its events happen is independent of its items.

The best ranking sorts the items by that probability. Its expected figures, over the evaluated
events themselves, go into dataset.json beside the realized figures of the popularity and Markov
baselines: a model exceeds the best ones only by chance.

The shop is closed at night, so that no session spans the midnights that separate the splits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tron_cli.data.dataset import Dataset, DatasetWriter, Sessions
from tron_cli.errors import InputError, counted
from tron_cli.prepare.write import dataset_path

NUM_CATEGORIES = 100
NUM_BRANDS = 50
SUCCESSOR_PROBABILITIES = (0.35, 0.25, 0.2, 0.12, 0.08)
NUM_ON_CYCLE = 3
LOYALTY = 0.85
NOISE = 0.05
CATEGORY_SKEW = 0.6  # exponent of the Zipf law of the shares
BRAND_SKEW = 0.4

NUM_DAYS = 30
VAL_DAYS = 2
TEST_DAYS = 2
FIRST_DAY = 1_704_067_200_000  # 2024-01-01 in ms
HOUR = 3_600_000
DAY = 24 * HOUR
OPENING_HOURS = (6, 20)  # when sessions start, UTC; the longest ends before midnight
MAX_LENGTH = 51
MAX_GAP = 120_000  # ms between two events

DEPTH = 20  # ranks for which the best ranking is known

# (training sessions, sessions of a split, number of items, what `best_ranks` returns of the split)
References = Callable[[Sessions, Sessions, int, np.ndarray], dict[str, Any]]


@dataclass(frozen=True)
class Shop:
    """True transition structure. Item (category c, brand b) has the id c * num_brands + b + 1.

    successors: int [C, K], the categories that may follow each category, of probability
    SUCCESSOR_PROBABILITIES; category_share: float [C]; brand_share: float [B].
    """

    successors: np.ndarray
    category_share: np.ndarray
    brand_share: np.ndarray

    @property
    def num_items(self) -> int:
        return len(self.category_share) * len(self.brand_share)

    def next_item(self, category: int) -> np.ndarray:
        """Return the probability of each item after a last item of `category`: float64 [B + 1, I].

        Row b holds for an item of brand b before the last one, row B for a last item that is the
        first of its session. Column i - 1 is item i.
        """
        num_brands = len(self.brand_share)
        category_next = np.zeros(len(self.category_share))
        category_next[self.successors[category]] = SUCCESSOR_PROBABILITIES
        brand_next = np.tile(self.brand_share, (num_brands + 1, 1))
        brand_next[:num_brands] *= 1 - LOYALTY
        brand_next[:num_brands] += LOYALTY * np.eye(num_brands)
        walk = category_next[:, None] * brand_next[:, None, :]
        jump = self.category_share[:, None] * self.brand_share
        return ((1 - NOISE) * walk + NOISE * jump).reshape(num_brands + 1, self.num_items)


def prepare_synthetic(
    data_dir: Path,
    name: str,
    references: References,
    *,
    force: bool = False,
    seed: int = 42,
    sessions: int = 80_000,
) -> Dataset:
    """Generate the shop, its sessions and the reference figures of the validation and test splits.

    references: computes these figures, as `evaluation.reference.reference_figures` does.
    sessions: their number; the last 2 of 30 days are the test split, the 2 before validation.
    Raises InputError where the sessions are too few to show every item in training.
    """
    if sessions < 1:
        raise InputError(f"sessions must be at least 1, got {sessions}")
    writer = DatasetWriter(dataset_path(data_dir, name), force=force)
    rng = np.random.default_rng(seed)
    shop = make_shop(rng)
    data = draw_sessions(shop, sessions, rng)
    days = [0, NUM_DAYS - VAL_DAYS - TEST_DAYS, NUM_DAYS - TEST_DAYS, NUM_DAYS]
    starts = data.times[data.offsets[:-1]] if data.times is not None else np.zeros(0)
    cuts = np.searchsorted(starts, [FIRST_DAY + day * DAY for day in days])
    splits = {
        split: _rows(data, cuts[index], cuts[index + 1])
        for index, split in enumerate(("train", "val", "test"))
    }
    missing = shop.num_items - len(np.unique(splits["train"].items))
    if missing:
        raise InputError(
            f"{missing:,} of the shop's {shop.num_items:,} items never occur in the training part "
            f"of {counted(sessions, 'session')}; generate more, the default shows them all"
        )
    items = np.arange(shop.num_items)
    num_brands = len(shop.brand_share)
    with writer:
        writer.write_items(items // num_brands * 1000 + items % num_brands)
        for split, rows in splits.items():
            writer.write_split(split, [rows])
        return writer.finish(
            name=name,
            protocol="every-step",
            source="synthetic",
            options={"seed": seed, "sessions": sessions},
            sources=[],
            filters=[],
            references={
                split: references(
                    splits["train"], splits[split], shop.num_items, best_ranks(shop, splits[split])
                )
                for split in ("val", "test")
            },
        )


def next_item_probabilities(seed: int, history: np.ndarray) -> np.ndarray:
    """Return the probability of each item to be next after a history: float64 [I], entry i - 1.

    seed: that of the dataset; history: item numbers, int [n], at least one, oldest first.
    """
    shop = make_shop(np.random.default_rng(seed))
    num_brands = len(shop.brand_share)
    category, brand = np.divmod(np.asarray(history, dtype=np.int64) - 1, num_brands)
    before_last = brand[-2] if len(brand) > 1 else num_brands
    return shop.next_item(category[-1])[before_last]


def make_shop(rng: np.random.Generator) -> Shop:
    """Draw a random shop of the module's sizes."""
    category_share = rng.permutation(_zipf(NUM_CATEGORIES, CATEGORY_SKEW))
    # The likely successors follow a cycle through all categories, so that all can be reached; the
    # others are popular categories.
    cycle = rng.permutation(NUM_CATEGORIES)
    successors = np.empty((NUM_CATEGORIES, len(SUCCESSOR_PROBABILITIES)), dtype=np.int64)
    for step in range(NUM_ON_CYCLE):
        successors[cycle, step] = np.roll(cycle, -1 - step)
    for category, row in enumerate(successors):
        share = category_share.copy()
        share[[category, *row[:NUM_ON_CYCLE]]] = 0
        row[NUM_ON_CYCLE:] = rng.choice(
            NUM_CATEGORIES, len(row) - NUM_ON_CYCLE, replace=False, p=share / share.sum()
        )
    return Shop(successors, category_share, rng.permutation(_zipf(NUM_BRANDS, BRAND_SKEW)))


def draw_sessions(shop: Shop, count: int, rng: np.random.Generator) -> Sessions:
    """Draw `count` sessions of the shop, in order of their start."""
    # Log-normal: mean 7, median 5, one session in 400 longer than 50.
    lengths = 2 + rng.lognormal(1.2, 1.0, count).astype(np.int64)
    lengths = np.minimum(lengths, MAX_LENGTH)
    width = int(lengths.max(initial=0))
    categories = np.empty((count, width), dtype=np.int64)
    brands = np.empty((count, width), dtype=np.int64)
    num_categories, num_brands = len(shop.category_share), len(shop.brand_share)
    for step in range(width):
        active = np.flatnonzero(lengths > step)
        category = rng.choice(num_categories, len(active), p=shop.category_share)
        brand = rng.choice(num_brands, len(active), p=shop.brand_share)
        walks = rng.random(len(active)) >= NOISE
        if step >= 1:
            which = rng.choice(shop.successors.shape[1], len(active), p=SUCCESSOR_PROBABILITIES)
            following = shop.successors[categories[active, step - 1], which]
            category = np.where(walks, following, category)
        if step >= 2:
            loyal = walks & (rng.random(len(active)) < LOYALTY)
            brand = np.where(loyal, brands[active, step - 2], brand)
        categories[active, step] = category
        brands[active, step] = brand
    items = categories * num_brands + brands + 1

    opening, closing = OPENING_HOURS
    starts = FIRST_DAY + np.sort(
        rng.integers(0, NUM_DAYS, count) * DAY + rng.integers(opening * HOUR, closing * HOUR, count)
    )
    gaps = np.minimum(1000 + rng.exponential(25_000, (count, width)).astype(np.int64), MAX_GAP)
    gaps[:, :1] = 0
    times = starts[:, None] + np.cumsum(gaps, axis=1)
    filled = np.arange(width) < lengths[:, None]
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    return Sessions(items[filled].astype(np.int32), offsets, times[filled])


def best_ranks(shop: Shop, split: Sessions) -> np.ndarray:
    """Return the probability of a target to have rank 1, ..., DEPTH: float64 [DEPTH].

    The ranking is by true probability, and the mean is over the every-step events of the split.
    Equally probable items may be in any order, as if their scores differed by almost nothing.
    """
    num_categories, num_brands = len(shop.category_share), len(shop.brand_share)
    states = np.zeros((num_categories, num_brands + 1), dtype=np.int64)
    np.add.at(states, prefix_states(shop, split), 1)
    hits = np.zeros(DEPTH)  # expected number of events whose target is at each rank
    for category in range(num_categories):
        top = np.partition(shop.next_item(category), -DEPTH, axis=1)[:, -DEPTH:]
        hits += states[category] @ np.sort(top, axis=1)[:, ::-1]
    return hits / states.sum()


def prefix_states(shop: Shop, split: Sessions) -> tuple[np.ndarray, np.ndarray]:
    """Return the state before each every-step event, on which the item depends: two int64 [N].

    It is the category of the last item, and the brand of the one before it (num_brands: none).
    """
    num_brands = len(shop.brand_share)
    category, brand = np.divmod(np.asarray(split.items, dtype=np.int64) - 1, num_brands)
    place = np.arange(len(brand)) - np.repeat(split.offsets[:-1], split.lengths)
    targets = np.flatnonzero(place > 0)
    before_last = np.where(place[targets] > 1, brand[targets - 2], num_brands)
    return category[targets - 1], before_last


def _zipf(size: int, exponent: float) -> np.ndarray:
    share = np.arange(1, size + 1) ** -exponent
    return share / share.sum()


def _rows(data: Sessions, first: int, last: int) -> Sessions:
    begin, end = data.offsets[first], data.offsets[last]
    times = None if data.times is None else data.times[begin:end]
    return Sessions(data.items[begin:end], data.offsets[first : last + 1] - begin, times)
