"""The one form that every source delivers: see `vlm.sample.parse`."""

from vlm.sample.parse import (
    DOCUMENT,
    MAX_PIXELS,
    ROLES,
    ImageFile,
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
    parse_image,
    parse_sample,
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
