"""Patch info mining: every low-resolution feature looks into its own part of a high-resolution map."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchMining(nn.Module):
    """Attention of each feature over the window of the map that it covers (Mini-Gemini, Li et al., 2024).

    ::

        q = query(low)                       one per feature
        k, v = key(high), value(high)        those of its window
        softmax(q k / sqrt(D)) v             one head, no projection behind it

    Each of the three maps is a LayerNorm and a linear layer of its own. They are not applied to the places of the map,
    of which there are 64 for every feature: a key's layer goes to the query instead, a value's to what was found. That
    is the same sum in another order, in a thousandth of the operations (at 576 features and 36,864 places of 2,880
    channels), and the normalised map is all that the backward pass keeps.

    Args:
        dim: width D of the low-resolution features.
        high_dim: width of the map's.
    """

    def __init__(self, dim: int, high_dim: int) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))
        self.key = nn.Sequential(nn.LayerNorm(high_dim), nn.Linear(high_dim, dim))
        self.value = nn.Sequential(nn.LayerNorm(high_dim), nn.Linear(high_dim, dim))

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """What each feature found.

        Args:
            low: float[V, P, D], a square grid row by row.
            high: float[V, Q, A], a square map row by row, Q a square multiple of P.

        Returns:
            float[V, P, D]; what it is added to (the raw `low`) is the caller's.
        """
        parts: Any = (*self.key, *self.value)
        norm, key, scale, layer = parts
        seen = windows(F.layer_norm(high, high.shape[-1:], eps=norm.eps).to(high.dtype), low.shape[1])
        query = self.query(low) * low.shape[-1] ** -0.5
        # query . (W (g x + b) + c) = (query W g) . x + query . (W b + c)
        wanted = query @ (key.weight * norm.weight)
        scores = wanted[:, :, None] @ seen.transpose(-1, -2) + (query @ key(norm.bias))[:, :, None, None]
        found = (scores.softmax(-1) @ seen).squeeze(2)
        return layer(found * scale.weight + scale.bias)


def windows(high: Tensor, num_windows: int) -> Tensor:
    """A square map as equal square windows.

    Args:
        high: float[V, Q, A], row by row.
        num_windows: P, a square number.

    Returns:
        float[V, P, Q / P, A]: windows row by row, and places row by row inside each.

    Raises:
        ValueError: the map cannot be cut like that.
    """
    views, places, dim = high.shape
    side, count = round(places**0.5), round(num_windows**0.5)
    if side * side != places or count * count != num_windows or side % count:
        raise ValueError(f"a map of {places} places cannot be cut into {num_windows} square windows")
    cut = high.reshape(views, count, side // count, count, side // count, dim)
    return cut.transpose(2, 3).reshape(views, num_windows, places // num_windows, dim)


def shrunk(high: Tensor, factor: int) -> Tensor:
    """A square map at a fraction of its side, bilinear and not antialiased.

    Args:
        high: float[V, Q, A], row by row.

    Returns:
        float[V, Q / factor ** 2, A].
    """
    side = round(high.shape[1] ** 0.5)
    image = high.transpose(1, 2).unflatten(2, (side, side))
    small = F.interpolate(image.float(), scale_factor=1 / factor, mode="bilinear").to(high.dtype)
    return small.flatten(2).transpose(1, 2)


def mine_views(mining: PatchMining, low: Tensor, high: Tensor, *, grid: int) -> Tensor:
    """What the features of several views of an image find in the one map of it.

    Args:
        low: float[V, views, P, D]: the whole image where there is one view more than parts, then its `grid` x `grid`
            parts row by row. A part looks into its own part of the map, the whole into the map made smaller.
        high: float[V, Q, A], a square map row by row.

    Returns:
        float[V, views, P, D].
    """
    views, parts = low.shape[1], grid * grid
    assert views in (parts, parts + 1), (views, grid)
    maps = windows(high, parts).flatten(0, 1) if grid > 1 else high
    found = mining(low[:, views - parts :].flatten(0, 1), maps).unflatten(0, (-1, parts))
    if views == parts:
        return found
    return torch.cat([mining(low[:, 0], shrunk(high, grid))[:, None], found], dim=1)
