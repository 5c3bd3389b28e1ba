"""Questions behind solved examples: what a system learns from its context alone."""

import dataclasses
from random import Random

import numpy as np

from vlm.data.sources.base import Source
from vlm.data.wrappers.wrapped import Wrapped
from vlm.errors import UserError
from vlm.sample import DOCUMENT, ImageFile, Message, RegionPart, Sample, TextPart
from vlm.seeding import seed_from

_TRIES = 1000


class FewShot(Wrapped):
    """Every sample with `shots` examples in front of it, each with its images and its answer.

    Examples are turns of the same conversation; they are drawn from (seed, number of the sample) alone. An example is
    of the task of the sample where tasks are named, and never the sample itself.

    Args:
        source: what is asked.
        examples: where the examples come from: training data, as in VILA's evaluation.
        shots: how many; 0 changes nothing.
        seed: of the draw.
    """

    def __init__(self, source: Source, examples: Source, shots: int = 4, seed: int = 0) -> None:
        if shots < 0:
            raise UserError(f"shots must not be negative, found {shots}")
        super().__init__(source)
        self.examples = examples
        self.shots, self.seed = shots, seed

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        chosen = self._drawn(sample, Random(seed_from(self.seed, index))) if self.shots else []
        messages = [message for message in sample.messages if message.role == "system"]
        images: list[ImageFile] = []
        asked = tuple(message for message in sample.messages if message.role != "system")
        for turns, shown in (*((_turns(example), example.images) for example in chosen), (asked, sample.images)):
            messages += [_counting_from(len(images), message) for message in turns]
            images += shown
        return dataclasses.replace(sample, messages=tuple(messages), images=tuple(images))

    def _drawn(self, sample: Sample, random: Random) -> list[Sample]:
        chosen: dict[int, Sample] = {}
        for _ in range(_TRIES):
            at = random.randrange(len(self.examples))
            if at in chosen:
                continue
            example = self.examples[at]
            same = (example.source, example.id) == (sample.source, sample.id)
            if not same and sample.task in (None, example.task) and len(_turns(example)) >= 2:
                chosen[at] = example
            if len(chosen) == self.shots:
                return list(chosen.values())
        raise sample.error(
            f"found {len(chosen)} of {self.shots} examples with an answer in {self.examples.name}"
            + (f" for the task {sample.task!r}" if sample.task else "")
            + "; give more examples or lower 'shots'"
        )

    def has_image(self, index: int) -> bool:
        return self.source.has_image(index) or bool(self.shots and self[index].images)

    def image_mask(self) -> np.ndarray:
        return np.array([self.has_image(index) for index in range(len(self))], dtype=bool)


def _counting_from(first: int, message: Message) -> Message:
    """The message with its regions in the images from number `first` on."""
    parts = (
        dataclasses.replace(part, image=part.image + first) if isinstance(part, RegionPart) else part
        for part in message.content
    )
    return dataclasses.replace(message, content=tuple(parts))


def _turns(example: Sample) -> tuple[Message, ...]:
    """The conversation of an example with its answer, which questions of benchmarks keep beside it."""
    turns = tuple(message for message in example.messages if message.role != "system")
    if any(message.role == DOCUMENT for message in turns):
        raise example.error("a document has no question and no answer; give conversations as examples")
    if turns and turns[-1].role == "user" and example.answers:
        best = max(example.answers, key=lambda answer: answer[1])[0]
        return (*turns, Message("assistant", (TextPart(best),)))
    return turns if turns and turns[-1].role == "assistant" else ()
