"""Vision towers from timm, built with only the blocks whose output is used."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from vlm.checkpoints.files.weights import WeightFiles
from vlm.checkpoints.tables.base import BaseWeights
from vlm.errors import UserError
from vlm.functional import resized
from vlm.vision.base_weights import read_transformer
from vlm.vision.empty import empty_trunk
from vlm.vision.feature_files import FeatureFiles


@dataclass(frozen=True)
class TowerFacts:
    """What the rest of a system asks of its tower.

    Attributes:
        dim: width D of a feature.
        grid: patches per side of a view.
        num_tokens: features per view, class token included where it is kept.
        image_size: pixels per side of a view.
        num_blocks: blocks that are built.
        depth: blocks of the published network; those above `num_blocks` are carried by converters.
    """

    dim: int
    grid: int
    num_tokens: int
    image_size: int
    num_blocks: int
    depth: int


class TowerDescription(ABC):
    """Description of a vision tower.

    Attributes:
        weights: folder, file or hub id with the base weights; None: new ones.
    """

    weights: str | None

    @abstractmethod
    def facts(self) -> TowerFacts:
        """The tower's dimensions; no weights are made."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The tower, float[V, 3, H, W] -> float[V, P, D]; call it under `vlm.building.network.empty_weights`."""

    @abstractmethod
    def read_base(self, tower: nn.Module, files: WeightFiles) -> BaseWeights:
        """Finds the tower's tensors in the files of `weights`.

        Raises:
            UserError: the files hold something else.
        """

    @abstractmethod
    def initialise(self, tower: nn.Module, module: nn.Module) -> None:
        """Draws the new tensors that one submodule of a built tower holds itself."""


@dataclass(frozen=True)
class TimmTower(TowerDescription):
    """A timm vision transformer.

    Attributes:
        name: timm architecture (`vit_large_patch14_clip_quickgelu_336`: the CLIP towers of OpenAI need `quickgelu`).
        layer: which hidden state is the feature, counted as the papers do: -1 after the last block, -2 after the one
            before it. Blocks above it are not built.
        class_token: keep the class token as the first feature.
        final_norm: apply the network's last normalisation (BLIP); needs `layer: -1`.
        weights: folder, file or hub id with the base weights, in timm's or Hugging Face CLIP's layout; None: new ones.
        options: further arguments of the timm constructor (`img_size`, and for small towers `depth`, `embed_dim`, ...).
        position_grid: side of the table of positions, which is stretched to the patches of a view in each forward pass
            (Qwen-VL: 16, at 224 and at 448 px); None: a table with a place for every patch.
        norm_eps: of every LayerNorm, where it is not the architecture's own.
        checkpointing: recompute each block's activations in the backward pass; n: those of every n-th block.
    """

    name: str
    layer: int = -1
    class_token: bool = False
    final_norm: bool = False
    weights: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    checkpointing: bool | int = False
    position_grid: int | None = None
    norm_eps: float | None = None

    def facts(self) -> TowerFacts:
        """The tower's dimensions, found by building it on the meta device."""
        with torch.device("meta"):
            trunk = self._trunk()
        return self._facts(trunk)

    def build(self) -> "Tower":
        """The tower; call it under `vlm.building.network.empty_weights`."""
        trunk = self._trunk()
        facts = self._facts(trunk)
        trunk.prune_intermediate_layers([facts.num_blocks - 1], prune_norm=not self.final_norm, prune_head=True)
        if self.position_grid is None:
            return Tower(trunk, facts, class_token=self.class_token)
        return StretchedTower(trunk, facts, class_token=False)

    def read_base(self, tower: nn.Module, files: WeightFiles) -> BaseWeights:
        return read_transformer(tower, files)

    def initialise(self, tower: nn.Module, module: nn.Module) -> None:
        """Draws the new tensors of one submodule: truncated normal for tables, the layer's own rule elsewhere."""
        if module is tower.trunk:
            for parameter in module.parameters(recurse=False):
                nn.init.trunc_normal_(parameter, std=0.02)
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            reset: Any = module  # every other layer of timm knows how it starts
            reset.reset_parameters()

    def _trunk(self) -> Any:
        if not timm.is_model(self.name):
            raise UserError(f"vision.name: timm has no architecture {self.name!r}; see timm.list_models('vit*')")
        trunk: Any = empty_trunk(self.name, num_classes=0, **self.options)
        if self.norm_eps is not None:
            for module in trunk.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = self.norm_eps
        if self.position_grid is not None:
            if trunk.num_prefix_tokens:
                raise UserError(
                    "vision.position_grid: only a tower without class token stretches its positions; add "
                    "options: {class_token: false, global_pool: avg}"
                )
            trunk.pos_embed = nn.Parameter(torch.empty(1, self.position_grid**2, trunk.embed_dim))
        return trunk

    def _facts(self, trunk: Any) -> TowerFacts:
        depth = len(trunk.blocks)
        num_blocks = depth + 1 + self.layer
        if not 0 < num_blocks <= depth:
            raise UserError(f"vision.layer: {self.layer} is outside the {depth} blocks of {self.name}; use -1, -2, ...")
        if self.final_norm and num_blocks != depth:
            raise UserError("vision.final_norm: the last normalisation follows the last block; use layer: -1 with it")
        image_size = trunk.patch_embed.img_size[0]
        grid = trunk.patch_embed.grid_size[0]
        num_tokens = grid * grid + (trunk.num_prefix_tokens if self.class_token else 0)
        return TowerFacts(trunk.embed_dim, grid, num_tokens, image_size, num_blocks, depth)


def _match_key_bias(attention: Any, _: Any) -> None:
    """Has the zeros that EVA adds to its keys, a buffer, take the type of the biases that they are joined with.

    Sharded mixed precision rounds parameters and leaves buffers as they are.
    """
    attention.k_bias = attention.k_bias.to(attention.q_bias.dtype)


class Tower(nn.Module):
    """pixels float[V, 3, H, W] -> features float[V, P, D]."""

    trunk: Any  # a timm module

    def __init__(self, trunk: nn.Module, facts: TowerFacts, *, class_token: bool) -> None:
        super().__init__()
        self.trunk = trunk
        self.facts = facts
        self.class_token = class_token
        for layer in trunk.modules():
            if isinstance(layer, EvaAttention) and layer.k_bias is not None:
                layer.register_forward_pre_hook(_match_key_bias)

    def adopt(self, name: str, value: Tensor) -> tuple[Tensor, str] | None:
        """A table of positions for another resolution, stretched to this one's as BLIP, CLIP, EVA and Qwen-VL do it."""
        table = self.trunk.pos_embed
        if name != "trunk.pos_embed" or value.ndim != 3 or value.shape == table.shape:
            return None
        fixed = 0 if getattr(self.trunk, "no_embed_class", False) else self.trunk.num_prefix_tokens
        if math.isqrt(value.shape[1] - fixed) ** 2 != value.shape[1] - fixed:
            return None
        # in float64, so that machines that sum in another order round to the same float32: the table may be frozen,
        # and frozen tensors are known by their content
        places = resized(value[0, fixed:].double(), math.isqrt(table.shape[1] - fixed)).to(value.dtype)
        return torch.cat([value[:, :fixed], places[None]], dim=1), "bicubic"

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.trunk.forward_features(pixels)
        return features if self.class_token else features[:, self.trunk.num_prefix_tokens :]


class StretchedTower(Tower):
    """A tower whose positions are stretched to its patches: timm's own way antialiases, which is another curve."""

    def forward(self, pixels: Tensor) -> Tensor:
        trunk = self.trunk
        features = trunk.patch_embed(pixels)
        features = trunk.norm_pre(features + resized(trunk.pos_embed[0], self.facts.grid))
        return trunk.norm(trunk.blocks(features))


def see(tower: nn.Module, pixels: Tensor, *, keys: Sequence[str] = ()) -> Tensor:
    """float[V, P, C] features of views, without a graph where the tower is frozen.

    Args:
        keys: names of the views, under which features may be kept (`keep_features`).
    """
    parameters = list(tower.parameters())
    pixels = pixels.to(parameters[0].dtype)
    if keys and (files := getattr(tower, "feature_files", None)) is not None:
        return files.find(keys, lambda view: tower(pixels[view : view + 1]), device=pixels.device)
    with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in parameters)):
        return tower(pixels)


def keep_features(tower: Any, files: FeatureFiles | None) -> None:
    """Has `see` look for features of named views in files before it runs a frozen tower; None: it runs it."""
    tower.feature_files = files
