"""Model + sessions -> exact ranks of the items that followed.

Shapes: R rows (histories given to the model), E predicted events, N packed events, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from tron_cli.baselines.base import Baseline
from tron_cli.baselines.predict import predict_baseline
from tron_cli.batches import pack
from tron_cli.dataset import Sessions
from tron_cli.errors import RunError
from tron_cli.events import Predictions, distinct_pairs
from tron_cli.models import Model
from tron_cli.ranking import Catalogue, SeenItems

_SESSIONS_AT_ONCE = 1 << 14
_EVENTS_AT_ONCE = 1 << 12  # ranked together: the more, the less often the table is read


@dataclass(frozen=True)
class _Rows:
    """Histories: items[start : start + length], of which places >= first_place predict."""

    session_R: np.ndarray
    start_R: np.ndarray
    length_R: np.ndarray
    first_place_R: np.ndarray

    def __getitem__(self, index: np.ndarray) -> _Rows:
        return _Rows(
            self.session_R[index],
            self.start_R[index],
            self.length_R[index],
            self.first_place_R[index],
        )


@dataclass(frozen=True)
class _Events:
    """Events to predict. position_E: int64, place of the target among all items of the split."""

    session_E: np.ndarray
    position_E: np.ndarray
    hidden_ED: torch.Tensor


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
    batch_size: int = 512,
    progress: str | None = None,
) -> Predictions:
    """Rank the targets of `sessions` among the whole catalogue, in float32 throughout.

    protocol: every-step predicts each event of a session but the first, last-item the last one.
    Each is predicted from its own history of up to sequence_length events, exactly as in serving.
    every-step predicts the last sequence_length events of a session, with full_sessions all.
    one_pass: TRON's way instead: one pass over the last sequence_length + 1 events of a session.
    filter_rated: items of the whole history before the target cannot be recommended; a target
    among them is a miss. top_items: also return that many best items of each event, or the whole
    catalogue where it has fewer.
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
        )
    # The smallest and the largest value are NaN where any is.
    if not all(
        bool(torch.isfinite(torch.stack(parameter.aminmax())).all())
        for parameter in model.parameters()
    ):
        # Not left to the scores: fused attention can turn NaN into zeros.
        raise RunError(
            "the model's weights hold NaN or infinite values; no rank can be given; train again "
            "with a lower lr or with clip_norm"
        )
    device = model.item_table.device
    was_training = model.training
    model.eval()
    parts: list[tuple[np.ndarray, ...]] = []
    with _float32_arithmetic(device):
        catalogue = Catalogue(model.item_table[: model.num_items + 1])
        bar = tqdm(
            total=_count_events(sessions, model, protocol, full_sessions),
            desc=progress,
            unit=" events",
            unit_scale=True,
            disable=None if progress else True,
        )
        batches = _batches(sessions, model, protocol, full_sessions, one_pass, batch_size)
        for events in _gathered(_hidden_states(model, sessions, rows) for rows in batches):
            parts.append(_rank(catalogue, sessions, events, filter_rated, top_items))
            bar.update(len(events.session_E))
        bar.close()
    model.train(was_training)
    return _in_order(parts, top_items)


def _count_events(sessions: Sessions, model: Model, protocol: str, full_sessions: bool) -> int:
    most = 1 if protocol == "last-item" else None if full_sessions else model.sequence_length
    return int(np.clip(sessions.lengths - 1, 0, most).sum())


def _batches(
    sessions: Sessions,
    model: Model,
    protocol: str,
    full_sessions: bool,
    one_pass: bool,
    batch_size: int,
) -> Iterator[_Rows]:
    """All histories, up to batch_size at a time, of like lengths."""
    for low in range(0, len(sessions), _SESSIONS_AT_ONCE):
        block = np.arange(low, min(low + _SESSIONS_AT_ONCE, len(sessions)))
        rows = _rows(sessions, block, model, protocol, full_sessions, one_pass)
        order = np.argsort(rows.length_R, kind="stable")
        for first in range(0, len(order), batch_size):
            yield rows[order[first : first + batch_size]]


def _rows(
    sessions: Sessions,
    block: np.ndarray,
    model: Model,
    protocol: str,
    full_sessions: bool,
    one_pass: bool,
) -> _Rows:
    begins = sessions.offsets[block]
    lengths = sessions.offsets[block + 1] - begins
    usable = lengths >= 2
    block, begins, lengths = block[usable], begins[usable], lengths[usable]
    window = model.sequence_length
    if one_pass:
        inputs = np.minimum(lengths - 1, window)
        first = inputs - 1 if protocol == "last-item" else np.zeros_like(inputs)
        return _Rows(block, begins + lengths - 1 - inputs, inputs, first)
    if protocol == "last-item":
        first_target = lengths - 1
    elif full_sessions:
        first_target = np.ones_like(lengths)
    else:
        first_target = np.maximum(lengths - window, 1)
    own_first = first_target
    shared: list[_Rows] = []
    if model.one_row_serves_all and protocol == "every-step":
        # An event's hidden state is the same whatever follows it: one row serves all targets whose
        # history begins where the session does.
        inputs = np.minimum(lengths - 1, window)
        serves = first_target <= inputs
        shared = [_Rows(block, begins, inputs, first_target - 1)[serves]]
        own_first = np.maximum(first_target, window + 1)
    count = np.maximum(lengths - own_first, 0)
    session = np.repeat(np.arange(len(block)), count)
    target = own_first[session] + np.arange(count.sum()) - (np.cumsum(count) - count)[session]
    length = np.minimum(target, window)
    own = _Rows(block[session], begins[session] + target - length, length, length - 1)
    every = [*shared, own]
    return _Rows(
        *(
            np.concatenate([getattr(rows, name) for rows in every])
            for name in ("session_R", "start_R", "length_R", "first_place_R")
        )
    )


def _hidden_states(model: Model, sessions: Sessions, rows: _Rows) -> _Events:
    """The predicting events of a batch of rows, in ascending order of length."""
    device = model.item_table.device
    mask = model.mask_item
    batch = pack(
        sessions.items, rows.start_R, rows.length_R, with_targets=False, appended_item=mask
    )
    row_N, place_N = batch.rows_N.numpy(), batch.places_N.numpy()
    # What predicts a place is the event before it, or the mask in its place.
    predicted_N = place_N + 1 if mask is None else place_N
    first_N = rows.first_place_R[row_N] + 1
    chosen = np.flatnonzero(predicted_N >= first_N)
    row_E = row_N[chosen]
    return _Events(
        session_E=rows.session_R[row_E],
        position_E=rows.start_R[row_E] + predicted_N[chosen],
        hidden_ED=model(batch.to(device))[torch.from_numpy(chosen).to(device)],
    )


def _gathered(batches: Iterable[_Events]) -> Iterator[_Events]:
    """The same events, _EVENTS_AT_ONCE or a batch more at a time."""
    waiting: list[_Events] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(events.session_E) for events in waiting) >= _EVENTS_AT_ONCE:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[_Events]) -> _Events:
    return _Events(
        np.concatenate([part.session_E for part in parts]),
        np.concatenate([part.position_E for part in parts]),
        torch.cat([part.hidden_ED for part in parts]),
    )


def _rank(
    catalogue: Catalogue, sessions: Sessions, events: _Events, filter_rated: bool, top_items: int
) -> tuple[np.ndarray, ...]:
    """Session, event, target, rank and, if asked for, the best items of each event."""
    device, hidden_ED = events.hidden_ED.device, events.hidden_ED
    session_E = events.session_E
    event_E = events.position_E - sessions.offsets[session_E]
    target_E = sessions.items[events.position_E].astype(np.int64)
    targets = torch.from_numpy(target_E).to(device)
    seen, missed_E = None, np.zeros(len(target_E), dtype=bool)
    if filter_rated:
        seen, missed_E = _seen(sessions, events.position_E - event_E, event_E, target_E, device)
    rank_E = catalogue.ranks(hidden_ED, targets, seen).cpu().numpy()
    rank_E[missed_E] = 0
    if not top_items:
        return session_E, event_E, target_E, rank_E
    if seen is not None and missed_E.any():
        # A filtered target may not come up in the list either.
        missed = torch.from_numpy(np.flatnonzero(missed_E)).to(device)
        seen = SeenItems(
            torch.cat([seen.event_P, missed]), torch.cat([seen.item_P, targets[missed]])
        )
    top_EK = catalogue.top_items(hidden_ED, targets, top_items, seen).int().cpu().numpy()
    return session_E, event_E, target_E, rank_E, top_EK


def _seen(
    sessions: Sessions,
    begin_E: np.ndarray,
    length_E: np.ndarray,
    target_E: np.ndarray,
    device: torch.device,
) -> tuple[SeenItems, np.ndarray]:
    """The distinct items of each history but the target, and which targets are among them."""
    event_P = np.repeat(np.arange(len(begin_E)), length_E)
    place_P = np.arange(length_E.sum()) - (np.cumsum(length_E) - length_E)[event_P]
    item_P = sessions.items[begin_E[event_P] + place_P].astype(np.int64)
    event_P, item_P = distinct_pairs(event_P, item_P)
    is_target = item_P == target_E[event_P]
    missed_E = np.zeros(len(begin_E), dtype=bool)
    missed_E[event_P[is_target]] = True
    seen = SeenItems(
        torch.from_numpy(event_P[~is_target]).to(device),
        torch.from_numpy(item_P[~is_target]).to(device),
    )
    return seen, missed_E


def _in_order(parts: list[tuple[np.ndarray, ...]], top_items: int) -> Predictions:
    if not parts:
        empty = np.zeros(0, dtype=np.int64)
        return Predictions(
            empty, empty, empty, empty, np.zeros((0, top_items), np.int32) if top_items else None
        )
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    order = np.lexsort((columns[1], columns[0]))
    session_E, event_E, target_E, rank_E, *top = (column[order] for column in columns)
    return Predictions(session_E, event_E, target_E, rank_E, top[0] if top else None)


@contextmanager
def _float32_arithmetic(device: torch.device) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
