"""Exact ranks where the rows of the table are divided among processes.

A rank is one plus the number of other items that score at least as high as the target, in exact
arithmetic, so that it is the sum of what each process counts among its own rows.

Shapes: E events of a process, M of all, U distinct targets, D width, P (event, item) pairs.
"""

from __future__ import annotations

import functools

import torch

from tron_cli.checkpoint import Checkpoint
from tron_cli.distributed.processes import Processes
from tron_cli.distributed.tables import TableShard
from tron_cli.errors import InputError, RunError
from tron_cli.evaluation.ranking import Catalogue, SeenItems
from tron_cli.models.base import Model


class ShardedCatalogue:
    """Catalogue of a model of which each process holds some rows; see `Catalogue`.

    All processes call its methods together, each for its own events, of which it may have none.
    """

    def __init__(self, model: Model) -> None:
        """Take the rows that this process holds. Raises RunError where any is not finite."""
        assert model.shard is not None
        self._shard, self._processes = model.shard, model.shard.processes
        own_items = max(0, min(self._shard.last, model.num_items + 1) - self._shard.first)
        self._rows_vD = model.scored_rows(model.item_table.detach())[:own_items]
        # Row 0 of the whole table is no item; the first row of other parts is one.
        self._with_row_0 = self._shard.first > 0 and own_items > 0
        flaw: RunError | None = None
        largest = torch.zeros(1, dtype=torch.float64)
        try:
            rows = self._rows_vD
            self._catalogue = Catalogue(rows if own_items else rows.new_zeros(1, rows.shape[1]))
            largest = self._catalogue.largest_norm.cpu().view(1)
        except RunError as error:
            flaw = error
        (flawed,) = self._processes.any(flaw is not None)
        if flawed:
            raise flaw or RunError("the item embeddings of another process are not finite")
        self._largest_norm = self._processes.gathered(largest)[0].max().to(self._rows_vD.device)

    def ranks(
        self,
        hidden_ED: torch.Tensor,
        target_E: torch.Tensor,
        seen: SeenItems | None = None,
        limit: int | None = None,
    ) -> torch.Tensor:
        """Return the rank of each target among all items of all processes, as `Catalogue.ranks`.

        Either all processes have `seen` items, be there none of them, or no process has.
        """
        processes, shard = self._processes, self._shard
        (counts,) = processes.gathered(torch.tensor([len(target_E)]))
        end = int(counts[: processes.rank + 1].sum())
        begin = end - len(target_E)
        hidden_MD, target_M = processes.gathered(hidden_ED.float().contiguous(), target_E)
        if seen is not None:
            event_P, item_P = processes.gathered(seen.event_P + begin, seen.item_P)
            held_P = (item_P >= shard.first) & (item_P < shard.last)
            seen = SeenItems(event_P[held_P], item_P[held_P] - shard.first)
        ids_U, place_M = target_M.unique(return_inverse=True)
        rows_UD = shard.fetch(self._rows_vD, ids_U, sparse=False)
        is_held_M = (target_M >= shard.first) & (target_M < shard.last)
        ahead_M = self._catalogue.ahead_of_rows(
            hidden_MD,
            (target_M - shard.first).masked_fill(~is_held_M, -1),
            rows_UD.float()[place_M],
            self._largest_norm,
            seen,
            limit,
            with_row_0=self._with_row_0,
        )
        return 1 + processes.add_up(ahead_M)[begin:end]


def divided_model(checkpoint: Checkpoint, device: torch.device, processes: Processes) -> Model:
    """Return a network of which this process holds an equal part of the rows of item tables.

    Raises InputError for a checkpoint of which rows cannot be divided.
    """
    cure = "leave out --table-sharding"
    if checkpoint.config.is_baseline or checkpoint.networks or checkpoint.knn is not None:
        raise InputError(
            f"--table-sharding rows divides the item table of one network, and {checkpoint.path} "
            f"is {checkpoint.method}; {cure}"
        )
    if checkpoint.training:
        raise InputError(
            f"--table-sharding rows takes the best checkpoint of a run, and {checkpoint.path} is "
            "the last one; name the run's folder"
        )
    divide = functools.partial(TableShard, processes)
    model = checkpoint.build_saved_model(device, divide=divide).eval()
    if model.shard is None:
        raise InputError(
            "--table-sharding rows divides the tables of ItemTables, which "
            f"model={checkpoint.config.model} does not extend; {cure}"
        )
    return model
