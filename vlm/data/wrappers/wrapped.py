"""A source around another one."""

import numpy as np

from vlm.data.sampling.order import Blocks
from vlm.data.sources.base import Source, Tell


class Wrapped(Source):
    """Samples of another source, each of them changed. What is not changed is asked of the other one.

    Args:
        source: where the samples come from.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.name = source.name

    def __len__(self) -> int:
        return len(self.source)

    def has_image(self, index: int) -> bool:
        return self.source.has_image(index)

    def place(self, index: int) -> tuple[str, int]:
        return self.source.place(index)

    def image_mask(self) -> np.ndarray:
        return self.source.image_mask()

    def notes(self) -> list[str]:
        return self.source.notes()

    def blocks(self) -> Blocks | None:
        return self.source.blocks()

    def open_together(self, tell: Tell, *, world: int, rank: int) -> None:
        self.source.open_together(tell, world=world, rank=rank)
