"""InternLM-XComposer2-4KHD: A Pioneering Large Vision-Language Model Handling Resolutions from 336 Pixels to 4K HD
(Dong et al., 2024)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vlm.batch import Batch, Views
from vlm.codec import Encoded, ViewStream
from vlm.connectors import JoinNeighbours, Separators
from vlm.errors import UserError
from vlm.geometry import Placement, View
from vlm.levels import levels_of, look_up
from vlm.sample import Sample
from vlm.seeding import seed_from
from vlm.systems.row import STREAM
from vlm.systems.spliced import SplicedCodec
from vlm.systems.xcomposer2 import XComposer2
from vlm.vision import see
from vlm.vision.hd import ROW_END, SEPARATOR, HDTiles

_FIXED, _DRAWN = "hd_", "random_hd_"
_SETTINGS = (1, 4, 9, 16, 25, 30, 55)  # those of the paper, and two for small networks


class HDCodec(SplicedCodec):
    """Rows in which an image takes as many tokens as its shape, its source and chance ask for.

    What `Sample.resolution` says: `hd_55` makes as many tiles as 55 allow, whatever the size of the image;
    `random_hd_25` allows a number that is drawn for the sample in training, from the tiles of its image as large as it
    is up to 25. Without such a word it is `tiles`.
    """

    resolutions = tuple(f"{word}{num}" for word in (_FIXED, _DRAWN) for num in _SETTINGS)

    def __init__(self, *, tiles: HDTiles, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tiles = tiles

    def num_tokens(self, width: int, height: int) -> int:
        return self.tiles.num_tokens(width, height)

    def image_tokens(self, sample: Sample, *, seed: int | None = None) -> list[int]:
        try:
            sizes = [file.size(sample) for file in sample.images]
            return [self.tiles_of(sample, size, seed=seed).num_tokens(*size) for size in sizes]
        except UserError as error:
            raise sample.error(str(error), kind=error.kind or "image") from error

    def tiles_of(self, sample: Sample, size: tuple[int, int], *, seed: int | None) -> HDTiles:
        """How an image of this size is cut."""
        if sample.resolution is None:
            return self.tiles
        word, _, num = sample.resolution.rpartition("_")
        tiles = replace(self.tiles, num=int(num))
        if f"{word}_" == _FIXED or seed is None:
            return tiles
        least = tiles.num_own(*size)
        # one draw for the sample: its images are known here by their size alone
        return replace(tiles, num=least + seed_from(seed, "tiles") % (tiles.num - least + 1))

    def view(self, width: int, height: int, *, image: int = 0, seed: int | None = None) -> View:
        left, top, right, bottom = self.tiles.content(width, height)
        columns, rows = self.tiles.grid(width, height)
        scale_x, scale_y = (right - left) / (columns * self.tiles.tile), (bottom - top) / (rows * self.tiles.tile)
        canvas = Placement(scale_x, left / (columns * self.tiles.tile), scale_y, top / (rows * self.tiles.tile))
        return View(Placement(), (float(width), float(height)), shown=canvas)

    def streams(self, sample: Sample, *, seed: int | None = None) -> dict[str, ViewStream]:
        def tiles(width: int, height: int) -> HDTiles:
            return self.tiles_of(sample, (width, height), seed=seed)

        def views(image: Image.Image) -> tuple[Tensor, Tensor]:
            cut = tiles(*image.size)
            canvas = levels_of(cut.canvas(image))
            return cut.tiles(canvas), cut.whole(look_up(canvas, table))

        table = self.transform.table
        return {STREAM: ViewStream(views, table, lambda width, height: tiles(width, height).grid(width, height))}

    def read(self, items: Sequence[Encoded]) -> dict[str, Views]:
        streams = super().read(items)
        if not streams:
            return streams
        views = streams[STREAM]
        end = len(views.image_of_view) * self.tiles.tokens**2
        layouts, start = [], 0
        for size, owner in zip(views.size, views.sample_of_image.tolist(), strict=True):
            tiles = self.tiles_of(items[owner].sample, size, seed=items[owner].seed)
            layout = tiles.layout(*size)
            shown = torch.where(layout == ROW_END, end, layout + start)
            layouts.append(torch.where(layout == SEPARATOR, end + 1, shown))
            start += tiles.num_views(*size) * tiles.tokens**2
        return {STREAM: replace(views, layout=torch.cat(layouts))}


class XComposer2HD4K(XComposer2):
    """InternLM-XComposer2 that sees an image whole and in up to 55 tiles: 8,737 tokens at most.

    ::

        image -> as many tiles of 336 px as `hd_num` allows, its shape kept, white beside it; and all of it squashed
          -> CLIP ViT-L/14, output of block 24 of 24, patches only      float[V, 576, 1024]
          -> 2 x 2 neighbours one behind the other                      float[V, 144, 4096]
          -> map of the whole, a learned separator, map of the tiles; a learned end behind each row
          -> Linear, GELU, Linear: separators too                       float[K, D]
          -> in the place of the image -> InternLM2-7B, partial LoRA on all of these; loss on the answers

    Pre-training allows 25 tiles; fine-tuning 55 of pages, and of everything else a number by chance (`data.resolution`,
    `HDCodec`).

    Args:
        hd_num: tiles that an image may become where its source says nothing else.
        **kwargs: as in `XComposer2`.
    """

    system = "xcomposer2_4khd"
    codec: HDCodec
    separators: Separators

    def __init__(self, *, hd_num: int = 25, **kwargs: Any) -> None:
        super().__init__(hd_num=hd_num, **kwargs)

    @cached_property
    def tiles(self) -> HDTiles:
        """How an image is cut.

        Raises:
            UserError: its features are not 2 x 2 to a token, or there are no tiles.
        """
        if self.tower.grid % 2:
            raise UserError(
                f"model.vision: the {self.tower.grid} x {self.tower.grid} patches of a tile are not 2 x 2 to a token; "
                "give it an img_size with an even number of them"
            )
        return HDTiles(self.tower.image_size, self.tower.grid // 2, num=self.arguments["hd_num"])

    def make_codec(self) -> HDCodec:
        if self.arguments["augment"] is not None:
            raise UserError("model.augment: a cut image takes other tokens than its file tells; leave it out")
        return HDCodec(tiles=self.tiles, **self.codec_arguments())

    def build_parts(self) -> dict[str, nn.Module]:
        parts = super().build_parts()
        dim = 4 * self.tower.dim
        language: Any = parts["language"]
        parts["connector"] = self.arguments["connector"].build(dim, language.config.hidden_size)
        return parts | {"separators": Separators(dim)}

    def image_modules(self) -> tuple[nn.Module, ...]:
        return (*super().image_modules(), self.separators)

    def encode_images(self, batch: Batch) -> Tensor:
        views = batch.views[STREAM]
        return JoinNeighbours(by_rows=True)(see(self.vision, views.pixels, keys=views.keys))

    def arrange_features(self, features: Tensor, layout: Tensor | None) -> Tensor:
        # the connector sees each separator once, not at the end of every row
        rows = self.connector(self.separators(features.flatten(0, 1)))
        return rows if layout is None else rows.index_select(0, layout)
