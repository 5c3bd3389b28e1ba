"""What a sample says about where things are in its images."""

import re

from vlm.sample import Places, RegionPart, Sample, TextPart

_SIDES = re.compile(r"\b(?:left|right)|[左右]", re.IGNORECASE)


def places_named(sample: Sample) -> Places:
    """What may not change: with `sides` an image is not mirrored, with `regions` nothing is moved but by a crop.

    A word that only begins like one (`rightly`) counts as well: to show an image as it is harms nothing.
    """
    parts = [part for message in sample.messages for part in message.content]
    if any(isinstance(part, RegionPart) for part in parts):
        return "regions"
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    texts += [*(text for text, _ in sample.answers), *sample.choices]
    return "sides" if any(_SIDES.search(text) for text in texts) else "unnamed"
