"""LLaVA-NeXT: Improved reasoning, OCR, and world knowledge (Liu et al., 2024); also known as LLaVA 1.6."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm.batch import Views
from vlm.codec import Encoded, ViewStream
from vlm.connectors import Newline
from vlm.errors import UserError
from vlm.geometry import Placement, View
from vlm.levels import levels_of
from vlm.sample import Sample
from vlm.systems.row import STREAM, RowCodec
from vlm.systems.spliced import SplicedCodec, SplicedDecoder
from vlm.vision.tiling import NEWLINE, NEXT_GRIDS, AnyRes


class AnyResCodec(SplicedCodec):
    """Rows in which an image takes as many tokens as its shape asks for.

    Boxes count from the padded square, as in the files of LLaVA-1.5, of which much of the published mixture is; no view
    shows that square.
    """

    def __init__(self, *, tiles: AnyRes, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tiles = tiles
        self.padded = replace(self.transform, mode="pad")

    def num_tokens(self, width: int, height: int) -> int:
        return self.tiles.num_tokens(width, height)

    def image_tokens(self, sample: Sample, *, seed: int | None = None) -> list[int]:
        return RowCodec.image_tokens(self, sample, seed=seed)

    def view(self, width: int, height: int, *, image: int = 0, seed: int | None = None) -> View:
        side = float(self.transform.size)
        return View(self.padded.placement(width, height), (side, side), shown=Placement())

    def streams(self, sample: Sample, *, seed: int | None = None) -> dict[str, ViewStream]:
        return {STREAM: ViewStream(self._levels, self.transform.table, self.tiles.grid)}

    def read(self, items: Sequence[Encoded]) -> dict[str, Views]:
        streams = super().read(items)
        if not streams:
            return streams
        views = streams[STREAM]
        layouts, start, newline = [], 0, len(views.image_of_view) * self.tower.num_tokens
        for size in views.size:
            layout = self.tiles.layout(*size)
            layouts.append(torch.where(layout == NEWLINE, newline, layout + start))
            start += self.tiles.num_views(*size) * self.tower.num_tokens
        return {STREAM: replace(views, layout=torch.cat(layouts))}

    def _levels(self, image: Image.Image) -> Tensor:
        return torch.stack([levels_of(view) for view in self.tiles.views(image)])


class LLaVANext(SplicedDecoder):
    """An image is 576 tokens of the whole and up to 2,352 of its parts.

    ::

        image -> the grid of 336 px tiles that suits its shape (AnyRes), and the whole of it squashed
          -> CLIP ViT-L/14, output of block 23 of 24, patches only      float[V, 576, 1024]
          -> Linear, GELU, Linear                                       float[V, 576, D]
          -> the whole; then the map of the tiles without the padding, a learned newline behind each row
          -> in the place of <image> -> Vicuna, Mistral, Llama 3 or Yi; loss on the answers

    Stage 1 trains the connector on one view per image, as LLaVA-1.5 does (`grids: null`). Stage 2 trains everything,
    the tower at a lower rate.

    Args:
        grids: (columns, rows) of tiles that may be chosen; None: one view and no newlines.
        merge: how the tiles become tokens (`vlm.vision.tiling.AnyRes`).
        **kwargs: as in `SplicedDecoder`.
    """

    system = "llava_next"
    newline: Newline

    def __init__(
        self,
        *,
        grids: Sequence[tuple[int, int]] | None = NEXT_GRIDS,
        merge: Literal["spatial_unpad", "spatial", "flat"] = "spatial_unpad",
        **kwargs: Any,
    ) -> None:
        super().__init__(grids=grids, merge=merge, **kwargs)

    @cached_property
    def tiles(self) -> AnyRes | None:
        """How an image is cut; None: not at all."""
        grids, merge = self.arguments["grids"], self.arguments["merge"]
        return None if grids is None else AnyRes(self.tower.image_size, self.tower.grid, grids=grids, merge=merge)

    def make_codec(self) -> SplicedCodec:
        if self.tiles is None:
            return super().make_codec()
        if self.arguments["augment"] is not None:
            raise UserError("model.augment: a cut picture takes other tokens than its file tells; leave it out")
        return AnyResCodec(tiles=self.tiles, **self.codec_arguments())

    def build_parts(self) -> dict[str, nn.Module]:
        parts = super().build_parts()
        if self.has_newline:
            language = parts["language"]
            assert isinstance(language, PreTrainedModel)
            parts["newline"] = Newline(language.config.hidden_size)
        return parts

    def arrange_features(self, features: Tensor, layout: Tensor | None) -> Tensor:
        rows = features.flatten(0, 1)
        if self.has_newline:
            rows = self.newline(rows)
            if layout is None:  # a blank view
                return rows[:-1]
        return rows if layout is None else rows.index_select(0, layout)

    def image_modules(self) -> tuple[nn.Module, ...]:
        return (*super().image_modules(), self.newline) if self.has_newline else super().image_modules()

    @property
    def has_newline(self) -> bool:
        return self.tiles is not None and self.tiles.merge == "spatial_unpad"
