"""BERT4Rec: SASRec's layers in both directions, trained to fill in masked events.

Sun et al., BERT4Rec (CIKM 2019). It is trained on the batches of `feed.Cloze`; to predict, a mask
is appended to the history. A session therefore goes through the model once for every event
that is predicted, and its layers see no padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tron_cli.models.sasrec import SASRec
from tron_cli.ops.initialize import small_normal_weights
from tron_cli.ops.products import Linear


class BERT4Rec(SASRec):
    """SASRec's forms and settings, except that every event sees all of its row.

    The original's and RecBole's form is block="post-norm" with activation="gelu", a feed-forward
    network of four times the width, initialization="normal", a prediction head and an output bias.
    RecTools' is block="pre-norm" with activation="gelu", four heads and the same feed-forward
    network, without head and bias; that of arXiv 2309.07602 is the original's without both.

    prediction_head: hidden states go through a linear layer, GELU and LayerNorm before they are
    compared with items; the output bias, if there is one, then begins at zero.
    """

    causal = False
    # Only the host knows how many events of a batch are masked.
    fixed_shapes = False

    def __init__(self, *, prediction_head: bool = False, **settings: Any) -> None:
        """Build SASRec with its `settings`, and the prediction head."""
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
