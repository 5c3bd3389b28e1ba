"""Image-text pairs: a sample may have several captions."""

import bisect
import dataclasses
import itertools
import math
import random

from vlm.data.loading.encoder import Prepare, Seeds
from vlm.data.modules.base import VisionLanguageData
from vlm.sample import Message, Sample, TextPart
from vlm.seeding import seed_from


def draw_caption(sample: Sample, seeds: Seeds) -> Sample:
    """A sample with `answers` with its last assistant message replaced by one of them, or with one added.

    Each answer is drawn with a probability proportional to its weight. A sample without answers stays as it is.
    """
    if not sample.answers:
        return sample
    texts, weights = zip(*sample.answers, strict=True)
    if min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise sample.error("the weights of 'answers' must not be negative and one must be above 0")
    ends = list(itertools.accumulate(weights))
    text = texts[
        bisect.bisect_right(ends, random.Random(seed_from(seeds.sample, 1)).random() * ends[-1], hi=len(ends) - 1)
    ]
    if not text.strip():
        raise sample.error("an empty text in 'answers' was drawn as a caption; fill it in or remove it")
    answers = [i for i, message in enumerate(sample.messages) if message.role == "assistant"]
    messages = sample.messages[: answers[-1]] if answers else sample.messages
    after = sample.messages[answers[-1] + 1 :] if answers else ()
    weight = sample.messages[answers[-1]].weight if answers else 1.0
    caption = Message("assistant", (TextPart(text),), weight=weight)
    return dataclasses.replace(sample, messages=(*messages, caption, *after))


class PretrainingData(VisionLanguageData):
    """Captions, web pairs and interleaved documents.

    Of the captions in a sample's `answers` each epoch trains on one (BLIP and BLIP-2 on COCO and on their own
    synthetic captions), drawn from (seed, epoch, sample).
    """

    def preparation(self) -> Prepare:
        return draw_caption
