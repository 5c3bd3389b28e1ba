"""Mini-Gemini: Mining the Potential of Multi-modality Vision Language Models (Li et al., 2024); MGM in its code."""

from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from vlm.batch import Batch
from vlm.connectors import PatchMining
from vlm.connectors.mining import mine_views
from vlm.errors import UserError
from vlm.systems.row import STREAM
from vlm.systems.spliced import SplicedDecoder
from vlm.vision import TowerDescription, TowerFacts, see
from vlm.vision.tiling import low_views


class MiniGemini(SplicedDecoder):
    """An image is 576 tokens that have looked for detail in a finer map of it.

    ::

        image, padded to square, 768 px
          -> OpenCLIP ConvNeXt-L, four stages at stride 4                  high: float[V, 192 * 192, 2880]
          -> bilinear to 336 px -> CLIP ViT-L/14, block 23 of 24, patches  low:  float[V, 576, 1024]
          -> patch info mining: each of the 24 x 24 places attends to its own 8 x 8 window of the fine map
          -> low + what was found -> Linear, GELU, Linear                  float[V, 576, D]
          -> in the place of <image> -> Vicuna, Gemma, Llama 3, Mixtral or Yi; loss on the answers

        HD: 1536 px, a map of 384 x 384; the low views are the whole at 336 px and 2 x 2 parts of it at 672 px: 2,880
        tokens, the whole first

    Stage 1 trains the mining and the connector on captions, stage 2 the language model too; both towers stay frozen,
    but the ConvNeXt drops paths at random meanwhile. An image that is asked for with `<GEN>` is answered by a prompt
    for an image generator between `<h>` and `</h>` (`vlm run imagine`).

    Args:
        vision_high: the tower of the fine map; its `image_size` is that of the batch's one view of an image.
        grid: parts per side of the low-resolution view (HD: 2).
        whole: a view of the whole image beside its parts.
        scale_features: multiply the features by sqrt(D), as Gemma in transformers before 5 did with whatever it was
            given: the public 2B weights were trained so. Token embeddings carry the factor themselves.
        **kwargs: as in `SplicedDecoder`.
    """

    system = "mini_gemini"
    vision_high: nn.Module
    mining: PatchMining

    def __init__(
        self,
        *,
        vision_high: TowerDescription,
        grid: int = 1,
        whole: bool = False,
        scale_features: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(vision_high=vision_high, grid=grid, whole=whole, scale_features=scale_features, **kwargs)
        self.grid, self.whole, self.scale_features = grid, whole, scale_features

    @cached_property
    def low(self) -> TowerFacts:
        """Facts of the tower of the low views."""
        return self.arguments["vision"].facts()

    @cached_property
    def high(self) -> TowerFacts:
        """Facts of the tower of the fine map."""
        return self.arguments["vision_high"].facts()

    @cached_property
    def tower(self) -> TowerFacts:
        """As everyone outside of `encode_images` sees it: one view per image, at the size of the finer tower."""
        low, grid, whole = self.low, self.arguments["grid"], self.arguments["whole"]
        if grid < 1 or (whole and grid == 1):
            raise UserError(f"model.grid {grid}: must be 1 or more, and model.whole needs parts beside it: grid 2")
        if self.high.grid % (low.grid * grid):
            raise UserError(
                f"model.vision_high: its map of {self.high.grid} x {self.high.grid} places cannot be shared out among "
                f"{low.grid * grid} x {low.grid * grid} features; choose another image_size"
            )
        return replace(low, num_tokens=low.num_tokens * (grid * grid + whole), image_size=self.high.image_size)

    def build_parts(self) -> dict[str, nn.Module]:
        parts = super().build_parts()
        order = ("vision", "vision_high", "mining", "connector", "language")
        parts |= {
            "vision_high": self.arguments["vision_high"].build(),
            "mining": PatchMining(self.tower.dim, self.high.dim),
        }
        return {name: parts[name] for name in order}

    def image_modules(self) -> tuple[nn.Module, ...]:
        return self.vision, self.vision_high, self.mining, self.connector

    def encode_images(self, batch: Batch) -> Tensor:
        pixels, keys = batch.views[STREAM].pixels, batch.views[STREAM].keys
        views = low_views(pixels, size=self.low.image_size, grid=self.grid, whole=self.whole)
        of_views = [f"{key}-{self.grid}{self.whole:d}-{view}" for key in keys for view in range(views.shape[1])]
        low = see(self.vision, views.flatten(0, 1), keys=of_views).unflatten(0, views.shape[:2])
        high = see(self.vision_high, pixels, keys=keys)
        found = mine_views(self.mining, low, high, grid=self.grid)
        features = self.connector((low + found).flatten(1, 2))
        return features * features.new_full((), features.shape[-1] ** 0.5) if self.scale_features else features
