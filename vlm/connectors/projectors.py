"""Connectors that map every feature, or every 2 x 2 of them, on its own."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.errors import UserError


class Connector(ABC):
    """Description of the network between a vision tower and a language model."""

    @abstractmethod
    def build(self, in_dim: int, out_dim: int) -> nn.Module:
        """The network, float[..., in_dim] -> float[..., out_dim]; call it under `empty_weights`."""

    def num_tokens(self, num_features: int) -> int:
        """Tokens of a view that the tower sees as so many features."""
        return num_features


@dataclass(frozen=True)
class Linear(Connector):
    """One linear layer with bias (LLaVA; MiniGPT-4 and BLIP-2 behind their Q-Former)."""

    def build(self, in_dim: int, out_dim: int) -> nn.Module:
        return nn.Linear(in_dim, out_dim)


@dataclass(frozen=True)
class FlaggedLinear(Connector):
    """One linear layer with bias, and a start and an end token around each image (InternLM-XComposer, 2023).

    The two are zero as released and never trained, so they are no parameters; they take places in the row all the same.
    """

    def build(self, in_dim: int, out_dim: int) -> "FlaggedLinearModule":
        return FlaggedLinearModule(in_dim, out_dim)

    def num_tokens(self, num_features: int) -> int:
        return num_features + 2


class FlaggedLinearModule(nn.Linear):
    """float[V, Q, in_dim] -> float[V, 1 + Q + 1, out_dim]."""

    start: Tensor
    end: Tensor

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim)
        self.register_buffer("start", torch.zeros(1, 1, out_dim))
        self.register_buffer("end", torch.zeros(1, 1, out_dim))

    def forward(self, input: Tensor) -> Tensor:
        made = super().forward(input)
        start, end = (flag.to(made.dtype).expand(len(made), -1, -1) for flag in (self.start, self.end))
        return torch.cat([start, made, end], dim=1)


@dataclass(frozen=True)
class JoinedLinear(Connector):
    """`num` features of a row one behind the other as one token, through a norm without scales and one linear layer
    (MiniGPT-4 over Llama-2: its `ln_vision` is new and frozen, so it never has any).

    Attributes:
        num: features of a token.
    """

    num: int = 4

    def build(self, in_dim: int, out_dim: int) -> nn.Module:
        return JoinFeatures(in_dim, out_dim, num=self.num)

    def num_tokens(self, num_features: int) -> int:
        if num_features % self.num:
            raise UserError(
                f"connector.num: {num_features} features of a view do not make tokens of {self.num}; take a divisor"
            )
        return num_features // self.num


class JoinFeatures(nn.Linear):
    """float[V, P, D] -> float[V, P / num, out_dim]."""

    def __init__(self, in_dim: int, out_dim: int, *, num: int) -> None:
        super().__init__(num * in_dim, out_dim)
        self.num = num

    def forward(self, features: Tensor) -> Tensor:
        features = F.layer_norm(features, features.shape[-1:])  # eps 1e-5
        return super().forward(features.reshape(len(features), -1, self.in_features))  # [V, P / num, num * D]


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


@dataclass(frozen=True)
class Downsample(Connector):
    """Every 2 x 2 neighbours as one token, a quarter of the tokens (VILA, Lin et al., 2024).

    The paper's ablation is one linear layer behind the joined features. VILA-1.5 (`mlp_downsample`) has a norm before
    it and a second layer: `norm: true, depth: 2`, with the children 1, 2 and 4 of the published checkpoints.

    Attributes:
        depth: linear layers, with exact GELU between them.
        norm: a LayerNorm between the joined features and the first layer.
    """

    depth: int = 1
    norm: bool = False

    def build(self, in_dim: int, out_dim: int) -> nn.Module:
        layers: list[nn.Module] = [JoinNeighbours()]
        if self.norm:
            layers.append(nn.LayerNorm(4 * in_dim))
        layers.append(nn.Linear(4 * in_dim, out_dim))
        for _ in range(1, self.depth):
            layers += [nn.GELU(), nn.Linear(out_dim, out_dim)]
        return nn.Sequential(*layers)

    def num_tokens(self, num_features: int) -> int:
        return ((side_of(num_features) + 1) // 2) ** 2


class JoinNeighbours(nn.Module):
    """The features of a square map, 2 x 2 of them one behind the other.

    An odd side gets a row and a column of zeros at its end. As published with VILA, tokens go down the columns: the
    second one is below the first, not beside it. The four features of a token are top left, top right, bottom left,
    bottom right.

    Args:
        by_rows: tokens go along the rows (InternLM-XComposer2-4KHD).
    """

    def __init__(self, *, by_rows: bool = False) -> None:
        super().__init__()
        self.by_rows = by_rows

    def forward(self, features: Tensor) -> Tensor:
        """float[V, P, D], row by row -> float[V, ceil(side / 2) ** 2, 4 * D]."""
        side = side_of(features.shape[1])
        square = features.unflatten(1, (side, side))
        if side % 2:
            square = F.pad(square, (0, 0, 0, 1, 0, 1))
        half = square.shape[1] // 2
        pairs = square.unflatten(2, (half, 2)).unflatten(1, (half, 2))  # [V, row, 2, column, 2, D]
        order = (0, 1, 3, 2, 4, 5) if self.by_rows else (0, 3, 1, 2, 4, 5)
        return pairs.permute(order).flatten(3).flatten(1, 2)


def side_of(num_features: int) -> int:
    """Side of the square map that so many features are.

    Raises:
        UserError: they are none.
    """
    side = math.isqrt(num_features)
    if side * side != num_features:
        raise UserError(
            f"connector: {num_features} features are no square map, leave the class token "
            "out (vision.class_token: false) or use another connector"
        )
    return side


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


class Separators(nn.Module):
    """Learned features that end each row of a map, and that stand between two maps of an image (`plora_sub_GN` and
    `plora_glb_GN` of InternLM-XComposer2-4KHD, 2024). They start as zeros, as published."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.row_end = nn.Parameter(torch.empty(dim))
        self.between = nn.Parameter(torch.empty(dim))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.row_end)
        nn.init.zeros_(self.between)

    def forward(self, features: Tensor) -> Tensor:
        """float[K, D] -> float[K + 2, D]: both behind the last feature."""
        ends = torch.stack([self.row_end, self.between])
        return torch.cat([features, ends.to(features.dtype)])
