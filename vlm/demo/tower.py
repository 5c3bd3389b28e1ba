"""Pretrains the demo's vision towers on training scenes: each patch learns what it lies on.

CLIP learned from 400 million captions, which no laptop repeats; what matters for a demo is that the tower knows the
world before the connector meets it, and was never told which question will be asked.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vlm.demo.gui import make_crowded_screen, make_screen
from vlm.demo.one_cycle import OneCycle
from vlm.demo.scenes import COLORS, GROUNDS, Box, Content, Scene, make_scene
from vlm.demo.sprites import LETTERS, NOUNS, WORDS, letter_spans
from vlm.levels import level_table, levels_of, look_up
from vlm.vision import Pyramid
from vlm.vision.preprocess import CLIP_MEAN, CLIP_STD, ImageTransform

_NOTHING = -1.0
_EMPTY_SHARE = 0.2
_CROWDED_SHARE, _SCENES_SHARE = 0.5, 0.2
_NAMES = {noun.name: index for index, noun in enumerate(NOUNS)}
_SHADES = {color: index for index, color in enumerate(COLORS)}
_INKS = {word: index for index, word in enumerate(WORDS)}
_LETTERS = {letter: index for index, letter in enumerate(LETTERS)}


class Picture(Protocol):
    """A scene or a screen."""

    @property
    def contents(self) -> list[Content]: ...


Placed = Sequence[tuple[Picture, Box]]
"""Pictures, and where each lies in a view."""


def padded_scene(random: Random, size: int) -> tuple[Image.Image, Placed]:
    """One scene in the middle of a square."""
    scene = make_scene(random, split="train", size=96)
    return ImageTransform(size, mode="pad").square(scene.draw()), [(scene, padded_place(scene))]


def padded_place(scene: Scene) -> Box:
    """Where a scene lies on the square of its longer side."""
    side = max(scene.width, scene.height)
    left, top = (side - scene.width) / 2, (side - scene.height) / 2
    return left / side, top / side, (left + scene.width) / side, (top + scene.height) / side


def squashed_scene(random: Random, size: int) -> tuple[Image.Image, list[tuple[Scene, Box]]]:
    """One scene, squashed to a square."""
    scene = make_scene(random, split="train", size=96)
    return scene.draw().resize((size, size), Image.Resampling.BICUBIC), [(scene, (0.0, 0.0, 1.0, 1.0))]


def screen(random: Random, size: int) -> tuple[Image.Image, Placed]:
    """A screen of elements, squashed to a square, often a crowded one, or one to nine scenes: small beside large."""
    kind = random.random()
    if kind < _SCENES_SHARE:
        return rows_of_scenes(random, size)
    if kind < _SCENES_SHARE + _CROWDED_SHARE:
        shown = make_crowded_screen(random, size=96)
    else:
        shown = make_screen(random, split="train", size=96)
    return shown.draw().resize((size, size), Image.Resampling.BICUBIC), [(shown, (0.0, 0.0, 1.0, 1.0))]


def rows_of_scenes(random: Random, size: int) -> tuple[Image.Image, Placed]:
    """One to nine scenes in rows, some places of them empty."""
    across = random.choice((1, 2, 2, 3))
    cell = size // across
    image = Image.new("RGB", (size, size), random.choice(GROUNDS))
    placed: list[tuple[Scene, Box]] = []
    for at in range(across * across):
        if across > 1 and random.random() < _EMPTY_SHARE:
            continue
        scene = make_scene(random, split="train", size=96)
        width, height = (round(cell * random.uniform(0.8, 1.0)) for _ in range(2))
        x = at % across * cell + random.randint(0, cell - width)
        y = at // across * cell + random.randint(0, cell - height)
        image.paste(scene.draw().resize((width, height), Image.Resampling.BICUBIC), (x, y))
        placed.append((scene, (x / size, y / size, (x + width) / size, (y + height) / size)))
    return image, placed


View = Callable[[Random, int], tuple[Image.Image, Placed]]
"""(chance, side in pixels) -> (square RGB image, what lies where on it)."""


class LabelledViews(Dataset):
    """(pixels float32[3, size, size], what each patch lies on float32[P, 8]) of view number `index`."""

    def __init__(self, view: View, *, size: int, grid: int, num: int) -> None:
        self.view, self.size, self.grid, self.num = view, size, grid, num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, placed = self.view(Random(f"tower {index}"), self.size)
        pixels = look_up(levels_of(image), level_table(CLIP_MEAN, CLIP_STD))
        return pixels, patch_labels(placed, grid=self.grid)


def patch_labels(placed: Placed, *, grid: int) -> Tensor:
    """What the middle of each patch of a view lies on.

    Returns:
        float32[grid * grid, 8]: number of the noun, of the color and of the word, each -1 for none; the box of the
        card, sign or element as shares of the view's side; the number of the letter of an English word.
    """
    labels = torch.full((grid, grid, 8), _NOTHING)
    centres = (torch.arange(grid) + 0.5) / grid
    for picture, place in placed:
        for content in picture.contents:
            box = _within(content.box, place)
            names = [_number(content.noun, _NAMES), _number(content.color, _SHADES), _number(content.word, _INKS)]
            labels[_inside(centres, box)] = torch.tensor([*names, *box, _NOTHING])
            if content.word is not None and content.word.isascii() and content.ink is not None:
                x0, y0, x1, y1 = _within(content.ink, place)
                for letter, start, end in letter_spans(content.word):
                    part = (x0 + start * (x1 - x0), y0, x0 + end * (x1 - x0), y1)
                    labels[..., 7][_inside(centres, part)] = _LETTERS[letter]
    return labels.flatten(0, 1)


def _within(box: Box, place: Box) -> Box:
    """A box of a picture as shares of the view that the picture takes `place` in."""
    x0, y0, x1, y1 = box
    left, top, right, bottom = place
    return left + x0 * (right - left), top + y0 * (bottom - top), left + x1 * (right - left), top + y1 * (bottom - top)


def _inside(centres: Tensor, box: Box) -> Tensor:
    """bool[grid, grid]: which patches have their middle in a box."""
    x0, y0, x1, y1 = box
    return ((centres >= y0) & (centres < y1))[:, None] & (centres >= x0) & (centres < x1)


def _number(name: str | None, numbers: Mapping[str, int]) -> float:
    return _NOTHING if name is None else numbers[name]


class _Heads(nn.Module):
    """Linear readers of a feature; they are thrown away."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.sizes = (len(NOUNS) + 1, len(COLORS) + 1, len(WORDS) + 1, len(LETTERS) + 1)
        self.content = nn.Linear(dim, sum(self.sizes))
        self.box = nn.Linear(dim, 4)

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, float[5]: share of the patches that know noun, color, word and letter, mean error of their box)."""
        logits = self.content(features).split(self.sizes, dim=-1)
        wanted = (labels[..., [0, 1, 2, 7]] + 1).long()
        loss = sum(F.cross_entropy(part.flatten(0, 1), wanted[..., i].flatten()) for i, part in enumerate(logits))
        on_something = labels[..., 3] >= 0
        boxes, found = labels[..., 3:7][on_something], self.box(features)[on_something]
        loss = loss + 5 * F.smooth_l1_loss(found, boxes, beta=0.05)
        right = [
            (part.argmax(-1) == wanted[..., i])[wanted[..., i] > 0].float().mean() for i, part in enumerate(logits)
        ]
        return torch.as_tensor(loss), torch.stack([*right, (found - boxes).abs().mean()]).detach()


def train_tower(
    trunk: Any, *, steps: int, view: View = padded_scene, batch: int = 48, rate: float = 1.5e-3, workers: int = 1
) -> Iterator[str]:
    """Trains a timm vision transformer in place.

    The readers look at the last block and at the one before it, because the systems differ in which of them they use.

    Args:
        view: what it sees.

    Yields:
        A line of progress every hundred steps.
    """
    size, grid, depth = trunk.patch_embed.img_size[0], trunk.patch_embed.grid_size[0], len(trunk.blocks)

    def read(pixels: Tensor) -> list[Tensor]:
        _, (before, last) = trunk.forward_intermediates(pixels, indices=[depth - 2, depth - 1], output_fmt="NLC")
        return [before, trunk.norm(last)]

    data = LabelledViews(view, size=size, grid=grid, num=steps * batch)
    return _teach(trunk, read, data, dims=(trunk.embed_dim,) * 2, batch=batch, rate=rate, workers=workers)


def train_pyramid(
    tower: Pyramid, *, steps: int, batch: int = 32, rate: float = 2e-3, workers: int = 1
) -> Iterator[str]:
    """Trains a ConvNeXt whose stages are all features in place: each place of its map learns what it lies on.

    Yields:
        A line of progress every hundred steps.
    """
    facts = tower.facts
    data = LabelledViews(padded_scene, size=facts.image_size, grid=facts.grid, num=steps * batch)
    return _teach(tower, lambda x: [tower(x)], data, dims=(facts.dim,), batch=batch, rate=rate, workers=workers)


def _teach(
    tower: nn.Module,
    read: Callable[[Tensor], list[Tensor]],
    data: LabelledViews,
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
            noun, color, word, letter, box = told[0][1].tolist()
            found = f"noun {noun:.3f} color {color:.3f} word {word:.3f} letter {letter:.3f} box error {box:.4f}"
            yield f"{step + 1}: {found}"
