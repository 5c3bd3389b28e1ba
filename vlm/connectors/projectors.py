"""Connectors that map every feature on its own."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Connector(ABC):
    """Description of the network between a vision tower and a language model."""

    @abstractmethod
    def build(self, in_dim: int, out_dim: int) -> nn.Module:
        """The network, float[..., in_dim] -> float[..., out_dim]; call it under `vlm.building.empty_weights`."""


@dataclass(frozen=True)
class Linear(Connector):
    """One linear layer with bias (LLaVA; MiniGPT-4 and BLIP-2 behind their Q-Former)."""

    def build(self, in_dim: int, out_dim: int) -> nn.Module:
        return nn.Linear(in_dim, out_dim)


@dataclass(frozen=True)
class MLP(Connector):
    """`depth` linear layers with exact GELU between them (LLaVA-1.5, `mlp2x_gelu`, Improved Baselines with Visual
    Instruction Tuning, 2023). The layers are children 0, 2, 4, ... as in the published checkpoints."""

    depth: int = 2

    def build(self, in_dim: int, out_dim: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Linear(in_dim, out_dim)]
        for _ in range(1, self.depth):
            layers += [nn.GELU(), nn.Linear(out_dim, out_dim)]
        return nn.Sequential(*layers)


class Newline(nn.Module):
    """A learned token that ends each row of a map of features (`image_newline` of LLaVA-NeXT, 2024)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[0] ** -0.5)

    def forward(self, features: Tensor) -> Tensor:
        """float[K, D] -> float[K + 1, D]: the token behind the last feature."""
        return torch.cat([features, self.weight[None].to(features.dtype)])
