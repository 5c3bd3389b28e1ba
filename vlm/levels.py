"""Pixels as bytes, and what a system makes of each level of a colour.

Pixels travel as bytes, a quarter of what they are as float32, and are normalised where they are looked at. A table of
what the 256 levels become gives, on any device, the same bits as the arithmetic.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def levels_of(image: Image.Image) -> Tensor:
    """uint8[3, H, W] of an RGB image."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))


def level_table(mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """float32[3, 256]: what each level of each colour becomes, scaled to 0..1, then (value - mean) / std."""
    return torch.from_numpy(_table(tuple(mean), tuple(std)))


@lru_cache(maxsize=64)
def _table(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    scaled = (np.arange(256, dtype=np.float64) / 255).astype(np.float32)
    return (scaled - np.asarray(mean, dtype=np.float32)[:, None]) / np.asarray(std, dtype=np.float32)[:, None]


def look_up(levels: Tensor, table: Tensor) -> Tensor:
    """uint8[..., 3, H, W] -> float32[..., 3, H, W], each level replaced by its entry of a table."""
    found = torch.empty(levels.shape, dtype=table.dtype, device=levels.device)
    for entries, own, place in zip(table, levels.unbind(-3), found.unbind(-3), strict=True):
        place.copy_(entries.index_select(0, own.flatten().int()).view(own.shape))
    return found


def levels_again(pixels: Tensor, table: Tensor) -> Tensor:
    """uint8[..., 3, H, W]: the nearest levels of pixels that were made by a table, or between its entries."""
    lowest, highest = table[:, :1, None], table[:, -1:, None]
    return ((pixels - lowest) / (highest - lowest) * 255).round().clamp(0, 255).to(torch.uint8)
