"""Plain implementations in the style of the originals, written from papers and behaviour.

They hold what the benchmarks compare with: batches padded to the full window, dense gradients of
every lookup of a table, top-k through the whole logit matrix, evaluation a time step at a time,
gathered embeddings of every negative. Nothing is spared, and nothing is made slow on purpose; their
speed is within 10 % of the originals' own (benchmarks/LOG.md).

Shapes: B sessions, L window, D width, K uniform negatives, M in-batch negatives of a session.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tron_cli.data.dataset import Sessions

CUTOFFS = (5, 10, 20)


@dataclass(frozen=True)
class PaddedBatch:
    """Batch of int64 ids, padded in front with 0. mask_BL: float32, 1 where there is an event."""

    inputs_BL: torch.Tensor
    targets_BL: torch.Tensor
    mask_BL: torch.Tensor
    uniform_K: torch.Tensor
    in_batch_BM: torch.Tensor


class PlainTron(nn.Module):
    """TRON as arXiv 2307.14906 describes it, with top-k sampling and shared uniform negatives."""

    def __init__(
        self,
        num_items: int,
        *,
        dim: int = 200,
        length: int = 50,
        layers: int = 2,
        dropout: float = 0.05,
        uniform: int = 16384,
        in_batch: int = 127,
        topk: int = 100,
        lr: float = 5e-4,
    ) -> None:
        super().__init__()
        self.num_items, self.dim, self.length = num_items, dim, length
        self.uniform, self.in_batch, self.topk = uniform, in_batch, topk
        self.items = nn.Embedding(num_items + 1, dim, padding_idx=0)
        self.positions = nn.Embedding(length, dim)
        nn.init.xavier_uniform_(self.items.weight)
        nn.init.xavier_uniform_(self.positions.weight)
        layer = nn.TransformerEncoderLayer(dim, 1, dim, dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(
            layer, layers, nn.LayerNorm(dim), enable_nested_tensor=False
        )
        self.dropout = nn.Dropout(dropout)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=lr)

    def collate(self, sessions: Sessions, chosen: np.ndarray) -> PaddedBatch:
        """Pad lists to tensors; draw negatives one by one until none is rejected."""
        inputs, targets, mask, ends = [], [], [], [0]
        occurrences: list[int] = []
        for session in chosen:
            clicks = sessions[session][-(self.length + 1) :].tolist()
            padding = [0] * (self.length + 1 - len(clicks))
            inputs.append(padding + clicks[:-1])
            targets.append(padding + clicks[1:])
            mask.append([0.0] * len(padding) + [1.0] * (len(clicks) - 1))
            occurrences += clicks[:-1]
            ends.append(len(occurrences))
        rejected = set(occurrences)
        uniform = []
        while len(uniform) < self.uniform:
            item = np.random.randint(1, self.num_items + 1)  # noqa: NPY002
            if item not in rejected:
                uniform.append(item)
        in_batch = [
            random.sample(occurrences[:low] + occurrences[high:], self.in_batch)
            for low, high in itertools.pairwise(ends)
        ]
        return PaddedBatch(
            torch.tensor(inputs),
            torch.tensor(targets),
            torch.tensor(mask),
            torch.tensor(uniform),
            torch.tensor(in_batch),
        )

    def forward(self, batch: PaddedBatch) -> torch.Tensor:
        """Return hidden states [B, L, D]."""
        size = len(batch.inputs_BL)
        future = torch.ones(self.length, self.length, device=batch.mask_BL.device).triu(1).bool()
        diagonal = torch.eye(self.length, dtype=torch.bool, device=future.device)
        hidden_BLL = future.repeat(size, 1, 1) | (batch.mask_BL == 0)[:, None]
        # A padded place may see itself, for a softmax over nothing is NaN.
        hidden_BLL = hidden_BLL & ~diagonal.repeat(size, 1, 1)
        x_BLD = self.items(batch.inputs_BL) * self.dim**0.5 + self.positions.weight
        return self.encoder(self.dropout(x_BLD), hidden_BLL)

    def loss(self, batch: PaddedBatch) -> torch.Tensor:
        """Return the sampled softmax over the topk highest negatives, a mean over events."""
        return self._loss(self(batch), batch)

    def _loss(self, hidden_BLD: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
        target_BLD1 = self.items(batch.targets_BL)[..., None]
        positive_BL1 = (hidden_BLD[:, :, None] @ target_BLD1).squeeze(-1)
        uniform_BLK = hidden_BLD @ self.items(batch.uniform_K).T
        in_batch_BLM = hidden_BLD @ self.items(batch.in_batch_BM).transpose(1, 2)
        negative_BLK = torch.cat([uniform_BLK, in_batch_BLM], dim=-1)
        kept_BLk = negative_BLK.topk(self.topk, dim=-1).values
        logits = torch.cat([positive_BL1, kept_BLk], dim=-1).flatten(0, 1)
        target = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        loss_BL = F.cross_entropy(logits, target, reduction="none").view_as(batch.mask_BL)
        return (loss_BL * batch.mask_BL).sum() / batch.mask_BL.sum()

    def step(self, sessions: Sessions, chosen: np.ndarray) -> None:
        """Run one training step: collate, forward, backward, dense Adam."""
        self.train()
        self.optimizer.zero_grad()
        self.loss(self.collate(sessions, chosen)).backward()
        self.optimizer.step()

    @torch.no_grad()
    def validate(
        self, batch: PaddedBatch, first_step: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return sums of hits and reciprocal ranks at CUTOFFS from top 20 lists, and the loss.

        As in the originals the loss on sampled negatives is part of validation.
        """
        self.eval()
        hidden_BLD = self(batch)
        recall, mrr = torch.zeros(len(CUTOFFS)), torch.zeros(len(CUTOFFS))
        for step in range(first_step, self.length):
            score_BI = hidden_BLD[:, step] @ self.items.weight.T
            score_BI[:, 0] = -torch.inf
            top_Bk = score_BI.topk(min(max(CUTOFFS), self.num_items), dim=-1).indices
            hit_Bk = (top_Bk == batch.targets_BL[:, step, None]) * batch.mask_BL[:, step, None]
            gain_Bk = hit_Bk / torch.arange(1, hit_Bk.shape[1] + 1)
            for place, cutoff in enumerate(CUTOFFS):
                recall[place] += hit_Bk[:, :cutoff].sum()
                mrr[place] += gain_Bk[:, :cutoff].sum()
        return recall, mrr, self._loss(hidden_BLD, batch)


class PlainGSASRec(nn.Module):
    """gSASRec as its paper and repository describe it: eventwise negatives, gBCE in float64.

    Padding is item num_items + 1, in front. Input and output tables are separate.
    """

    def __init__(
        self,
        num_items: int,
        *,
        dim: int = 128,
        length: int = 200,
        layers: int = 2,
        dropout: float = 0.5,
        negatives: int = 256,
        gbce_t: float = 0.75,
    ) -> None:
        super().__init__()
        self.num_items, self.length, self.negatives = num_items, length, negatives
        share = negatives / (num_items - 1)
        self.beta = share * (gbce_t * (1 - 1 / share) + 1 / share)
        self.items = nn.Embedding(num_items + 2, dim)
        self.outputs = nn.Embedding(num_items + 2, dim)
        self.positions = nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(_GSASRecBlock(dim, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.optimizer = torch.optim.Adam(self.parameters())

    def collate(self, sessions: Sessions, chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return int64 sequences [B, L + 1] and uniform negatives [B, L + 1, K] of every place."""
        rows = []
        for session in chosen:
            items = sessions[session][-(self.length + 1) :].tolist()
            padding = [self.num_items + 1] * (self.length + 1 - len(items))
            rows.append(torch.tensor(padding + items))
        sequences = torch.stack(rows)
        shape = (*sequences.shape, self.negatives)
        return sequences, torch.randint(1, self.num_items + 1, shape)

    def forward(self, inputs_BL: torch.Tensor) -> torch.Tensor:
        """Return hidden states [B, L, D]."""
        mask_BL1 = (inputs_BL != self.num_items + 1).float()[..., None]
        places_BL = torch.arange(self.length, device=inputs_BL.device).repeat(len(inputs_BL), 1)
        x_BLD = self.items(inputs_BL) + self.positions(places_BL)
        x_BLD = self.dropout(x_BLD) * mask_BL1
        for block in self.blocks:
            x_BLD = block(x_BLD) * mask_BL1
        return self.norm(x_BLD)

    def loss(self, sequences: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
        """Return gBCE: the positive's probability to the power beta, a mean over K + 1 terms."""
        inputs_BL, targets_BL = sequences[:, :-1], sequences[:, 1:]
        hidden_BLD = self(inputs_BL)
        ids_BL1K = torch.cat([targets_BL[..., None], negatives[:, 1:]], dim=-1)
        rows_BL1KD = self.outputs(ids_BL1K)
        logits_BL1K = torch.einsum("bld,blkd->blk", hidden_BLD, rows_BL1KD)
        labels_BL1K = torch.zeros_like(logits_BL1K)
        labels_BL1K[..., 0] = 1
        positive_BL1 = logits_BL1K[..., :1].double()
        negative_BLK = logits_BL1K[..., 1:].double()
        tiny, huge = 1e-10, torch.finfo(torch.float64).max
        probability = positive_BL1.sigmoid().clamp(tiny, 1 - tiny)
        # sigmoid(changed) = sigmoid(positive) ** beta
        odds = 1 / (probability.pow(-self.beta).clamp(1 + tiny, huge) - 1)
        changed_BL1 = odds.clamp(tiny, huge).log()
        logits_BL1K = torch.cat([changed_BL1, negative_BLK], dim=-1)
        loss_BL = F.binary_cross_entropy_with_logits(
            logits_BL1K, labels_BL1K, reduction="none"
        ).mean(-1)
        mask_BL = (inputs_BL != self.num_items + 1).float()
        # The variables of a script live until the next step assigns them.
        self._alive = (rows_BL1KD, labels_BL1K, negative_BLK, logits_BL1K)
        return (loss_BL * mask_BL).sum() / mask_BL.sum()

    def step(self, sessions: Sessions, chosen: np.ndarray) -> None:
        """Run one training step: collate, forward, backward, dense Adam."""
        loss = self.loss(*self.collate(sessions, chosen))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class _GSASRecBlock(nn.Module):
    """Block with normalized queries, plain keys and values, residual from the normalized input."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.first, self.second = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        queries_BLD = self.first_norm(x_BLD)
        scores_BLL = self.query(queries_BLD) @ self.key(x_BLD).transpose(1, 2)
        scores_BLL = scores_BLL / x_BLD.shape[-1] ** 0.5
        # Padded places are all zero, and therefore known; each mask is spread out and applied.
        length = x_BLD.shape[1]
        is_key_BLL = x_BLD.abs().sum(-1).sign()[:, None].repeat(1, length, 1)
        scores_BLL = scores_BLL.masked_fill(is_key_BLL == 0, -torch.inf)
        earlier_BLL = torch.ones_like(scores_BLL[0]).tril().repeat(len(x_BLD), 1, 1)
        scores_BLL = scores_BLL.masked_fill(earlier_BLL == 0, -torch.inf)
        weights_BLL = scores_BLL.softmax(-1).nan_to_num(0.0)
        is_query_BLL = queries_BLD.abs().sum(-1).sign()[..., None].repeat(1, 1, length)
        weights_BLL = self.dropout(weights_BLL * is_query_BLL)
        x_BLD = self.second_norm(weights_BLL @ self.value(x_BLD) + queries_BLD)
        inner_BLD = self.second(self.dropout(F.relu(self.first(x_BLD))))
        return self.dropout(inner_BLD) + x_BLD
