"""At which resolution the pictures of a data set are shown, where sets differ.

InternLM-XComposer2-4KHD shows two of its data sets at their full resolution and draws another one for each picture of
the rest. What such a policy means is the codec's business; it names those it knows (`Codec.resolutions`).
"""

import dataclasses

import numpy as np

from vlm.data.sources.base import Source
from vlm.sample import Sample


class WithResolution(Source):
    """A source whose samples ask for a resolution.

    Args:
        source: where they come from.
        resolution: one of the words that the system's codec knows.
    """

    def __init__(self, source: Source, resolution: str) -> None:
        self.source = source
        self.resolution = resolution
        self.name = source.name

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return dataclasses.replace(self.source[index], resolution=self.resolution)

    def place(self, index: int) -> tuple[str, int]:
        return self.source.place(index)

    def has_image(self, index: int) -> bool:
        return self.source.has_image(index)

    def image_mask(self) -> np.ndarray:
        return self.source.image_mask()
