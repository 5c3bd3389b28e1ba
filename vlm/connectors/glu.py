"""A gated MLP between a learned start and end of an image."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.connectors.projectors import Connector


@dataclass(frozen=True)
class GLU(Connector):
    """One linear layer, a norm and GELU before a gated MLP as in a layer of Llama (CogVLM, Wang et al., 2023).

    Attributes:
        hidden_dim: width of the gated MLP, as published that of the language model's.
    """

    hidden_dim: int = 11008

    def build(self, in_dim: int, out_dim: int) -> "GLUModule":
        return GLUModule(in_dim, self.hidden_dim, out_dim)

    def num_tokens(self, num_features: int) -> int:
        return num_features + 2


class GLUModule(nn.Module):
    """features float[V, P, in_dim] -> tokens float[V, 1 + P + 1, out_dim].

    ::

        features -> linear -> norm -> GELU -> down(silu(gate) * up) -> between `start` and `end`
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.empty(1, 1, out_dim))
        self.linear = nn.Linear(in_dim, out_dim, bias=False)
        self.norm = nn.LayerNorm(out_dim)
        self.gate_proj = nn.Linear(out_dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(out_dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, out_dim, bias=False)
        self.end = nn.Parameter(torch.empty(1, 1, out_dim))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.start)
        nn.init.zeros_(self.end)

    def forward(self, features: Tensor) -> Tensor:
        hidden = F.gelu(self.norm(self.linear(features)))
        made = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))  # [V, P, out_dim]
        start, end = (mark.to(made.dtype).expand(len(made), -1, -1) for mark in (self.start, self.end))
        return torch.cat([start, made, end], dim=1)
