"""Pictures without an encoder: cut into patches at their own size."""

from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlm.errors import UserError
from vlm.levels import level_table, levels_of

_MEAN = _STD = (0.5, 0.5, 0.5)
_EDGE = 1
"""Grey level, of 255, of what fills up the last patches of a row and a column: as published, 1 and not 255."""


@dataclass(frozen=True)
class Patches:
    """An image as patches, row by row, in as many as its size asks for (Fuyu-8B, Adept, 2023).

    An image that is larger than the limit is scaled down until it fits, a smaller one stays as it is. At the right and
    at the bottom it is filled up to whole patches.

    Args:
        side: of a patch in pixels.
        max_width: largest width in pixels, a multiple of `side`.
        max_height: the same for the height.
    """

    side: int = 30
    _: KW_ONLY
    max_width: int = 1920
    max_height: int = 1080

    def __post_init__(self) -> None:
        for name in ("max_width", "max_height"):
            value = getattr(self, name)
            if value < self.side or value % self.side:
                raise UserError(f"patches.{name}: must be a multiple of the patch's {self.side} pixels, found {value}")

    def scaled(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of what is cut of an image of this size.

        Raises:
            UserError: nothing would be left of one side.
        """
        if width <= self.max_width and height <= self.max_height:
            return width, height
        scale = min(self.max_height / height, self.max_width / width)
        found = int(width * scale), int(height * scale)
        if not min(found):
            raise UserError(
                f"a picture of {width}x{height} pixels, scaled down to {self.max_width}x{self.max_height}, is no pixel "
                "wide or high; cut it"
            )
        return found

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) of the patches of an image of this size."""
        across, down = self.scaled(width, height)
        return -(-across // self.side), -(-down // self.side)

    def __call__(self, image: Image.Image) -> Tensor:
        """uint8[columns * rows, 3, side, side]."""
        columns, rows = self.grid(*image.size)
        size = self.scaled(*image.size)
        if size != image.size:
            image = _resized(image, size)
        canvas = Image.new("RGB", (columns * self.side, rows * self.side), (_EDGE,) * 3)
        canvas.paste(image)
        cut = levels_of(canvas).unflatten(2, (columns, self.side)).unflatten(1, (rows, self.side))
        return cut.permute(1, 3, 0, 2, 4).flatten(0, 1)  # from [3, rows, side, columns, side]

    @property
    def table(self) -> Tensor:
        """float32[3, 256]: what each level of a colour becomes (`vlm.levels`)."""
        return level_table(_MEAN, _STD)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image at (width, height), byte for byte as the image processor of transformers has it on AVX2 and AVX512.

    By torch and on bytes, the same on every processor: without these instructions torchvision, which that one calls,
    scales in floating point, a grey level apart. Pillow's bilinear is up to two apart in wide images.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    made = F.interpolate(pixels, size=size[::-1], mode="bilinear", antialias=True)[0]
    return Image.fromarray(made.permute(1, 2, 0).numpy())


def joined(patches: Tensor, *, columns: int) -> Tensor:
    """[V, 3, side, side] patches of one image as the image [3, H, W] that they are cut from."""
    rows = patches.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)
    return rows.flatten(3, 4).flatten(1, 2)


def channels_last(patches: Tensor) -> Tensor:
    """float[V, 3, side, side] -> float[V, side * side * 3], each pixel's three colours together."""
    return patches.permute(0, 2, 3, 1).flatten(1)
