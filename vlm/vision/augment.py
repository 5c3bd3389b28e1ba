"""Changes of an image that it is trained with, and what a sample forbids to change.

The operations of BLIP's RandAugment work on bytes as the published ones do (its `transform/randaugment.py`, with OpenCV
for what moves pixels), so that an image comes out the same to the byte.
"""

import math
import random
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import numpy as np
from PIL import Image

from vlm.errors import UserError
from vlm.sample import Places

_GREY = 128  # what moved pixels leave behind
_MAX_MAGNITUDE = 10
_PROBABILITY = 0.5  # of each operation that was drawn


@dataclass(frozen=True)
class RandAugment:
    """BLIP's: some operations out of ten, each done half of the time; a pure function of image and seed.

    At the published magnitude Brightness and Sharpness, like Identity, change nothing. AutoContrast stretches each
    colour as it means to: the published one turns an image that has no black in a colour nearly white (a number of
    eight bits is negated).

    Args:
        num_ops: how many operations are drawn for an image, one more than once perhaps.
        magnitude: how strong they are, 0..10.
    """

    _: KW_ONLY
    num_ops: int = 2
    magnitude: float = 5

    def __post_init__(self) -> None:
        if self.num_ops < 1:
            raise UserError(f"RandAugment.num_ops must be at least 1, found {self.num_ops}")
        if not 0 <= self.magnitude <= _MAX_MAGNITUDE:
            raise UserError(f"RandAugment.magnitude must be in 0..{_MAX_MAGNITUDE}, found {self.magnitude}")

    def __call__(self, image: Image.Image, *, seed: int, places: Places = "unnamed") -> Image.Image:
        """An RGB image of the same size; with regions in the sample, operations that move pixels are left out."""
        chance = random.Random(seed)
        names = chance.choices(list(OPERATIONS), k=self.num_ops)
        pixels = np.asarray(image)
        for name in names:
            done, sign = chance.random() < _PROBABILITY, chance.choice((-1, 1))
            if done and not (places == "regions" and name in MOVING):
                pixels = OPERATIONS[name](pixels, sign * self.magnitude / _MAX_MAGNITUDE)
        return Image.fromarray(pixels)


def _identity(pixels: np.ndarray, strength: float) -> np.ndarray:
    return pixels


def _auto_contrast(pixels: np.ndarray, strength: float) -> np.ndarray:
    def levels(channel: np.ndarray) -> np.ndarray:
        low, high = int(channel.min()), int(channel.max())
        if high == low:
            return np.arange(256)
        scale = 255 / (high - low)
        return np.arange(256) * scale - low * scale

    return _mapped(pixels, levels)


def _equalize(pixels: np.ndarray, strength: float) -> np.ndarray:
    def levels(channel: np.ndarray) -> np.ndarray:
        counts = np.bincount(channel.ravel(), minlength=256)
        step = (channel.size - counts[np.flatnonzero(counts)[-1]]) // 255
        if step == 0:
            return np.arange(256)
        return (step // 2 + np.concatenate([[0], counts.cumsum()[:-1]])) // step

    return _mapped(pixels, levels)


def _brightness(pixels: np.ndarray, strength: float) -> np.ndarray:
    return _mapped(pixels, lambda channel: np.arange(256, dtype=np.float32) * _enhancement(strength))


def _sharpness(pixels: np.ndarray, strength: float) -> np.ndarray:
    factor = _enhancement(strength)
    if factor == 1.0 or min(pixels.shape[:2]) < 3:
        return pixels
    height, width = pixels.shape[:2]
    values = pixels.astype(np.float32)
    sums = sum(values[y : y + height - 2, x : x + width - 2] for y in range(3) for x in range(3))
    inner = values[1:-1, 1:-1]
    smooth = np.rint((sums + 4 * inner) / 13)
    sharp = pixels.copy()  # the border stays
    sharp[1:-1, 1:-1] = (smooth + factor * (inner - smooth)).clip(0, 255).astype(np.uint8)
    return sharp


def _enhancement(strength: float) -> float:
    return abs(strength) * 1.8 + 0.1


def _mapped(pixels: np.ndarray, levels: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Each colour through the table that `levels` makes of it."""
    channels = (pixels[..., channel] for channel in range(pixels.shape[2]))
    return np.stack([levels(channel).clip(0, 255).astype(np.uint8)[channel] for channel in channels], axis=-1)


def _shear_x(pixels: np.ndarray, strength: float) -> np.ndarray:
    return _moved(pixels, ((1.0, float(np.float32(strength * 0.3)), 0.0), (0.0, 1.0, 0.0)))


def _shear_y(pixels: np.ndarray, strength: float) -> np.ndarray:
    return _moved(pixels, ((1.0, 0.0, 0.0), (float(np.float32(strength * 0.3)), 1.0, 0.0)))


def _translate_x(pixels: np.ndarray, strength: float) -> np.ndarray:
    return _moved(pixels, ((1.0, 0.0, -10 * strength), (0.0, 1.0, 0.0)))


def _translate_y(pixels: np.ndarray, strength: float) -> np.ndarray:
    return _moved(pixels, ((1.0, 0.0, 0.0), (0.0, 1.0, -10 * strength)))


def _rotate(pixels: np.ndarray, strength: float) -> np.ndarray:
    """Around the middle, by up to 30 degrees."""
    angle = math.radians(30 * strength)
    x, y = pixels.shape[1] / 2, pixels.shape[0] / 2
    cosine, sine = math.cos(angle), math.sin(angle)
    across = (cosine, sine, (1 - cosine) * x - sine * y)
    return _moved(pixels, (across, (-sine, cosine, sine * x + (1 - cosine) * y)))


def _moved(pixels: np.ndarray, matrix: tuple[tuple[float, float, float], tuple[float, float, float]]) -> np.ndarray:
    """Pixels carried from (x, y) to matrix @ (x, y, 1), grey where none came from.

    As OpenCV does it: places to a 32nd of a pixel, weights between neighbours in whole numbers.
    """
    (a, b, e), (c, d, f) = matrix
    height, width = pixels.shape[:2]
    # the way back: which place each pixel comes from
    scale = 1 / (a * d - b * c)
    a, b, c, d = d * scale, -b * scale, -c * scale, a * scale
    e, f = -a * e - b * f, -c * e - d * f
    columns, rows = np.arange(width), np.arange(height)
    x = (_fixed(b * rows + e)[:, None] + 16 + _fixed(a * columns)) >> 5
    y = (_fixed(d * rows + f)[:, None] + 16 + _fixed(c * columns)) >> 5
    right, down = x & 31, y & 31
    # beyond a frame of grey there is nothing but grey
    framed = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), constant_values=_GREY).astype(np.int32).reshape(-1, 3)
    left_of, right_of = ((at + 1).clip(0, width + 1) for at in (x >> 5, (x >> 5) + 1))
    above, below = ((at + 1).clip(0, height + 1) * (width + 2) for at in (y >> 5, (y >> 5) + 1))
    corners = (
        (above + left_of, (32 - right) * (32 - down)),
        (above + right_of, right * (32 - down)),
        (below + left_of, (32 - right) * down),
        (below + right_of, right * down),
    )
    total = np.full(pixels.shape, 512, dtype=np.int32)
    for place, weight in corners:
        if weight.any():
            total += np.take(framed, place, axis=0) * weight.astype(np.int32)[..., None]
    return (total >> 10).astype(np.uint8)


def _fixed(values: np.ndarray) -> np.ndarray:
    """In 1024ths of a pixel."""
    return np.rint(values * 1024).astype(np.int64)


OPERATIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "Identity": _identity,
    "AutoContrast": _auto_contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "Equalize": _equalize,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Rotate": _rotate,
}
"""By published name, from uint8[H, W, 3] and a signed strength in -1..1 to an image of the same size."""
MOVING = frozenset({"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"})
