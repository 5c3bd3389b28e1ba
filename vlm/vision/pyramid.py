"""Convolutional towers whose stages are all features: fine detail from the first ones, meaning from the last."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.tables.base import BaseWeights
from vlm.errors import UserError
from vlm.vision.base_weights import read_pyramid
from vlm.vision.empty import empty_trunk
from vlm.vision.towers import TowerDescription, TowerFacts


@dataclass(frozen=True)
class ConvNeXtPyramid(TowerDescription):
    """A ConvNeXt of timm, its stages brought to the resolution of the first one and concatenated (Mini-Gemini, 2024).

    Attributes:
        name: timm architecture (`convnext_large_mlp` is OpenCLIP's `convnext_large_d_320`).
        image_size: pixels per side of a view; the network takes any.
        weights: folder, file or hub id with the base weights, in timm's or OpenCLIP's layout; None: new ones.
        options: further arguments of the timm constructor (`drop_path_rate`; for small towers `depths` and `dims`).
    """

    name: str
    image_size: int
    weights: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def facts(self) -> TowerFacts:
        """The tower's dimensions, found by building it on the meta device; its blocks are counted as stages."""
        with torch.device("meta"):
            return self._facts(self._trunk())

    def build(self) -> "Pyramid":
        """The tower, float[V, 3, H, W] -> float[V, P, D], features of the map row by row."""
        trunk = self._trunk()
        trunk.norm_pre = trunk.head = nn.Identity()
        return Pyramid(trunk, self._facts(trunk))

    def read_base(self, tower: nn.Module, files: WeightFiles) -> BaseWeights:
        return read_pyramid(files)

    def initialise(self, tower: nn.Module, module: nn.Module) -> None:
        """Draws the new tensors of one submodule: truncated normal for weights, layer scales as the options say."""
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif getattr(module, "gamma", None) is not None:
            nn.init.constant_(module.get_parameter("gamma"), self.options.get("ls_init_value", 1e-6))
        else:
            reset: Any = module
            reset.reset_parameters()

    def _trunk(self) -> Any:
        if not self.name.startswith("convnext") or not timm.is_model(self.name):
            raise UserError(f"{self.name!r} is no ConvNeXt of timm; see timm.list_models('convnext*')")
        return empty_trunk(self.name, num_classes=0, **self.options)

    def _facts(self, trunk: Any) -> TowerFacts:
        stride = trunk.feature_info[0]["reduction"]
        if self.image_size % stride:
            raise UserError(f"image_size {self.image_size}: must be a multiple of {stride}, the stride of {self.name}")
        grid, stages = self.image_size // stride, len(trunk.stages)
        dim = sum(stage["num_chs"] for stage in trunk.feature_info)
        return TowerFacts(dim, grid, grid * grid, self.image_size, stages, stages)


class Pyramid(nn.Module):
    """pixels float[V, 3, H, W] -> features float[V, P, D]: P = H/4 * W/4 places row by row, channels of all stages."""

    trunk: Any  # a timm module

    def __init__(self, trunk: nn.Module, facts: TowerFacts) -> None:
        super().__init__()
        self.trunk = trunk
        self.facts = facts

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.trunk.stem(pixels)
        stages = []
        for stage in self.trunk.stages:
            x = stage(x)
            stages.append(x)
        size = stages[0].shape[-2:]
        # in float32, as published: bfloat16 would round the weights of the interpolation
        maps = [stages[0], *(F.interpolate(s.float(), size=size, mode="bilinear").to(s.dtype) for s in stages[1:])]
        return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)
