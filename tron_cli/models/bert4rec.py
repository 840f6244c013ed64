"""BERT4Rec: SASRec's layers in both directions, trained to fill in masked events.

Sun et al., BERT4Rec (CIKM 2019). It is trained on the batches of `feed.Cloze`; to predict, a mask
is put behind the history. So a session has to go through the model once for every event that is to
be predicted, and its layers see no position that is not real.
"""

from __future__ import annotations

from tron_cli.models.sasrec import SASRec


class BERT4Rec(SASRec):
    """SASRec's forms and settings, but that every event sees all of its row.

    RecTools' BERT4Rec is block="pre-norm" with activation="gelu", four heads and a feed-forward
    network of four times the width; the original's, and RecBole's, is block="post-norm" with these
    and initialization="normal".
    """

    causal = False
    # How many events of a batch are masked is known on the host only.
    fixed_shapes = False
