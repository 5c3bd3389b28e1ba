"""Means of the loss over an epoch of validation."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlm.batch import Batch


class EpochMeans:
    """Means of the loss terms over an epoch of validation: sums and denominators of all packs of all ranks."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, losses: Mapping[str, Tensor], batch: Batch) -> None:
        for name, total in losses.items():
            # filled on the device: numbers that are sent there have the host wait until they have arrived
            share = torch.full((2,), batch.counts[name] / batch.packs, device=total.device, dtype=torch.float64)
            share[0] = total
            self.sums[name] = self.sums.get(name, 0.0) + share

    def over_ranks(self, strategy: Any, weights: Mapping[str, float]) -> dict[str, float]:
        """Each term's mean and the weighted `loss` (`with_loss`); empty without packs. Every rank has to call it."""
        means: dict[str, float] = {}
        for name, share in self.sums.items():
            total, count = strategy.reduce(share, reduce_op="sum").tolist()
            means[name] = total / count if count else 0.0
        return with_loss(means, weights) if means else {}


def with_loss(terms: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, Any]:
    """The terms and their weighted sum `loss`; it alone where a single term is all of it."""
    loss = sum((weights.get(name, 1.0) * value for name, value in terms.items()), 0.0)
    alone = len(terms) == 1 and all(weights.get(name, 1.0) == 1.0 for name in terms)
    return {**({} if alone else terms), "loss": loss}
