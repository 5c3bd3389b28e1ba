"""The samples that a tool looks at."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm.codec import Codec
from vlm.data.loading.encoder import Encoder
from vlm.data.modules.base import VisionLanguageData
from vlm.data.sources.base import Concat


@dataclass(frozen=True)
class Part:
    """Training or validation.

    Attributes:
        name: `training` or `validation`.
        encoder: its samples and how they become tokens.
        indices: int64[n], those that are looked at.
    """

    name: str
    encoder: Encoder
    indices: np.ndarray

    @property
    def samples(self) -> Concat:
        assert isinstance(self.encoder.samples, Concat)
        return self.encoder.samples


def parts_of(data: VisionLanguageData, codec: Codec, *, limit: int | None = None) -> list[Part]:
    """What there is to look at.

    Args:
        limit: at most so many samples of each source, evenly spread.
    """
    parts = []
    for name, sources in (("training", data.sources), ("validation", data.val_sources)):
        if not sources:
            continue
        samples = Concat(sources)
        encoder = Encoder(samples, codec, data.seed, data.preparation(), training=name == "training")
        starts = [0, *samples.ends.tolist()]
        chosen = [
            start + (np.arange(min(limit or size, size)) * size // min(limit or size, size))
            for start, size in ((a, b - a) for a, b in itertools.pairwise(starts))
            if size
        ]
        parts.append(Part(name, encoder, np.concatenate(chosen)))
    return parts


def locate(parts: Sequence[Part], number: int) -> tuple[Part, int]:
    """Of sample `number` of all that are looked at: its part, and its index there."""
    for part in parts:
        if number < len(part.indices):
            return part, int(part.indices[number])
        number -= len(part.indices)
    raise IndexError(number)
