"""Tables of positions on a square grid: fixed ones, and any of them for a grid of another size."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_2d(dim: int, grid: int) -> Tensor:
    """Fixed positions of a square grid, as MAE (He et al., 2022) and Qwen-VL (Bai et al., 2023) have them.

    The first half of the channels tells the column, the second the row; in each half the sines come before the
    cosines, of the position over 10000 ** (i / (dim / 4)).

    Args:
        dim: channels, a multiple of 4.
        grid: places per side.

    Returns:
        float32[grid * grid, dim], row by row.

    Raises:
        ValueError: `dim` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"positions in two directions take 4 channels at a time, found {dim}")
    rates = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * rates
    along = torch.cat([angles.sin(), angles.cos()], dim=1).to(torch.float32)  # [grid, dim / 2]
    columns, rows = along.expand(grid, -1, -1), along[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)


def resized(table: Tensor, grid: int) -> Tensor:
    """The positions of a square grid for another one: bicubic, corners not aligned, no antialiasing, in float32.

    Args:
        table: float[P, D], row by row.
        grid: places per side that are wanted.

    Returns:
        float[grid * grid, D] of the table's dtype; the table itself where it already has this size.
    """
    side = math.isqrt(len(table))
    assert side * side == len(table), table.shape
    if side == grid:
        return table
    image = table.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return image[0].permute(1, 2, 0).flatten(0, 1).to(table.dtype)
