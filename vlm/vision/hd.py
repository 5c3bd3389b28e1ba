"""Images of any shape as tiles in whole numbers along both sides, up to 4K (InternLM-XComposer2-4KHD, 2024).

As `HD_transform` in InternLM/InternLM-XComposer (InternLM-XComposer-2.0/finetune/ixc_utils.py) and the released code.
"""

import math
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlm.errors import UserError

ROW_END, SEPARATOR = -2, -1
"""Tokens of a layout that show no feature: the end of a row of a map, and what stands between two maps."""
_WHITE = (255, 255, 255)


@dataclass(frozen=True)
class HDTiles:
    """Views of an image: the whole of it squashed, then all of its tiles.

    ::

        image -> its longer side a whole number of tiles, as many as `num` allows in all; its shape is kept
              -> white above and below (or left and right) up to a whole tile -> tiles row by row, behind the whole
        features -> map of the whole, what separates, map of all tiles; both with what ends each of their rows

    Args:
        tile: side of a view in pixels.
        tokens: tokens per side of a view.
        num: tiles that an image may become, without the view of the whole (`hd_num`; 9, 16, 25 and 55 in the paper).
    """

    tile: int
    tokens: int
    _: KW_ONLY
    num: int = 25

    def __post_init__(self) -> None:
        if self.num < 1:
            raise UserError(f"hd_num must be at least 1, found {self.num}: an image is at least one tile")

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the image before white is added; its longer side is a whole number of tiles.

        Raises:
            UserError: its shorter side would have no pixel.
        """
        ratio = max(width, height) / min(width, height)
        along = 1
        while (along + 1) * math.ceil((along + 1) / ratio) <= self.num:
            along += 1
        long = along * self.tile
        short = int(long / ratio)
        if short == 0:
            raise UserError(
                f"an image of {width} x {height} pixels is too thin: beside {long} pixels its shorter side would have "
                "none; cut it into pieces or drop it"
            )
        return (short, long) if width < height else (long, short)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) of tiles of an image of this size."""
        across, down = self.resized(width, height)
        return math.ceil(across / self.tile), math.ceil(down / self.tile)

    def content(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the image on its canvas of whole tiles, in pixels."""
        across, down = self.resized(width, height)
        columns, rows = self.grid(width, height)
        left, top = (columns * self.tile - across) // 2, (rows * self.tile - down) // 2
        return left, top, left + across, top + down

    def canvas(self, image: Image.Image) -> Image.Image:
        """An RGB image, resized and centred on white."""
        left, top, right, bottom = self.content(*image.size)
        columns, rows = self.grid(*image.size)
        upright = image.width < image.height
        if upright:  # Pillow rounds between its two passes, so which side comes first is seen in the bytes
            image = image.transpose(Image.Transpose.TRANSPOSE)
        size = (bottom - top, right - left) if upright else (right - left, bottom - top)
        image = image.resize(size, Image.Resampling.BILINEAR)
        if upright:
            image = image.transpose(Image.Transpose.TRANSPOSE)
        canvas = Image.new("RGB", (columns * self.tile, rows * self.tile), _WHITE)
        canvas.paste(image, (left, top))
        return canvas

    def whole(self, canvas: Tensor) -> Tensor:
        """float[3, tile, tile] of a normalised canvas float[3, H, W], squashed and not antialiased."""
        return F.interpolate(canvas[None], size=(self.tile, self.tile), mode="bicubic", align_corners=False)[0]

    def tiles(self, canvas: Tensor) -> Tensor:
        """[tiles, 3, tile, tile] of a canvas [3, H, W], row by row."""
        cut = canvas.unflatten(2, (-1, self.tile)).unflatten(1, (-1, self.tile))  # [3, rows, tile, columns, tile]
        return cut.permute(1, 3, 0, 2, 4).flatten(0, 1)

    def num_views(self, width: int, height: int) -> int:
        columns, rows = self.grid(width, height)
        return 1 + columns * rows

    def num_tokens(self, width: int, height: int) -> int:
        """Tokens of an image of this size; the length of `layout`."""
        columns, rows = self.grid(width, height)
        side = self.tokens
        return side * (side + 1) + 1 + rows * side * (columns * side + 1)

    def layout(self, width: int, height: int) -> Tensor:
        """int64[T]: for each token of the image the feature it shows, counted over the views, or a mark."""
        columns, rows = self.grid(width, height)
        side = self.tokens
        features = torch.arange((1 + columns * rows) * side**2)
        whole = features[: side**2].view(side, side)
        tiles = features[side**2 :].view(rows, columns, side, side).transpose(1, 2).flatten(2).flatten(0, 1)
        return torch.cat([_ended(whole), torch.tensor([SEPARATOR]), _ended(tiles)])

    def num_own(self, width: int, height: int) -> int:
        """Tiles of an image as large as it is, at most `num`."""
        columns, rows = (math.ceil(side / self.tile) for side in (width, height))
        return min(columns * rows, self.num)


def _ended(table: Tensor) -> Tensor:
    """A map of features row by row, each row with its end."""
    return torch.cat([table, table.new_full((len(table), 1), ROW_END)], dim=1).flatten()
