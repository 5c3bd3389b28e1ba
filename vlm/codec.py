"""From a sample to tensors: the one place that knows how a system sees text and images.

Every system makes its `Codec` once (`make_codec`), from configuration alone: no weights, no GPU, picklable. Data
modules, loader workers, the planner, `predict` and the model's own count check all ask the same object.

`encode` is cheap: it renders and tokenizes but decodes no image, so a step can be encoded to know its true token counts
before it is dealt. `collate` decodes the images of one pack.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlm.batch import Batch, Row, SampleInfo, TokenSequence, Views
from vlm.geometry import Box, Placement, View
from vlm.sample import Places, Sample
from vlm.seeding import seed_from


@dataclass(frozen=True)
class Encoded:
    """One sample as token sequences, its images not decoded yet.

    Attributes:
        sample: what it was made from (`collate` reads its images).
        text: sequences of `Batch.text`: one, or several when a sample is several documents.
        rows: sequences of each further row.
        counts: what the sample adds to each denominator of the step: per loss term the sum of trained weights.
        seed: made from (seed, epoch, sample); every random choice that belongs to the sample (augmentation, prefix
            split, caption pick) is drawn from it, never from the rank or the position in the batch. None in evaluation:
            no augmentation, and choices take their fixed form.
        filler: see `SampleInfo.filler`.
        places: what the sample names in its images, which limits how they may be augmented (`vlm.vision.augment`).
    """

    sample: Sample
    text: tuple[TokenSequence, ...]
    rows: Mapping[str, tuple[TokenSequence, ...]] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    seed: int | None = None
    filler: bool = False
    places: Places = "unnamed"

    @property
    def num_tokens(self) -> int:
        """Tokens over all rows, image tokens included: what packs are balanced by."""
        sequences = [*self.text, *(s for row in self.rows.values() for s in row)]
        return sum(len(sequence.ids) for sequence in sequences)

    def info(self) -> SampleInfo:
        s = self.sample
        return SampleInfo(s.id, s.source, s.task, s.group, s.answers, s.choices, self.filler)


@dataclass(frozen=True)
class Sizes:
    """What the step that samples fall into has to know of them: an array each, which costs no Python per sample.

    Attributes:
        tokens: int64[n], `Encoded.num_tokens`; -1 for a sample that cannot be trained on.
        images: int64[n], how many.
        counts: float64[n] by name, `Encoded.counts`; NaN for a sample that has none of this name.
    """

    tokens: np.ndarray
    images: np.ndarray
    counts: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, items: Sequence[Encoded | None]) -> "Sizes":
        """Of samples in this order; None for one that cannot be trained on."""
        names = dict.fromkeys(name for item in items if item is not None for name in item.counts)
        return cls(
            np.array([-1 if item is None else item.num_tokens for item in items], dtype=np.int64),
            np.array([0 if item is None else len(item.sample.images) for item in items], dtype=np.int64),
            {name: np.array([np.nan if i is None else i.counts.get(name, np.nan) for i in items]) for name in names},
        )

    @classmethod
    def together(cls, shares: Sequence[tuple[np.ndarray, "Sizes"]]) -> "Sizes":
        """Of all samples, from (places, sizes) of shares of them that make up the whole."""
        num = sum(len(places) for places, _ in shares)
        names = dict.fromkeys(name for _, share in shares for name in share.counts)
        whole = cls(np.empty(num, np.int64), np.empty(num, np.int64), {name: np.full(num, np.nan) for name in names})
        for places, share in shares:
            whole.tokens[places], whole.images[places] = share.tokens, share.images
            for name, values in share.counts.items():
                whole.counts[name][places] = values
        return whole

    def without(self, places: Sequence[int]) -> "Sizes":
        """These samples cannot be trained on."""
        tokens = self.tokens.copy()
        tokens[list(places)] = -1
        return replace(self, tokens=tokens)

    def totals(self) -> dict[str, float]:
        """Denominators of a step: what its samples add up to, how many there are, and how many images."""
        good = self.tokens >= 0
        found = {"samples": float(good.sum()), "images": float(self.images[good].sum())}
        for name, values in self.counts.items():
            given = values[good & ~np.isnan(values)]
            if len(given):
                found[name] = float(np.add.accumulate(given)[-1])  # one by one: sums of floats depend on the order
        return found


class Codec(ABC):
    """How one system sees a sample. Subclasses hold plain data and tokenizers only: they travel to worker processes.

    Attributes:
        resolutions: values of `Sample.resolution` that `encode` and `collate` obey.
        joins_views: the views of an image are the patches of one map, row by row.
        needs_image: a sample without an image cannot be encoded.
        min_images: how many images a sample has to have where it needs any.
        answers: all answers that there are; empty: any text is one.
    """

    resolutions: Sequence[str] = ()
    joins_views: bool = False
    needs_image: bool = False
    min_images: int = 1
    answers: Sequence[str] = ()

    @abstractmethod
    def num_tokens(self, width: int, height: int) -> int:
        """Tokens that one image of this size takes in the language model's row."""

    def render_regions(self, sample: Sample, *, seed: int | None = None) -> Sample:
        """The sample with phrases and regions as the text that the system reads and writes.

        Raises:
            SampleError: the system cannot write one of them, or does not see it.
        """
        return sample

    def view(self, width: int, height: int, *, image: int = 0, seed: int | None = None) -> View:
        """What the system sees of an image of this size, and the frame that places in its texts count from.

        Args:
            image: its number in the sample.
            seed: of the sample, for a view that is augmented. The sample is one with regions, so never mirrored.
        """
        return View(Placement(), (width, height))

    def find_boxes(self, text: str, *, size: tuple[float, float]) -> list[Box]:
        """Boxes in a text of the system, in shares of `View.size` pixels; none that make no sense."""
        return []

    @abstractmethod
    def encode(self, sample: Sample, *, seed: int | None = None, generate: bool = False) -> Encoded:
        """Token sequences and labels of a sample.

        Args:
            seed: source of the sample's own random choices; None in evaluation.
            generate: leave out the last assistant message unless it is only begun, and end where the answer has to
                begin or to go on; no labels.

        Raises:
            SampleError: the sample cannot be trained on (too long, no label, no image where one is needed).
        """

    @abstractmethod
    def collate(self, items: Sequence[Encoded], *, counts: Mapping[str, float], packs: int = 1) -> Batch:
        """One pack; decodes the images. `counts` are the denominators of the whole step."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Generated ids as text, special tokens and the stop mark removed."""


def pack_rows(items: Sequence[Encoded], *, streams: Sequence[str] = ()) -> tuple[Row, dict[str, Row]]:
    """`Batch.text` and `Batch.rows` of a pack.

    Args:
        streams: names of the streams of views that have slots in a row.
    """

    def row(sequences: Iterable[Sequence[TokenSequence]]) -> Row:
        return Row.pack([replace(s, owner=owner) for owner, found in enumerate(sequences) for s in found], streams)

    names = dict.fromkeys(name for item in items for name in item.rows)
    return row(item.text for item in items), {name: row(item.rows.get(name, ()) for item in items) for name in names}


@dataclass(frozen=True)
class ViewStream:
    """How images become the views of one stream.

    Attributes:
        transform: image -> uint8[3, H, W], or uint8[tiles, 3, H, W] where an image has several views; or these and
            float32[3, H, W], a view of the whole that only normalised pixels make.
        table: float32[3, 256], what each level of a colour becomes.
        grid: width, height -> (columns, rows) of an image's tiles; None: it has none.
    """

    transform: Callable[[Image.Image], Tensor | tuple[Tensor, Tensor]]
    table: Tensor
    grid: Callable[[int, int], tuple[int, int]] | None = None


def read_views(
    items: Sequence[Encoded],
    streams: Callable[..., Mapping[str, ViewStream]],
    *,
    augment: Callable[..., Image.Image] | None = None,
) -> dict[str, Views]:
    """All images of a pack by stream of views, each image decoded once for all of them; {} when it has none.

    Args:
        streams: sample, `seed` -> how its images are seen; the names are the same for every sample.
        augment: what happens to an image before it in training, given `seed` and `places`.
    """
    values: dict[str, list[Tensor]] = {}
    wholes: dict[str, list[Tensor]] = {}
    tables: dict[str, Tensor] = {}
    grids: dict[str, list[tuple[int, int]]] = {}
    owners, sizes = [], []
    for owner, item in enumerate(items):
        seen = streams(item.sample, seed=item.seed)
        for index, file in enumerate(item.sample.images):
            image = file.read(item.sample)
            size = image.size
            owners.append(owner)
            sizes.append(size)
            if augment is not None and item.seed is not None:
                image = augment(image, seed=seed_from(item.seed, index), places=item.places)
            for name, stream in seen.items():
                made = stream.transform(image)
                levels, *whole = made if isinstance(made, tuple) else (made,)
                values.setdefault(name, []).append(levels if levels.ndim == 4 else levels[None])
                wholes.setdefault(name, []).extend(whole)
                tables[name] = stream.table
                grids.setdefault(name, []).append((1, 1) if stream.grid is None else stream.grid(*size))
    return {
        name: Views(
            torch.cat(views),
            image_of_view=torch.repeat_interleave(
                torch.tensor([len(of_image) + bool(wholes[name]) for of_image in views])
            ),
            sample_of_image=torch.tensor(owners),
            grid=tuple(grids[name]),
            size=tuple(sizes),
            table=tables[name],
            whole=torch.stack(wholes[name]) if wholes[name] else None,
        )
        for name, views in values.items()
    }


def step_counts(items: Iterable[Encoded]) -> dict[str, float]:
    """Denominators of a step of these samples (`Sizes.totals`)."""
    return Sizes.of([item for item in items if not item.filler]).totals()
