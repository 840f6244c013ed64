"""MovieLens-1M in Kang's version (`user item` per line, in time order per user), leave-one-out.

gSASRec's split exactly: every user is tested on the last item, 512 drawn users validate on the
second last one and train on all but their last three; the others train on all but the last two.
With val_users "all", every user validates on the second last item and trains on those before it, as
Kang and most later papers have it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from tron_cli.data.dataset import Dataset, DatasetWriter, Sessions
from tron_cli.prepare.earlier import earlier_catalogue
from tron_cli.prepare.fetching.raw import locate
from tron_cli.prepare.filters import Steps, drop_short
from tron_cli.prepare.reading.bad_lines import BadLines
from tron_cli.prepare.reading.session_lines import read_session_lines
from tron_cli.prepare.split import (
    Splits,
    ValUsers,
    check_val_users,
    split_last_items,
    split_last_two,
)
from tron_cli.prepare.write import dataset_path, write_splits

USERS = 6040
VAL_USERS = 512
SPLIT_SEED = 42
MIN_EVENTS = 3


def prepare_ml1m(
    raw: Path | None,
    data_dir: Path,
    name: str = "ml1m",
    *,
    force: bool = False,
    val_users: ValUsers = VAL_USERS,
    skip_bad_lines: bool = False,
    catalogue: str | None = None,
) -> Dataset:
    """Prepare MovieLens-1M; items are numbered in the order of their ids, so 1..3416 stay.

    val_users: how many users gSASRec's rule draws for validation, or all.
    """
    check_val_users(val_users, USERS)
    with DatasetWriter(dataset_path(data_dir, name, raw), force=force) as writer:
        earlier = earlier_catalogue(catalogue, data_dir)
        file = locate("ml1m", raw, data_dir)["ml-1m.txt"]
        bad = BadLines(skip=skip_bad_lines)
        histories = read_session_lines(file, bad, "user-item")
        item_ids, positions = np.unique(histories.items, return_inverse=True)
        histories = replace(histories, items=positions.astype(np.int32))
        steps = Steps()
        steps.record("read", [histories], "")
        if earlier is not None:
            histories = earlier.known_histories(histories, earlier.numbers(item_ids) > 0, steps)
        histories = drop_short(histories, MIN_EVENTS)
        steps.record("short histories", [histories], f"fewer than {MIN_EVENTS} events")
        splits = _split(histories, val_users, steps)
        return write_splits(
            writer,
            [splits],
            item_ids=item_ids,
            catalogue=np.unique(splits.period.items),
            name=name,
            protocol="last-item",
            source="ml1m",
            options={
                "raw": str(raw) if raw else None,
                "val_users": val_users,
                "split_seed": None if val_users == "all" else SPLIT_SEED,
                "skip_bad_lines": skip_bad_lines,
                "catalogue": catalogue,
            },
            files=[file],
            steps=steps,
            bad=bad,
            earlier=earlier,
        )


def _split(histories: Sessions, val_users: ValUsers, steps: Steps) -> Splits:
    if val_users == "all":
        return split_last_two(histories, "all", SPLIT_SEED, steps)
    # The numbers are drawn from 0..6039 and compared with user ids, which are 1..6040.
    drawn = np.random.RandomState(SPLIT_SEED).choice(USERS, val_users, replace=False)
    assert histories.user_ids is not None
    validates = np.isin(histories.user_ids, drawn)
    return split_last_items(
        histories, np.flatnonzero(validates), steps, train_without=np.where(validates, 3, 2)
    )
