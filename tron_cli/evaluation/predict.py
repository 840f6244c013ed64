"""Exact ranks of the items that followed each history, by a model.

Shapes: R rows (histories given to the model), E predicted events, D width.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tron_cli.baselines.base import Baseline
from tron_cli.baselines.predict import predict_baseline
from tron_cli.data.batches import pack
from tron_cli.data.dataset import Sessions
from tron_cli.data.histories import (
    Histories,
    Predictions,
    collect,
    count_predicted,
    predicted_events,
    ranges,
)
from tron_cli.distributed.processes import Processes
from tron_cli.errors import RunError
from tron_cli.evaluation.boosted import BoostedCatalogue, boosted
from tron_cli.evaluation.ranking import Catalogue, SeenItems
from tron_cli.evaluation.sharded import ShardedCatalogue
from tron_cli.models.base import Model

AnyCatalogue = Catalogue | BoostedCatalogue | ShardedCatalogue

_SESSIONS_AT_ONCE = 1 << 14
_EVENTS_AT_ONCE = 1 << 12  # ranked together; more events read the table less often


@dataclass(frozen=True)
class _Rows:
    """Histories given to the model: items[start : start + length].

    The last count_R events of a row predict the events first_R, first_R + 1, ... of a block.
    """

    start_R: np.ndarray
    length_R: np.ndarray
    first_R: np.ndarray
    count_R: np.ndarray

    def __getitem__(self, index: np.ndarray) -> _Rows:
        return _Rows(
            self.start_R[index], self.length_R[index], self.first_R[index], self.count_R[index]
        )


@torch.inference_mode()
def predict(
    model: Model | Baseline,
    sessions: Sessions,
    *,
    protocol: str,
    filter_rated: bool = False,
    full_sessions: bool = False,
    one_pass: bool = False,
    top_items: int = 0,
    rank_limit: int | None = None,
    batch_size: int = 512,
    progress: str | None = None,
    share: tuple[int, int] = (0, 1),
) -> Predictions:
    """Rank the targets of `sessions` among the whole catalogue, in float32 throughout.

    protocol: every-step predicts each event of a session but the first, last-item the last one.
    Each is predicted from its own history of up to sequence_length events, exactly as in serving.
    every-step predicts the last sequence_length events of a session, or all with full_sessions.
    one_pass: predict as TRON does, in one pass over the last sequence_length + 1 events.
    filter_rated: items of the whole history before the target cannot be recommended; a target
    among them is a miss. top_items: also return that many best items of each event, or the whole
    catalogue where it has fewer.
    rank_limit: ranks up to it are exact, and larger ones need only be larger than it, which is
    enough for measures with a cutoff; large catalogues are then ranked several times as fast on the
    CPU.
    share: (rank, processes) predicts only the events of one of several processes. These are ranked
    together in one process too, so that the ranks are equal to the last digit. Where the processes
    divide the rows of tables among them, all of them predict together.
    Sessions of fewer than two events predict nothing. Raises RunError where scores are not finite.
    """
    top_items = min(top_items, model.num_items)
    if isinstance(model, Baseline):
        return predict_baseline(
            model,
            sessions,
            protocol=protocol,
            filter_rated=filter_rated,
            full_sessions=full_sessions,
            one_pass=one_pass,
            top_items=top_items,
            progress=progress,
            share=share,
        )
    check_weights(model)
    was_training = model.training
    model.eval()
    with float32_arithmetic(next(model.parameters()).device):
        catalogue = (
            Catalogue(model.scored_table()) if model.shard is None else ShardedCatalogue(model)
        )

        def predictions() -> Iterator[tuple[Histories, np.ndarray, np.ndarray | None]]:
            for histories, hidden_ED in predicted_states(
                model,
                sessions,
                protocol=protocol,
                full_sessions=full_sessions,
                one_pass=one_pass,
                batch_size=batch_size,
                share=share,
            ):
                scored: AnyCatalogue = catalogue
                if isinstance(catalogue, Catalogue):
                    scored = boosted(catalogue, model.boost, histories)
                yield (
                    histories,
                    *ranked(scored, histories, hidden_ED, filter_rated, top_items, rank_limit),
                )

        expected = count_predicted(
            sessions,
            window=model.sequence_length,
            protocol=protocol,
            full_sessions=full_sessions,
            share=share,
        )
        found = collect(predictions(), expected=expected, top_items=top_items, progress=progress)
    model.train(was_training)
    return found


def of_all_processes(own: Predictions, processes: Processes) -> Predictions:
    """Return the predictions of all shares, in order, in the first process; `own` in the others."""
    if processes.count == 1:
        return own
    columns = (own.session_E, own.event_E, own.target_E, own.rank_E)
    tensors = [torch.from_numpy(np.stack(columns, axis=1))]
    if own.top_EK is not None:
        tensors.append(torch.from_numpy(own.top_EK))
    found_E4, *tops = (each.numpy() for each in processes.to_first(*tensors))
    if not processes.is_first:
        return own
    order = np.lexsort((found_E4[:, 1], found_E4[:, 0]))
    session_E, event_E, target_E, rank_E = np.ascontiguousarray(found_E4[order].T)
    return Predictions(session_E, event_E, target_E, rank_E, tops[0][order] if tops else None)


def predicted_states(
    model: Model,
    sessions: Sessions,
    *,
    protocol: str,
    full_sessions: bool = False,
    one_pass: bool = False,
    batch_size: int,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Histories, torch.Tensor]]:
    """Yield all predicted events with the hidden states that predict them, as `hidden_states`.

    share: see `predict`.
    """
    yielded_before = 0
    for low in range(0, len(sessions), _SESSIONS_AT_ONCE):
        block = predicted_events(
            sessions,
            window=model.sequence_length,
            protocol=protocol,
            full_sessions=full_sessions,
            one_pass=one_pass,
            first=low,
            last=low + _SESSIONS_AT_ONCE,
        )
        rows = _rows(block, shared=one_pass or model.one_row_serves_all)
        together = _ranked_together(rows, batch_size)
        for number, batches in enumerate(together, start=yielded_before):
            if number % share[1] == share[0]:
                index_E, hidden_ED = _joined(_hidden(model, block, rows, batches))
                yield block[index_E], hidden_ED
        yielded_before += len(together)
    if model.shard is not None and 0 < yielded_before % share[1] <= share[0]:
        # The others still rank events, for which they need the rows that this process holds.
        index_E, hidden_ED = _joined(_hidden(model, block, rows, [np.zeros(0, dtype=np.int64)]))
        yield block[index_E], hidden_ED


def check_weights(model: Model) -> None:
    """Raise RunError for weights that are not finite.

    Checking the scores is not enough: fused attention can turn NaN into zeros.
    """
    # The smallest and the largest value are NaN if any value is.
    flawed = not all(
        bool(torch.isfinite(torch.stack(parameter.aminmax())).all())
        for parameter in model.parameters()
        if parameter.numel()
    )
    if model.shard is not None:
        (flawed,) = model.shard.processes.any(flawed)
    if flawed:
        raise RunError(
            "the model's weights hold NaN or infinite values, so nothing can be ranked; train "
            "again with a lower lr or with clip_norm"
        )


def _rows(block: Histories, *, shared: bool) -> _Rows:
    """Make one row per history, or if `shared` one for all that begin at the same place."""
    begins = np.ones(len(block), dtype=bool)
    if shared:
        begins[1:] = block.start_E[1:] != block.start_E[:-1]
    first_R = np.flatnonzero(begins)
    count_R = np.diff(first_R, append=len(block))
    start_R = block.start_E[first_R]
    return _Rows(start_R, block.position_E[first_R + count_R - 1] - start_R, first_R, count_R)


def hidden_states(
    model: Model, block: Histories, batch_size: int, *, shared: bool = False
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Yield events of a block (their numbers) with the hidden states that predict them, [E, D].

    Some thousands at a time. shared: histories that begin at the same place are parts of one row,
    whose hidden states serve them all. Call it within `float32_arithmetic`.
    """
    rows = _rows(block, shared=shared)
    for batches in _ranked_together(rows, batch_size):
        yield _joined(_hidden(model, block, rows, batches))


def _ranked_together(rows: _Rows, batch_size: int) -> list[list[np.ndarray]]:
    """Return batches of rows of similar length, in lists of at least _EVENTS_AT_ONCE events."""
    order = np.argsort(rows.length_R, kind="stable")
    together: list[list[np.ndarray]] = []
    left = 0  # events that the last list still takes
    for low in range(0, len(order), batch_size):
        batch = order[low : low + batch_size]
        if left <= 0:
            together.append([])
            left = _EVENTS_AT_ONCE
        together[-1].append(batch)
        left -= int(rows.count_R[batch].sum())
    return together


def _hidden(
    model: Model, block: Histories, rows: _Rows, batches: list[np.ndarray]
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Yield events of a block with their hidden states, batch by batch of rows."""
    device = next(model.parameters()).device
    ids_U = rows_UD = None
    if model.shard is not None:
        _, place_N = ranges(*_ends(rows[np.concatenate(batches)]))
        ids = np.unique(block.items[place_N])
        more = [] if model.mask_item is None or not len(ids) else [model.mask_item]
        ids_U = torch.from_numpy(np.append(ids, more).astype(np.int64)).to(device)
        rows_UD = model.shard.fetch(model.item_embedding.weight, ids_U, sparse=False)
    for chosen_R in batches:
        some = rows[chosen_R]
        if not len(chosen_R):
            yield chosen_R, torch.zeros(0, model.item_table.shape[1], device=device)
            continue
        batch = pack(
            block.items,
            some.start_R,
            some.length_R,
            with_targets=False,
            appended_item=model.mask_item,
        )
        end_R = np.cumsum(batch.lengths_B.numpy())
        _, index_E = ranges(some.first_R, some.first_R + some.count_R)
        _, chosen_E = ranges(end_R - some.count_R, end_R)
        batch = batch.to(device)
        if ids_U is not None:
            batch = replace(batch, inputs_N=torch.searchsorted(ids_U, batch.inputs_N))
        yield index_E, model(batch, rows_UD)[torch.from_numpy(chosen_E).to(device)]


def _ends(rows: _Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return where histories begin and end."""
    return rows.start_R, rows.start_R + rows.length_R


def _joined(
    batches: Iterable[tuple[np.ndarray, torch.Tensor]],
) -> tuple[np.ndarray, torch.Tensor]:
    """Join events and hidden states of several batches."""
    indices, states = zip(*batches, strict=True)
    return np.concatenate(indices), torch.cat(states)


def ranked(
    catalogue: AnyCatalogue,
    histories: Histories,
    hidden_ED: torch.Tensor,
    filter_rated: bool,
    top_items: int,
    rank_limit: int | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the rank of each target and, if requested, the best items of each event."""
    device = hidden_ED.device
    target_E = histories.target_E
    targets = torch.from_numpy(target_E).to(device)
    seen, missed_E = None, np.zeros(len(target_E), dtype=bool)
    if filter_rated:
        event_P, item_P = histories.seen()
        is_target = item_P == target_E[event_P]
        missed_E[event_P[is_target]] = True
        seen = SeenItems(
            torch.from_numpy(event_P[~is_target]).to(device),
            torch.from_numpy(item_P[~is_target]).to(device),
        )
    rank_E = catalogue.ranks(hidden_ED, targets, seen, rank_limit).cpu().numpy()
    rank_E[missed_E] = 0
    if not top_items or isinstance(catalogue, ShardedCatalogue):
        return rank_E, None
    if seen is not None and missed_E.any():
        # A filtered target may not appear in the list either.
        missed = torch.from_numpy(np.flatnonzero(missed_E)).to(device)
        seen = SeenItems(
            torch.cat([seen.event_P, missed]), torch.cat([seen.item_P, targets[missed]])
        )
    return rank_E, catalogue.top_items(hidden_ED, targets, top_items, seen).int().cpu().numpy()


@contextmanager
def float32_arithmetic(device: torch.device) -> Iterator[None]:
    """Turn off autocast and the shorter formats in which torch may multiply float32 numbers.

    These formats are settings of the process. They are changed only where they are on for this
    device (cuDNN's recurrent layers round to TF32 by default), by the first of the threads that are
    inside at the same time, and restored by the last.
    """
    with _without_tf32(device.type), torch.autocast(device.type, enabled=False):
        yield


class _Shared:
    """Threads inside `float32_arithmetic` for one type of device, and how to restore its flags."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.threads = 0
        self.restore: list[Callable[[], None]] = []


_SHARED = {"cpu": _Shared(), "cuda": _Shared()}


@contextmanager
def _without_tf32(device_type: str) -> Iterator[None]:
    shared = _SHARED[device_type]
    with shared.lock:
        # Also if other threads are inside: the formats may have been turned on since.
        shared.restore += _turn_off(device_type)
        shared.threads += 1
    try:
        yield
    finally:
        with shared.lock:
            shared.threads -= 1
            if not shared.threads:
                for restore in reversed(shared.restore):
                    restore()
                shared.restore = []


def _turn_off(device_type: str) -> list[Callable[[], None]]:
    """Turn off the formats that are on; return functions that restore them."""
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):  # before torch 2.9
        before = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        if before == ("highest", False):
            return []
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        return [
            lambda: torch.set_float32_matmul_precision(before[0]),
            lambda: setattr(backends.cudnn, "allow_tf32", before[1]),
        ]
    # Set one by one: torch refuses to read the flags above if operations differ.
    if device_type == "cpu":
        operations = [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    else:
        operations = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    restores: list[Callable[[], None]] = []
    for operation in operations:
        mode = operation.fp32_precision
        if mode in ("ieee", "none"):
            continue
        operation.fp32_precision = "ieee"
        restores.append(functools.partial(setattr, operation, "fp32_precision", mode))
    return restores
