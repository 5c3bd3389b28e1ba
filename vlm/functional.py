"""Free functions on tensors: fusion of images and text, losses as sums, tables of positions.

A loss is a sum; the step divides it by the denominator of the whole optimizer step.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

MOST_LOGITS = 2**26
"""Logits that are there at once in training: 0.25 GiB in float32, 2,097 labels of 32,000 words."""


def splice(embeds: Tensor, features: Tensor, slots: Tensor) -> Tensor:
    """Puts image features in the place of their placeholder tokens.

    Args:
        embeds: float[N, D] token embeddings; rows at `slots` are overwritten and get no gradient.
        features: float[K, D], in the order of the slots.
        slots: int64[K].

    Returns:
        float[N, D].

    Raises:
        ValueError: the codec reserved another number of tokens than the network made.
    """
    if features.shape[0] != slots.shape[0]:
        raise ValueError(
            f"the codec reserved {slots.shape[0]} image tokens but the network made {features.shape[0]} features; "
            "num_tokens of the system's codec and its connector disagree"
        )
    return embeds.index_copy(0, slots, features.to(embeds.dtype))


def token_loss(logits: Tensor, targets: Tensor, weights: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Weighted sum of the cross-entropy over label positions.

    Args:
        logits: float[L, vocabulary].
        targets: int64[L].
        weights: float32[L].

    Returns:
        float32[], zero (with a gradient path) when L is 0.
    """
    losses = F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)
    return (losses * weights).sum()


def projected_loss(
    project: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    vocabulary: int,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`token_loss` of `project(hidden)`, of so many labels at once as make `MOST_LOGITS`.

    The logits of a part are made again in the backward pass, which costs the projection at the label positions once
    more. Fewer labels are one part, of which nothing is made again.

    Args:
        project: float[n, D] -> float[n, vocabulary].
        hidden: float[L, D].
        targets: int64[L].
        weights: float32[L].
    """

    def loss(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return token_loss(project(hidden), targets, weights, label_smoothing=label_smoothing)

    rows = max(1, MOST_LOGITS // vocabulary)
    if len(hidden) <= rows:
        return loss(hidden, targets, weights)
    parts = zip(hidden.split(rows), targets.split(rows), weights.split(rows), strict=True)
    losses: list[Tensor] = [checkpoint(loss, *part, use_reentrant=False) for part in parts]
    return torch.stack(losses).sum()


def zero_from(parameters: Iterable[nn.Parameter]) -> Tensor | float:
    """0, connected to every trained parameter: DDP waits for gradients of all of them, also in a step without images.

    Sharded parameters are left out: FSDP does not wait, and the module gives them their zero before the optimizer.
    """
    return sum((p.sum() * 0.0 for p in parameters if p.requires_grad and not isinstance(p, DTensor)), 0.0)


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
    """The positions of a square grid for another one: bicubic, corners not aligned, no antialiasing, float32 or more.

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
    image = table.to(torch.promote_types(table.dtype, torch.float32)).unflatten(0, (side, side)).permute(2, 0, 1)[None]
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return image[0].permute(1, 2, 0).flatten(0, 1).to(table.dtype)
