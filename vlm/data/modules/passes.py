"""Which samples are judged by what, and pictures in the wrong place."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlm.data.sources.base import Concat, Source
from vlm.errors import UserError
from vlm.sample import Sample
from vlm.seeding import seed_from

if TYPE_CHECKING:
    from vlm.evaluation.means import Judges


def split(samples: Concat, judges: Judges) -> dict[str | None, Sequence[int]]:
    """Indices of the samples that go through each pass of an evaluation.

    None: those whose loss is wanted, which is every sample that ends with an answer. A name: those whose answers its
    metrics judge. A sample can be in both.

    Raises:
        UserError: a sample in neither, or metrics that no sample belongs to.
    """
    if not judges.metrics:
        return {None: range(len(samples))}
    parts: defaultdict[str | None, list[int]] = defaultdict(list)
    names: set[str] = set()
    index = 0
    for source in samples.sources:
        for local in range(len(source)):
            sample = source[local]
            name = judges.of(source=source.name, task=sample.task)
            has_answer = sample.messages[-1].role == "assistant"
            names |= {source.name, sample.task or source.name}
            if name is None and not has_answer:
                raise sample.error(
                    f"has no answer to score, and evaluation.metrics names neither its source {source.name!r} nor its "
                    f"task {sample.task!r}; name metrics for one of them"
                )
            if name is not None:
                parts[name].append(index)
            if has_answer:
                parts[None].append(index)
            index += 1
    if unused := sorted(judges.metrics.keys() - parts.keys()):
        there = ", ".join(sorted(names))
        raise UserError(f"evaluation.metrics: no sample is of the source or task {unused[0]!r}; there are {there}")
    return {name: parts[name] for name in (None, *judges.metrics) if name in parts}


class ShuffledImages(Source):
    """Samples with the pictures of others: each one gets those of the next, in a shuffled ring of all samples with the
    same number of pictures and other files. What a system still gets right, it got without looking.

    Raises:
        UserError: all samples with some number of pictures show the same ones.
    """

    def __init__(self, samples: Source, *, seed: int = 0) -> None:
        self.name = samples.name
        self.samples = samples
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

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        return dataclasses.replace(sample, images=self.samples[self.donor[index]].images) if sample.images else sample

    def has_image(self, index: int) -> bool:
        return self.samples.has_image(index)
