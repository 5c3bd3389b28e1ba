"""What of a source shows something, for systems that take no text alone."""

from functools import cached_property

import numpy as np

from vlm.data.sources.base import Source
from vlm.data.wrappers.wrapped import Wrapped
from vlm.errors import UserError
from vlm.sample import Sample


class WithImages(Wrapped):
    """The samples of a source that have an image; how many are left out is said before a run.

    Args:
        source: where they come from; one whose samples lie in blocks (a stream) is refused.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source)

    @cached_property
    def _kept(self) -> np.ndarray:
        if self.source.blocks() is not None:
            raise UserError(f"WithImages: {self.name!r} comes in blocks; leave streaming out of the source")
        return np.flatnonzero(self.source.image_mask())

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples with an image, asked for number {index}")
        return self.source[int(self._kept[index])]

    def has_image(self, index: int) -> bool:
        return 0 <= index < len(self)

    def image_mask(self) -> np.ndarray:
        return np.ones(len(self), dtype=bool)

    def place(self, index: int) -> tuple[str, int]:
        return self.source.place(int(self._kept[index]))

    def notes(self) -> list[str]:
        left_out = len(self.source) - len(self)
        return [
            *self.source.notes(),
            *([f"{self.name}: {left_out:,} samples without an image left out"] * (left_out > 0)),
        ]

    def blocks(self) -> None:
        return None
