"""Scores of all pairs of a test set, made by the ranks together."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

_BEHIND = -100.0
"""Added to the score of a pair that is not looked at again; published code takes this alone, and so leaves the order of
such pairs to chance."""

_PRODUCTS = 2**24
"""Of an image's embeddings with a text's at a time."""


def similarities(images: Tensor, texts: Tensor) -> Tensor:
    """float[I, T] scores of all pairs of float[I, D] or float[I, Q, D] and float[T, D]."""
    if images.ndim == 2:
        return images @ texts.T
    return torch.einsum("iqd,td->iqt", images, texts).amax(1)


class Kept(NamedTuple):
    """What one rank has heard: `Embeddings` of all its packs, and which image each of them shows or means."""

    image: Tensor
    text: Tensor
    images: list[str]
    texts: list[str]
    text_state: Tensor | None
    image_state: Tensor | None
    state_shape: tuple[int, ...] | None = None

    def shared(self) -> "Kept":
        """What other ranks need of it."""
        shape = None if self.image_state is None else tuple(self.image_state.shape[1:])
        return self._replace(image_state=None, state_shape=shape)


class Pairs(NamedTuple):
    """Pairs that were looked at: int64[P, 2] image and text, and float[P], what they are worth."""

    places: Tensor
    scores: Tensor


class Table:
    """Scores of all images with all texts. A rank makes the rows of its own images and the columns of its own texts,
    some at a time, and never has the whole.

    Args:
        everyone: what each rank has heard.
        again: pairs that were looked at, all others come behind them.

    Attributes:
        own_images, own_texts: which ones are this rank's.
    """

    def __init__(self, everyone: Sequence[Kept | None], again: Pairs | None = None) -> None:
        ranks = [part for part in everyone if part is not None]
        self.images = torch.cat([part.image for part in ranks])
        self.texts = torch.cat([part.text for part in ranks])
        number: dict[str, int] = {}
        self._shown = torch.tensor([number.setdefault(name, len(number)) for part in ranks for name in part.images])
        self._meant = torch.tensor([number[name] for part in ranks for name in part.texts])
        rank = rank_of(everyone)
        self.own_images, self.own_texts = (
            _share([0 if part is None else len(getattr(part, kind)) for part in everyone], rank)
            for kind in ("images", "texts")
        )
        self._again = again

    def best(self, count: int) -> Tensor:
        """int64[N]: image * number of texts + text, of the best pairs of each of the own images and own texts."""
        found = [torch.zeros(0, dtype=torch.int64)]
        for start, scores in self._rows():
            at = torch.arange(start, start + len(scores))[:, None]
            found.append(at * len(self.texts) + scores.topk(min(count, scores.shape[1])).indices)
        for start, scores in self._columns():
            at = torch.arange(start, start + len(scores))[:, None]
            found.append(at + len(self.texts) * scores.topk(min(count, scores.shape[1])).indices)
        return torch.cat([pairs.flatten() for pairs in found])

    def scores_of(self, pairs: Tensor) -> Tensor:
        """float[P] of int64[P, 2] images and texts."""
        products = torch.einsum("p...d,pd->p...", self.images[pairs[:, 0]], self.texts[pairs[:, 1]])
        return products if products.ndim == 1 else products.amax(1)

    def first_right(self) -> dict[str, Tensor]:
        """int64[N]: how many texts stand before the first right one of each own image; images of each own text."""
        sides = {"TR": (self._rows, 0, self._shown, self._meant), "IR": (self._columns, 1, self._meant, self._shown)}
        places = {name: [torch.zeros(0, dtype=torch.int64)] for name in sides}
        for name, (blocks, side, asked, candidates) in sides.items():
            for start, scores in blocks():
                if self._again is not None:
                    scores = scores + _BEHIND
                    at, other = self._again.places[:, side] - start, self._again.places[:, 1 - side]
                    here = (at >= 0) & (at < len(scores))
                    scores[at[here], other[here]] = self._again.scores[here]
                places[name].append(_first_right(scores, asked[start : start + len(scores)], candidates))
        return {name: torch.cat(found) for name, found in places.items()}

    def _rows(self) -> Iterator[tuple[int, Tensor]]:
        """Of some of the own images at a time: which is the first, and float[i, T]."""
        for start, images in _blocks(self.images, self.own_images, len(self.texts)):
            yield start, similarities(images, self.texts)

    def _columns(self) -> Iterator[tuple[int, Tensor]]:
        """Of some of the own texts at a time: which is the first, and float[t, I]."""
        for start, texts in _blocks(self.texts, self.own_texts, self.images[..., 0].numel()):
            yield start, similarities(self.images, texts).T


def _share(sizes: Sequence[int], rank: int) -> range:
    start = sum(sizes[:rank])
    return range(start, start + sizes[rank])


def _blocks(rows: Tensor, own: range, others: int) -> Iterator[tuple[int, Tensor]]:
    size = max(1, _PRODUCTS // (others * rows[0, ..., 0].numel()))
    for start in range(own.start, own.stop, size):
        yield start, rows[start : min(start + size, own.stop)]


def _first_right(scores: Tensor, asked: Tensor, candidates: Tensor) -> Tensor:
    """int64[N]: how many candidates stand before the best right one, of float[N, C] scores; of equals the first."""
    right = candidates == asked[:, None]
    best = scores.masked_fill(~right, float("-inf")).amax(1, keepdim=True)
    first = (right & (scores == best)).int().argmax(1, keepdim=True)
    as_good = (scores == best) & (torch.arange(len(candidates)) < first)
    return (~(scores <= best) | as_good).sum(1)  # what is no number stands before all


def rank_of(everyone: Sequence[Any]) -> int:
    """This process's place among those that have exchanged something."""
    return distributed.get_rank() if len(everyone) > 1 else 0
