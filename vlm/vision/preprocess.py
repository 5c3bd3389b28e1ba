"""Pictures to the pixels of a view, bit for bit as the published pipelines do it with Pillow.

A tensor resize (torchvision) rounds bicubic weights differently, by a grey level or two; parity needs Pillow's.
"""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from vlm.errors import UserError
from vlm.geometry import MIRRORED, Placement
from vlm.levels import level_table, levels_of
from vlm.sample import Places
from vlm.seeding import seed_from
from vlm.vision.augment import RandAugment

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_MODES = ("pad", "crop", "squash")
_LOG_RATIO = math.log(4 / 3)
_MAX_ASPECT = 100  # of an image that is resized whole before its middle is cut out
_MAX_SQUARE = 64_000_000  # pixels of a padded square that is made whole


def pad_to_square(image: Image.Image, *, color: tuple[int, int, int]) -> Image.Image:
    """The image centred on a square of its longer side; an odd rest goes to the right or bottom."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _padded_square(
    image: Image.Image, *, size: int, color: tuple[int, int, int], method: Image.Resampling
) -> Image.Image:
    """`pad_to_square`, then resized to `size`; the same bytes without ever holding a huge square."""
    side = max(image.size)
    if side * side <= _MAX_SQUARE:
        return pad_to_square(image, color=color).resize((size, size), method)
    # Pillow resizes rows first, each by itself, so strips of rows give the same bytes
    left, top = (side - image.width) // 2, (side - image.height) // 2
    rows = max(1, _MAX_SQUARE // side)
    narrow = Image.new("RGB", (size, side), color)
    for start in range(0, image.height, rows):
        height = min(rows, image.height - start)
        strip = Image.new("RGB", (side, height), color)
        strip.paste(image.crop((0, start, image.width, start + height)), (left, 0))
        narrow.paste(strip.resize((size, height), method), (0, top + start))
    return narrow.resize((size, size), method)


def resize_shortest(image: Image.Image, *, size: int, interpolation: str = "bicubic") -> Image.Image:
    """Resizes so that the shorter side is `size`; the longer one is cut to a whole number, as Hugging Face does."""
    width, height = image.size
    long = int(size * max(width, height) / min(width, height))
    return image.resize((size, long) if width <= height else (long, size), _INTERPOLATIONS[interpolation])


def center_crop(image: Image.Image, *, size: int) -> Image.Image:
    """The middle `size` x `size` of an image at least that large."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


ImageMode = Literal["pad", "crop", "squash"]


@dataclass(frozen=True)
class ImageTransform:
    """An RGB image of any size as uint8[3, size, size], and the table that normalises it.

    Args:
        size: side of the square.
        mode: `pad` to a square with `pad_color`, then resize (LLaVA-1.5, stage 2 and evaluation); `crop`: resize the
            shorter side, then cut out the middle (CLIP's own; LLaVA, and stage 1 of LLaVA-1.5); `squash` both sides
            to the square (BLIP; the whole-picture view of AnyRes).
        mean: of the tower, 0..1.
        std: of the tower, 0..1.
        interpolation: `nearest`, `bilinear`, `bicubic` or `lanczos`.
        pad_color: RGB, 0..255; default int(mean * 255).
    """

    size: int
    _: KW_ONLY
    mode: ImageMode = "pad"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    interpolation: str = "bicubic"
    pad_color: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise UserError(f"image mode {self.mode!r}: use one of {', '.join(_MODES)}")
        if self.interpolation not in _INTERPOLATIONS:
            raise UserError(f"interpolation {self.interpolation!r}: use one of {', '.join(_INTERPOLATIONS)}")

    def __call__(self, image: Image.Image) -> Tensor:
        return levels_of(self.square(image))

    @property
    def table(self) -> Tensor:
        """float32[3, 256]: what each level of a colour becomes (`vlm.levels`)."""
        return level_table(self.mean, self.std)

    def square(self, image: Image.Image) -> Image.Image:
        """The image as the model sees it, before normalisation."""
        method = _INTERPOLATIONS[self.interpolation]
        if self.mode == "pad":
            red, green, blue = self.pad_color or tuple(int(channel * 255) for channel in self.mean)
            return _padded_square(image, size=self.size, color=(red, green, blue), method=method)
        if self.mode == "crop":
            # Resized whole, a line of 1 x 100,000 pixels would fill the memory; its ends are cut off anyway
            image = _at_most_elongated(image, aspect=_MAX_ASPECT)
            image = resize_shortest(image, size=self.size, interpolation=self.interpolation)
            return center_crop(image, size=self.size)
        return image.resize((self.size, self.size), method)

    def placement(self, width: float, height: float) -> Placement:
        """Where an image of this size lies in its square."""
        if self.mode == "squash":
            return Placement()
        side = max(width, height) if self.mode == "pad" else min(width, height)
        # in whole pixels, as the image itself is pasted and cut
        left, top = (width - side) // 2, (height - side) // 2
        if self.mode == "pad":
            left, top = -((side - width) // 2), -((side - height) // 2)
        return Placement.of_crop((left, top, left + side, top + side), size=(width, height))


def _at_most_elongated(image: Image.Image, *, aspect: int) -> Image.Image:
    # as much from either end, so that the middle stays where it is
    longest = min(image.size) * aspect
    left, top = max(0, image.width - longest) // 2, max(0, image.height - longest) // 2
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


@dataclass(frozen=True)
class RandomCropFlip:
    """Training augmentation before an `ImageTransform`: a random part of the image as a square, perhaps mirrored.

    A pure function of image and seed, so that a resumed run sees the same images. Area and aspect ratio are drawn
    as torchvision's `RandomResizedCrop` does (ten tries, then the middle).

    Args:
        size: side of the square.
        scale: smallest and largest share of the area that is kept.
        flip: mirror half of the images, of samples that name no places (`vlm.sample.places.places_named`).
        then: what else happens to the square (BLIP).
    """

    size: int
    _: KW_ONLY
    scale: tuple[float, float] = (0.5, 1.0)
    flip: bool = True
    then: RandAugment | None = None

    def __call__(self, image: Image.Image, *, seed: int, places: Places = "unnamed") -> Image.Image:
        box, mirrored = self._draw(image.width, image.height, seed, places)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image if self.then is None else self.then(image, seed=seed_from(seed, "then"), places=places)

    def placement(self, width: int, height: int, *, seed: int, places: Places = "unnamed") -> Placement:
        """Where an image of this size lies in what `__call__` makes of it; with regions `then` does not move it."""
        box, mirrored = self._draw(width, height, seed, places)
        placement = Placement.of_crop(box, size=(width, height))
        return placement.then(MIRRORED) if mirrored else placement

    def _draw(self, width: int, height: int, seed: int, places: Places) -> tuple[tuple[int, int, int, int], bool]:
        generator = torch.Generator().manual_seed(seed)
        box = self._box(width, height, generator)
        return box, self.flip and places == "unnamed" and _uniform(0, 1, generator) < 0.5

    def _box(self, width: int, height: int, generator: torch.Generator) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the part that is kept."""
        for _ in range(10):
            area = width * height * _uniform(*self.scale, generator)
            ratio = math.exp(_uniform(-_LOG_RATIO, _LOG_RATIO, generator))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left = int(torch.randint(width - w + 1, (), generator=generator))
                top = int(torch.randint(height - h + 1, (), generator=generator))
                return left, top, left + w, top + h
        w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
