"""Pretrains the demo's vision towers on training scenes: each patch learns what it lies on.

CLIP learned from 400 million captions, which no laptop repeats; what matters for a demo is that the tower knows the
world before the connector meets it, and was never told which question will be asked.
"""

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vlm.demo.one_cycle import OneCycle
from vlm.demo.scenes import COLORS, Scene, make_scene
from vlm.demo.sprites import NOUNS, WORDS
from vlm.vision import Pyramid
from vlm.vision.preprocess import ImageTransform

_NOTHING = -1.0
_NAMES = {noun.name: index for index, noun in enumerate(NOUNS)}
_SHADES = {color: index for index, color in enumerate(COLORS)}
_INKS = {word: index for index, word in enumerate(WORDS)}


class _Patches(Dataset):
    """(pixels float32[3, size, size], what each patch lies on float32[P, 7]) of scene number `index`."""

    def __init__(self, *, size: int, grid: int, num: int, first: int = 0) -> None:
        self.size, self.grid, self.num, self.first = size, grid, num, first

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        random = Random(f"tower {self.first + index}")
        scene = make_scene(random, split="train", size=96)
        pixels = ImageTransform(self.size, mode="pad")(scene.draw())
        return pixels, patch_labels(scene, grid=self.grid)


def patch_labels(scene: Scene, *, grid: int) -> Tensor:
    """What the middle of each patch of the padded image lies on.

    Returns:
        float32[grid * grid, 7]: number of the noun, of the color and of the word, each -1 for none; then the box of
        the card or sign as shares of the padded side.
    """
    side = max(scene.width, scene.height)
    shift = ((side - scene.width) / 2, (side - scene.height) / 2)
    found: list[tuple[list[float], tuple[float, ...]]] = []
    for thing in scene.things:
        found.append(([_NAMES[thing.noun.name], _SHADES[thing.color], _NOTHING], thing.box))
    if scene.sign is not None:
        found.append(([_NOTHING, _SHADES[scene.sign.color], _INKS[scene.sign.word]], scene.sign.box))
    labels = torch.full((grid, grid, 7), _NOTHING)
    centres = (torch.arange(grid) + 0.5) / grid
    for content, (x0, y0, x1, y1) in found:
        box = [(x0 * scene.width + shift[0]) / side, (y0 * scene.height + shift[1]) / side,
               (x1 * scene.width + shift[0]) / side, (y1 * scene.height + shift[1]) / side]  # fmt: skip
        inside_x = (centres >= box[0]) & (centres < box[2])
        inside_y = (centres >= box[1]) & (centres < box[3])
        labels[inside_y[:, None] & inside_x] = torch.tensor([*content, *box])
    return labels.flatten(0, 1)


class _Heads(nn.Module):
    """Linear readers of a feature; they are thrown away."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.sizes = (len(NOUNS) + 1, len(COLORS) + 1, len(WORDS) + 1)
        self.content = nn.Linear(dim, sum(self.sizes))
        self.box = nn.Linear(dim, 4)

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, float[4]: share of the patches that know noun, color and word, mean error of their box)."""
        logits = self.content(features).split(self.sizes, dim=-1)
        wanted = (labels[..., :3] + 1).long()
        loss = sum(F.cross_entropy(part.flatten(0, 1), wanted[..., i].flatten()) for i, part in enumerate(logits))
        on_something = labels[..., 3] >= 0
        boxes, found = labels[..., 3:][on_something], self.box(features)[on_something]
        loss = loss + 5 * F.smooth_l1_loss(found, boxes, beta=0.05)
        right = [
            (part.argmax(-1) == wanted[..., i])[wanted[..., i] > 0].float().mean() for i, part in enumerate(logits)
        ]
        return torch.as_tensor(loss), torch.stack([*right, (found - boxes).abs().mean()]).detach()


def train_tower(trunk: Any, *, steps: int, batch: int = 48, rate: float = 1.5e-3, workers: int = 1) -> Iterator[str]:
    """Trains a timm vision transformer in place.

    The readers look at the last block and at the one before it, because the systems differ in which of them they use.

    Yields:
        A line of progress every hundred steps.
    """
    size, grid, depth = trunk.patch_embed.img_size[0], trunk.patch_embed.grid_size[0], len(trunk.blocks)

    def read(pixels: Tensor) -> list[Tensor]:
        _, (before, last) = trunk.forward_intermediates(pixels, indices=[depth - 2, depth - 1], output_fmt="NLC")
        return [before, trunk.norm(last)]

    data = _Patches(size=size, grid=grid, num=steps * batch)
    return _teach(trunk, read, data, dims=(trunk.embed_dim,) * 2, batch=batch, rate=rate, workers=workers)


def train_pyramid(
    tower: Pyramid, *, steps: int, batch: int = 32, rate: float = 2e-3, workers: int = 1
) -> Iterator[str]:
    """Trains a ConvNeXt whose stages are all features in place: each place of its map learns what it lies on.

    Yields:
        A line of progress every hundred steps.
    """
    facts = tower.facts
    data = _Patches(size=facts.image_size, grid=facts.grid, num=steps * batch)
    return _teach(tower, lambda x: [tower(x)], data, dims=(facts.dim,), batch=batch, rate=rate, workers=workers)


def _teach(
    tower: nn.Module,
    read: Callable[[Tensor], list[Tensor]],
    data: _Patches,
    *,
    dims: Sequence[int],
    batch: int,
    rate: float,
    workers: int,
) -> Iterator[str]:
    """Trains a tower and a reader of each of the features float[V, P, D] that `read` makes of pixels."""
    readers = nn.ModuleList(_Heads(dim) for dim in dims)
    parameters = [*tower.parameters(), *readers.parameters()]
    steps = len(data) // batch
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    cycle = OneCycle(optimizer, steps=steps)
    for step, (pixels, labels) in enumerate(DataLoader(data, batch_size=batch, num_workers=workers)):
        told = [reader(features, labels) for reader, features in zip(readers, read(pixels), strict=True)]
        loss = torch.stack([loss for loss, _ in told]).sum()
        cycle.step(loss)
        if step % 100 == 99 or step == steps - 1:
            noun, color, word, box = told[0][1].tolist()
            yield f"{step + 1}: noun {noun:.3f} color {color:.3f} word {word:.3f} box error {box:.4f}"
