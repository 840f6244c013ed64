"""BERT4Rec: SASRec's layers in both directions, trained to fill in masked events.

Sun et al., BERT4Rec (CIKM 2019). It is trained on the batches of `feed.Cloze`; to predict, a mask
is put behind the history. So a session has to go through the model once for every event that is to
be predicted, and its layers see no position that is not real.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tron_cli.models.sasrec import SASRec
from tron_cli.ops.initialize import small_normal_weights
from tron_cli.ops.products import Linear


class BERT4Rec(SASRec):
    """SASRec's forms and settings, but that every event sees all of its row.

    The original's, and RecBole's, is block="post-norm" with activation="gelu", a feed-forward
    network of four times the width and initialization="normal", and before the scores a prediction
    head, to which an output bias belongs. RecTools' is block="pre-norm" with activation="gelu",
    four heads and the same feed-forward network, without either; that of arXiv 2309.07602 is the
    original's without either.

    prediction_head: hidden states go through a linear layer, GELU and LayerNorm before they are
    compared with items; the output bias, if there is one, then begins at zero.
    """

    causal = False
    # How many events of a batch are masked is known on the host only.
    fixed_shapes = False

    def __init__(self, *, prediction_head: bool = False, **settings: Any) -> None:
        """settings: those of SASRec."""
        super().__init__(**settings)
        if not prediction_head:
            return
        dim = self.embedding_dim
        head = nn.Sequential(Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim, eps=1e-12))
        if settings.get("initialization") == "normal":
            head.apply(small_normal_weights)
        self.norm = nn.Sequential(self.norm, head)
        with torch.no_grad():
            self.item_table[:, dim:] = 0.0
