"""Several networks as one, which scores items by the mean of their scores.

Shapes: N packed events, D sum of the widths of the networks' hidden states, I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from tron_cli.models.base import Model
from tron_cli.ops.unit_rows import unit_rows

if TYPE_CHECKING:
    from tron_cli.data.batches import Batch


class MixedNetworks(Model):
    """Trained networks side by side.

    Hidden states, each divided by the number of networks, and item tables are concatenated, so that
    a score is the mean of the networks' scores: the logarithm of the geometric mean of their
    softmax probabilities, but for a constant. All ranking and serving of a single network holds.
    """

    def __init__(self, networks: Sequence[Model]) -> None:
        """Join networks with the same items, sequence_length and mask_item."""
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self._parts = tuple(networks)
        first = networks[0]
        self.num_items = first.num_items
        self.sequence_length = first.sequence_length
        self.mask_item = first.mask_item
        self.one_row_serves_all = all(network.one_row_serves_all for network in networks)

    def forward(self, batch: Batch, rows_UD: torch.Tensor | None = None) -> torch.Tensor:
        """Return hidden states [N, D]. rows_UD: not supported, since nothing trains a mix."""
        assert rows_UD is None
        return torch.cat([network(batch) / len(self._parts) for network in self._parts], dim=1)

    def scored_table(self) -> torch.Tensor:
        return torch.cat([network.scored_table() for network in self._parts], dim=1)

    def compared_rows(self) -> torch.Tensor:
        """Return the networks' rows, each scaled to a length of one: the mean of their cosines."""
        return torch.cat([unit_rows(each.compared_rows()) for each in self._parts], dim=1)
