"""Triton kernels behind exact ranks on CUDA: product and comparison fused, scores never written.

A coarse pass multiplies float16 copies of hidden states and embeddings on the tensor cores and
compares each sum with the score of the event's target, in registers. Items outside a proved bound
are counted; the ids of the few inside it are listed, to be scored again in float64.

float16, scaled by powers of two, has the 11 significant bits of TF32 at twice its rate and half
its traffic. 10.7M events x 1.86M items x 200 are 8e15 operations: 160 s in float32 at 50 TFLOP/s,
some 20 s in float16 at 400. With trained models 20 to 30 of 43,000 items per event lie inside the
bound, about 3e-4 * |h| * |e|; for 1,000 of 1.86M, scoring them again reads 9 TB, a few seconds.

Shapes: E events, D width of the table, K the same rounded up, I items, P (event, item) pairs.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

try:  # comes with PyTorch for CUDA
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_CAPACITY = 1 << 14  # items in doubt that can be listed per event
_BLOCK_E, _BLOCK_I, _BLOCK_K = 128, 128, 32
_BLOCK_P = 16
_WAVES = 4  # programs per multiprocessor; short programs end at about the same time
_LARGEST_EXPONENT = 8  # entries are scaled below 2^8: sums stay in range, few entries underflow

log = logging.getLogger("tron")

_has_failed = False


def usable(device: torch.device) -> bool:
    """Return True if the kernels run on `device`: Triton and NVIDIA's float16 tensor cores.

    False once `give_up` was called.
    """
    return (
        triton is not None
        and not _has_failed
        and device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def give_up(error: Exception) -> None:
    """Stop using the kernels in this process, and log why."""
    global _has_failed
    _has_failed = True
    reason = str(error).strip().partition("\n")[0][:300]
    log.warning(
        "ranks are computed without the Triton kernel, more slowly: %s: %s",
        type(error).__name__, reason,
    )  # fmt: skip


class Comparison(NamedTuple):
    """Result of the coarse pass for each event.

    ahead_E: int64, number of items that certainly score higher than the target. in_doubt_E: int64,
    number of items that may or may not, the target among them. in_doubt_EN: int32, their ids in no
    order. Where more than N are in doubt, the list is incomplete and counting ends soon after N.
    """

    ahead_E: torch.Tensor
    in_doubt_E: torch.Tensor
    in_doubt_EN: torch.Tensor


class CoarseTable:
    """A table of embeddings and its float16 copy. table: float32 [I + 1, D]; row 0 is no item."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table
        self._coarse = _coarse(table, scaled_together=True)

    def compare(self, hidden_ED: torch.Tensor, score_E: torch.Tensor) -> Comparison:
        """Compare all items with the scores of the targets.

        hidden_ED: float32; score_E: float64, exact to within D * 2^-52 * |h| * |e|.
        """
        table, events = self._coarse, _coarse(hidden_ED, scaled_together=False)
        largest_E = events.norm_N * table.norm_N.max()
        # |h.e - H.T| <= |h - H| |e| + |H| |e - T|, by Cauchy and Schwarz, with H and T the copies
        # and the norms of all four known. |H| <= |h| + |h - H|.
        bound_E = (
            events.error_N * table.norm_N.max()
            + (events.norm_N + events.error_N) * table.error_N.max()
        )
        # Products of float16 numbers are exact in float32. Tensor cores add them a few at a time,
        # cut off at the 24th bit of the largest or later (Fasi et al., Numerical behavior of NVIDIA
        # tensor cores, 2021), which costs less than 2^-22 of the sum of magnitudes per addition:
        # that is charged for each of the K terms. The norms, thresholds and float64 scores are off
        # by a few roundings, each below 2^-23 of |h| |e|.
        bound_E = (bound_E + largest_E * ((table.copy.shape[1] + 8) * 2.0**-22)) * (1 + 1e-6)
        scaled_E = score_E * events.scale_N * table.scale_N
        above_E, below_E = (scaled_E + bound_E).float(), (scaled_E - bound_E).float()
        num_events, num_items = len(hidden_ED), len(self.table) - 1
        ahead_E = torch.zeros(num_events, dtype=torch.int32, device=hidden_ED.device)
        in_doubt_E = torch.zeros_like(ahead_E)
        in_doubt_EN = ahead_E.new_empty(num_events, min(_CAPACITY, num_items))
        blocks_E, blocks_I = triton.cdiv(num_events, _BLOCK_E), triton.cdiv(num_items, _BLOCK_I)
        programs = _WAVES * _multiprocessors(hidden_ED.device)
        blocks_a_program = triton.cdiv(blocks_I, max(1, programs // blocks_E))
        grid = (blocks_E, triton.cdiv(blocks_I, blocks_a_program))
        _compare_kernel[grid](
            events.copy,
            table.copy,
            above_E,
            below_E,
            ahead_E,
            in_doubt_E,
            in_doubt_EN,
            num_events,
            num_items,
            blocks_a_program * _BLOCK_I,
            WIDTH=table.copy.shape[1],
            CAPACITY=in_doubt_EN.shape[1],
            BLOCK_E=_BLOCK_E,
            BLOCK_I=_BLOCK_I,
            BLOCK_K=_BLOCK_K,
            num_warps=8,
            num_stages=4,
            maxnreg=128,  # two programs at a time on a multiprocessor: one computes, one compares
        )
        return Comparison(ahead_E.long(), in_doubt_E.long(), in_doubt_EN)

    def pair_scores(
        self, hidden_ED: torch.Tensor, event_P: torch.Tensor, item_P: torch.Tensor
    ) -> torch.Tensor:
        """Return the scores of items for events, computed in float64: float64 [P]."""
        score_P = torch.empty(len(event_P), dtype=torch.float64, device=hidden_ED.device)
        if len(event_P):
            _pair_score_kernel[(triton.cdiv(len(event_P), _BLOCK_P),)](
                hidden_ED,
                self.table,
                event_P.contiguous(),
                item_P.contiguous(),
                score_P,
                len(event_P),
                WIDTH=self.table.shape[1],
                BLOCK_P=_BLOCK_P,
                BLOCK_D=64,
            )
        return score_P


class _Coarse(NamedTuple):
    """float16 copy [N, K] of scaled rows; norms of the scaled rows and of what the copy lacks."""

    copy: torch.Tensor
    scale_N: torch.Tensor
    norm_N: torch.Tensor
    error_N: torch.Tensor


def _coarse(rows_ND: torch.Tensor, *, scaled_together: bool) -> _Coarse:
    """Scale rows by powers of two until the largest entry is near 2^8, and round to float16."""
    width = triton.cdiv(rows_ND.shape[1], _BLOCK_K) * _BLOCK_K
    copy = rows_ND.new_zeros(len(rows_ND), width, dtype=torch.float16)
    largest_N1 = rows_ND.abs().amax(dim=1, keepdim=True).double()
    if scaled_together:
        largest_N1 = largest_N1.amax().expand(1, 1)
    exponent_N1 = _LARGEST_EXPONENT - torch.frexp(largest_N1).exponent.long()
    scale_N1 = ((exponent_N1 + 1023) << 52).view(torch.float64)  # 2^exponent, bit by bit
    norms, errors = [], []
    for low in range(0, len(rows_ND), 1 << 16):
        part = slice(low, low + (1 << 16))
        exact = rows_ND[part].double() * (scale_N1 if scaled_together else scale_N1[part])
        rounded = exact.half()
        # Hardware may or may not read numbers below the normal range as zero.
        rounded.masked_fill_(rounded.abs() < torch.finfo(torch.float16).tiny, 0)
        copy[part, : rows_ND.shape[1]] = rounded
        norms.append(exact.norm(dim=1))
        errors.append((exact - rounded.double()).norm(dim=1))
    return _Coarse(copy, scale_N1[:, 0], torch.cat(norms), torch.cat(errors))


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


if triton is not None:

    @triton.jit
    def _compare_kernel(  # type: ignore[no-untyped-def]
        hidden_ptr,
        table_ptr,
        above_ptr,
        below_ptr,
        ahead_ptr,
        in_doubt_ptr,
        listed_ptr,
        num_events,
        num_items,
        items_a_program,
        WIDTH: tl.constexpr,
        CAPACITY: tl.constexpr,
        BLOCK_E: tl.constexpr,
        BLOCK_I: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        """Compare a block of events with some items, a tile [BLOCK_E, BLOCK_I] at a time."""
        event_E = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
        is_event_E = event_E < num_events
        first = 1 + tl.program_id(1) * items_a_program
        end = tl.minimum(first + items_a_program, num_items + 1)
        above_E = tl.load(above_ptr + event_E, mask=is_event_E, other=float("inf"))
        below_E = tl.load(below_ptr + event_E, mask=is_event_E, other=float("inf"))
        k_K = tl.arange(0, BLOCK_K)
        # Rows past the end are read from the last one, and left out of the comparison.
        row_E = tl.minimum(event_E, num_events - 1) * WIDTH
        ahead_E = tl.zeros([BLOCK_E], dtype=tl.int32)
        for low in range(first, end, BLOCK_I):
            item_I = low + tl.arange(0, BLOCK_I)
            row_I = (tl.minimum(item_I, end - 1) - low) * WIDTH
            tile_ptr = table_ptr + tl.cast(low, tl.int64) * WIDTH
            score_EI = tl.zeros([BLOCK_E, BLOCK_I], dtype=tl.float32)
            for k in range(0, WIDTH, BLOCK_K):
                h_EK = tl.load(hidden_ptr + row_E[:, None] + (k + k_K)[None, :])
                e_KI = tl.load(tile_ptr + row_I[None, :] + (k + k_K)[:, None])
                score_EI = tl.dot(h_EK, e_KI, score_EI)
            is_item_I = (item_I < end)[None, :]
            higher_EI = (score_EI > above_E[:, None]) & is_item_I
            ahead_E += tl.sum(higher_EI.to(tl.int32), axis=1)
            near_EI = (score_EI >= below_E[:, None]) & (score_EI <= above_E[:, None]) & is_item_I
            near_E = tl.sum(near_EI.to(tl.int32), axis=1)
            while tl.max(near_E, axis=0) > 0:
                # The last of each row. One place per row leaves registers for two programs.
                last_E = tl.max(tl.where(near_EI, item_I[None, :], 0), axis=1)
                place_E = tl.atomic_add(in_doubt_ptr + event_E, 1, mask=near_E > 0, sem="relaxed")
                tl.store(
                    listed_ptr + event_E.to(tl.int64) * CAPACITY + place_E,
                    last_E,
                    mask=(near_E > 0) & (place_E < CAPACITY),
                )
                near_EI = near_EI & (item_I[None, :] != last_E[:, None])
                # Of a full list no more is needed: regard nothing as near that event.
                is_full_E = (near_E > 0) & (place_E >= CAPACITY)
                below_E = tl.where(is_full_E, float("inf"), below_E)
                near_E = tl.where(is_full_E, 0, near_E - 1)
        tl.atomic_add(ahead_ptr + event_E, ahead_E, mask=is_event_E)

    @triton.jit
    def _pair_score_kernel(  # type: ignore[no-untyped-def]
        hidden_ptr,
        table_ptr,
        event_ptr,
        item_ptr,
        score_ptr,
        num_pairs,
        WIDTH: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        """Compute BLOCK_P dot products of gathered rows."""
        pair_P = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        is_pair_P = pair_P < num_pairs
        row_P = tl.load(event_ptr + pair_P, mask=is_pair_P, other=0) * WIDTH
        item_row_P = tl.load(item_ptr + pair_P, mask=is_pair_P, other=0) * WIDTH
        score_P = tl.zeros([BLOCK_P], dtype=tl.float64)
        for low in range(0, WIDTH, BLOCK_D):
            d_D = low + tl.arange(0, BLOCK_D)
            mask = is_pair_P[:, None] & (d_D < WIDTH)[None, :]
            h_PD = tl.load(hidden_ptr + row_P[:, None] + d_D[None, :], mask=mask, other=0.0)
            e_PD = tl.load(table_ptr + item_row_P[:, None] + d_D[None, :], mask=mask, other=0.0)
            score_P += tl.sum(h_PD.to(tl.float64) * e_PD.to(tl.float64), axis=1)
        tl.store(score_ptr + pair_P, score_P, mask=is_pair_P)
