"""At which resolution the images of a data set are shown, where sets differ.

InternLM-XComposer2-4KHD shows two of its data sets at their full resolution and draws another one for each image of
the rest. What such a policy means is the codec's business; it names those it knows (`Codec.resolutions`).
"""

import dataclasses

from vlm.data.sources.base import Source
from vlm.data.wrappers.wrapped import Wrapped
from vlm.sample import Sample


class WithResolution(Wrapped):
    """A source whose samples ask for a resolution.

    Args:
        source: where they come from.
        resolution: one of the words that the system's codec knows.
    """

    def __init__(self, source: Source, resolution: str) -> None:
        super().__init__(source)
        self.resolution = resolution

    def __getitem__(self, index: int) -> Sample:
        return dataclasses.replace(self.source[index], resolution=self.resolution)
