"""Large images as several views of the tower's own size.

AnyRes of LLaVA-NeXT (Liu et al., "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge", 2024), as in
haotian-liu/LLaVA `mm_utils.py` and `llava_arch.py`: the official rule with its ties and its cutting of decimals, which
the port in transformers rounds in another way.
"""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlm.errors import UserError

NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Columns and rows of the released LLaVA-NeXT models, in their order, which decides ties."""
NEWLINE = -1


@dataclass(frozen=True)
class AnyRes:
    """Views of a picture: the whole of it squashed, then the tiles of a grid that suits its shape.

    ::

        image -> the grid that shows most of it, then the one that wastes least, then the first
                -> resized to fit, centred on black -> tiles row by row, behind the squashed whole
        features -> base view, then the map of all tiles without the padding, a newline token behind each of its rows

    Args:
        tile: side of a view in pixels.
        patches: features per side of a view.
        grids: (columns, rows) that may be chosen.
        merge: `spatial_unpad` as above; `spatial`: the map with its padding and without newlines; `flat`: view by view.
    """

    tile: int
    patches: int
    _: KW_ONLY
    grids: Sequence[tuple[int, int]] = NEXT_GRIDS
    merge: Literal["spatial_unpad", "spatial", "flat"] = "spatial_unpad"

    def __post_init__(self) -> None:
        object.__setattr__(self, "grids", tuple((int(columns), int(rows)) for columns, rows in self.grids))
        if not self.grids or min(side for grid in self.grids for side in grid) < 1:
            raise UserError(f"grids must name at least one (columns, rows) of 1 or more, found {list(self.grids)}")
        if self.merge not in ("spatial_unpad", "spatial", "flat"):
            raise UserError(f"merge {self.merge!r}: use one of spatial_unpad, spatial, flat")

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) for an image of this size."""

        def quality(grid: tuple[int, int]) -> tuple[int, int]:
            across, down = grid[0] * self.tile, grid[1] * self.tile
            scale = min(across / width, down / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            return shown, shown - across * down

        return max(self.grids, key=quality)  # the first of equals

    def content(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the resized image on its canvas, in pixels."""
        columns, rows = self.grid(width, height)
        across, down = columns * self.tile, rows * self.tile
        scale_x, scale_y = across / width, down / height
        if scale_x < scale_y:
            new = across, min(math.ceil(height * scale_x), down)
        else:
            new = min(math.ceil(width * scale_y), across), down
        left, top = (across - new[0]) // 2, (down - new[1]) // 2
        return left, top, left + new[0], top + new[1]

    def views(self, image: Image.Image) -> list[Image.Image]:
        """The base view and the tiles, `tile` x `tile` each."""
        columns, rows = self.grid(*image.size)
        left, top, right, bottom = self.content(*image.size)
        canvas = Image.new("RGB", (columns * self.tile, rows * self.tile))
        canvas.paste(image.resize((right - left, bottom - top), Image.Resampling.BICUBIC), (left, top))
        corners = [(x * self.tile, y * self.tile) for y in range(rows) for x in range(columns)]
        tiles = [canvas.crop((x, y, x + self.tile, y + self.tile)) for x, y in corners]
        return [image.resize((self.tile, self.tile), Image.Resampling.BICUBIC), *tiles]

    def num_views(self, width: int, height: int) -> int:
        columns, rows = self.grid(width, height)
        return 1 + columns * rows

    def num_tokens(self, width: int, height: int) -> int:
        """Tokens of an image of this size, newlines included; the length of `layout`."""
        if self.merge == "flat":
            return self.num_views(width, height) * self.patches**2
        left, top, right, bottom = self._shown(width, height)
        return self.patches**2 + (bottom - top) * (right - left + (self.merge == "spatial_unpad"))

    def layout(self, width: int, height: int) -> Tensor:
        """int64[T]: for each token of the image the feature it shows, counted over the views, or `NEWLINE`."""
        base = torch.arange(self.patches**2)
        columns, rows = self.grid(width, height)
        tiles = torch.arange(columns * rows * self.patches**2) + len(base)
        if self.merge == "flat":
            return torch.cat([base, tiles])
        # [rows, columns, patches, patches] -> the map of the whole canvas
        whole = tiles.view(rows, columns, self.patches, self.patches).transpose(1, 2).flatten(2).flatten(0, 1)
        left, top, right, bottom = self._shown(width, height)
        shown = whole[top:bottom, left:right]
        if self.merge == "spatial_unpad":
            shown = torch.cat([shown, torch.full((shown.shape[0], 1), NEWLINE)], dim=1)
        return torch.cat([base, shown.flatten()])

    def _shown(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the map of all tiles that is kept, in features."""
        columns, rows = self.grid(width, height)
        across, down = columns * self.patches, rows * self.patches
        if self.merge != "spatial_unpad":
            return 0, 0, across, down
        if width / height > across / down:
            cut = (down - int(height * (across / width))) // 2
            return 0, cut, across, down - cut
        cut = (across - int(width * (down / height))) // 2
        return cut, 0, across - cut, down


def low_views(pixels: Tensor, *, size: int, grid: int = 1, whole: bool = False) -> Tensor:
    """Views for a tower of low resolution, made of the images that one of high resolution sees (Mini-Gemini, 2024).

    Bilinear and not antialiased, as published, and the whole image in two such steps: from the large view, not from
    `pixels`.

    Args:
        pixels: float[V, 3, H, H], normalised.
        size: side of a view.
        grid: the image at `grid * size` is cut into `grid` x `grid` views.
        whole: and one view of all of it, in front of them.

    Returns:
        float[V, views, 3, size, size], the parts row by row.
    """
    large = F.interpolate(pixels, size=(grid * size, grid * size), mode="bilinear")
    rows = large.unflatten(3, (grid, size)).unflatten(2, (grid, size))  # [V, 3, grid, size, grid, size]
    views = rows.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    if whole:
        small = F.interpolate(large, size=(size, size), mode="bilinear")
        views = torch.cat([small[:, None], views], dim=1)
    return views
