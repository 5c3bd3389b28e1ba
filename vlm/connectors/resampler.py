"""A fixed number of learned queries that look at all features of a view."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm.connectors.projectors import Connector, side_of
from vlm.errors import UserError
from vlm.functional import resized, sincos_2d

_HEAD_DIM = 128


@dataclass(frozen=True)
class Resampler(Connector):
    """One layer of cross-attention from learned queries to the features (Qwen-VL, Bai et al., 2023).

    Queries and keys, not values, carry fixed 2-D positions: the queries stand on a square grid of their own, whose
    table is stretched to the grid of the features. So a view takes `num_queries` tokens at any resolution.

    Attributes:
        num_queries: a square number.
        num_heads: of the attention; None: as many as give heads of 128 channels, as published.
    """

    num_queries: int = 256
    num_heads: int | None = None

    def __post_init__(self) -> None:
        if math.isqrt(self.num_queries) ** 2 != self.num_queries:
            raise UserError(f"connector.num_queries: the queries stand on a square grid, {self.num_queries} do not")

    def build(self, in_dim: int, out_dim: int) -> "ResamplerModule":
        num_heads = self.num_heads or max(1, out_dim // _HEAD_DIM)
        if out_dim % num_heads or out_dim % 4:
            raise UserError(f"connector.num_heads: {num_heads} heads do not share out a width of {out_dim}")
        return ResamplerModule(in_dim, out_dim, num_queries=self.num_queries, num_heads=num_heads)

    def num_tokens(self, num_features: int) -> int:
        return self.num_queries

    def initialise(self, network: nn.Module, module: nn.Module) -> None:
        """Draws the new tensors that one submodule holds itself, as the published code does."""
        if module is network:
            assert isinstance(module, ResamplerModule)
            nn.init.trunc_normal_(module.query, std=0.02)
        elif isinstance(module, nn.MultiheadAttention):
            nn.init.xavier_uniform_(module.in_proj_weight)
            nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        else:
            assert isinstance(module, nn.Linear)
            if module is network.get_submodule("proj"):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            else:
                nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class ResamplerModule(nn.Module):
    """features float[V, P, in_dim] of a square map -> tokens float[V, num_queries, out_dim].

    ::

        features -> kv_proj -> norm_kv --+-> keys (+ positions of their grid)
                                         +-> values
        query -> norm_q (+ positions) --> attention -> norm_out -> proj
    """

    positions: Tensor

    def __init__(self, in_dim: int, out_dim: int, *, num_queries: int, num_heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(num_queries, out_dim))
        # a buffer: published checkpoints hold it, and no stage trains it
        self.register_buffer("positions", sincos_2d(out_dim, math.isqrt(num_queries)))
        self.kv_proj = nn.Linear(in_dim, out_dim, bias=False)
        self.norm_q = nn.LayerNorm(out_dim, eps=1e-6)
        self.norm_kv = nn.LayerNorm(out_dim, eps=1e-6)
        self.attention = nn.MultiheadAttention(out_dim, num_heads, batch_first=True)
        self.norm_out = nn.LayerNorm(out_dim, eps=1e-6)
        self.proj = nn.Linear(out_dim, out_dim, bias=False)

    def attend(self, features: Tensor) -> Tensor:
        """float[V, num_queries, out_dim]: what the queries found, before the last norm and projection."""
        values = self.norm_kv(self.kv_proj(features))
        keys = values + resized(self.positions, side_of(features.shape[1])).to(values.dtype)
        query = self.norm_q(self.query)
        query = (query + self.positions.to(query.dtype)).expand(len(features), -1, -1)
        return self.attention(query, keys, values, need_weights=False)[0]

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(self.norm_out(self.attend(features)))
