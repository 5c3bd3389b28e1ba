"""The one form every source delivers: a chat with images, plus what evaluation needs.

::

    {"id": "7", "images": ["a.png"], "task": "vqa", "source": "coco",
     "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A boat."}],
     "answers": [{"text": "boat", "weight": 1.0}], "choices": [], "group": null}

It is the content-part form of the Hugging Face chat tools. `content` may be a plain string. Image parts take the
entries of `images` in order. Places in an image are parts too, and every system writes them in its own way
(`vlm.prompts.regions`)::

    {"type": "ref", "text": "the boat"}                                  a phrase; the regions behind it belong to it
    {"type": "box", "box": [0.1, 0.2, 0.5, 0.9]}                         left, top, right, bottom
    {"type": "quad", "quad": [0.1, 0.2, 0.5, 0.2, 0.5, 0.9, 0.1, 0.9]}   corners, clockwise from the text's top left
    {"type": "point", "point": [0.1, 0.2], "image": 1, "unit": "share"}

A document in which text and images alternate (MMC4, OBELICS) is one message, of the role `document`::

    {"images": ["a.png"], "messages": [{"role": "document", "content": [
        {"type": "text", "text": "The harbour at dawn."}, {"type": "image"}, {"type": "text", "text": "A boat."}]}]}

Several such messages are documents that share a step and see nothing of each other (`vlm.data.Grouped`).

`image` counts the entries of `images` from 0, which is the default. `unit` is `share` of the stored picture's width and
height (the default), `pixel`, or `square`: share of the side of the image padded to square, as LLaVA-1.5 counts.
"""

from vlm.sample.images import MAX_PIXELS, ImageFile, parse_image
from vlm.sample.parse import parse_sample
from vlm.sample.parts import (
    DOCUMENT,
    ROLES,
    ImagePart,
    Message,
    Part,
    Places,
    RefPart,
    RegionKind,
    RegionPart,
    RegionUnit,
    Sample,
    TextPart,
)

__all__ = [
    "DOCUMENT",
    "MAX_PIXELS",
    "ROLES",
    "ImageFile",
    "ImagePart",
    "Message",
    "Part",
    "Places",
    "RefPart",
    "RegionKind",
    "RegionPart",
    "RegionUnit",
    "Sample",
    "TextPart",
    "parse_image",
    "parse_sample",
]
