"""Images in the wrong place."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict

from vlm.data.sources.base import Source
from vlm.data.wrappers.wrapped import Wrapped
from vlm.errors import UserError
from vlm.sample import Sample
from vlm.seeding import seed_from


class ShuffledImages(Wrapped):
    """Samples with the images of others: each one gets those of the next, in a shuffled ring of all samples with the
    same number of images and other files. What a system still gets right, it got without looking.

    Raises:
        UserError: all samples with some number of images show the same ones.
    """

    def __init__(self, samples: Source, *, seed: int = 0) -> None:
        super().__init__(samples)
        rings: defaultdict[int, dict[object, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index in range(len(samples)):
            images = samples[index].images
            # bytes by content: without a file they all have one name
            shown = tuple(image.path if image.path is not None else image.data for image in images)
            rings[len(images)][shown].append(index)
        self.donor: dict[int, int] = {}
        for count, by_picture in rings.items():
            groups = list(by_picture.values())
            if count and len(groups) == 1:
                raise UserError(
                    f"shuffle_images: the samples with {count} pictures ({samples[groups[0][0]].id!r}, ...) all show "
                    "the same; there are no others to show"
                )
            random.Random(seed_from(seed, count)).shuffle(groups)
            for position, group in enumerate(groups):
                donor = groups[(position + 1) % len(groups)][0]
                self.donor |= dict.fromkeys(group, donor)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        return dataclasses.replace(sample, images=self.source[self.donor[index]].images) if sample.images else sample
