"""One record in, a checked `Sample` out; `vlm.sample` describes the form."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

from vlm.errors import SampleError
from vlm.sample.images import MAX_PIXELS, parse_image
from vlm.sample.parts import (
    DOCUMENT,
    ROLES,
    ImagePart,
    Message,
    Part,
    RefPart,
    RegionKind,
    RegionPart,
    RegionUnit,
    Sample,
    TextPart,
)

_NUM_VALUES: dict[RegionKind, int] = {"box": 4, "quad": 8, "point": 2}


def parse_sample(
    record: Mapping[str, Any],
    *,
    source: str = "<memory>",
    position: int | None = None,
    image_root: str | Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Sample:
    """Checks one record of the form above.

    Args:
        record: the decoded JSON object.
        source: file it came from, for messages.
        position: its place in the file, the name of a record without an id.
        image_root: folder that relative image paths start at and that no path may leave.
        max_pixels: limit on decode.

    Raises:
        SampleError: names the key and says what to do.
    """
    unnamed = "?" if position is None else str(position)
    sample_id = str(record.get("id", unnamed)) if isinstance(record, Mapping) else unnamed
    error = partial(SampleError, sample_id=sample_id, source=source)
    if not isinstance(record, Mapping):
        raise error(f"expected a JSON object, found {type(record).__name__}")
    if "messages" not in record:
        raise error(f"key 'messages' is missing; found keys {sorted(map(str, record))}")
    images = tuple(
        parse_image(entry, error=error, image_root=image_root, max_pixels=max_pixels)
        for entry in _sequence(record.get("images") or [], "images", error)
    )
    messages = tuple(
        _message(message, f"messages[{index}]", error)
        for index, message in enumerate(_sequence(record["messages"], "messages", error))
    )
    if not messages:
        raise error("'messages' is empty; a sample needs at least one message")
    marks = sum(isinstance(part, ImagePart) for message in messages for part in message.content)
    if marks != len(images):
        found = f"{marks} image marks in the text but {len(images)} images"
        raise error(f"{found}; every image needs exactly one mark", kind="marks")
    for index, message in enumerate(messages):
        for part in message.content:
            if isinstance(part, RegionPart) and part.image >= len(images):
                raise error(
                    f"messages[{index}]: a {part.kind} of image {part.image}, but there are {len(images)} images "
                    "(they are counted from 0)",
                    kind="region",
                )
        alone = all(other.role == DOCUMENT for other in messages) and not record.get("answers")
        if message.role == DOCUMENT and not alone:
            raise error(f"messages[{index}]: a document stands alone; leave other messages and 'answers' out")
        if message.role == DOCUMENT and not any(_says_something(part) for part in message.content):
            raise error(
                f"messages[{index}]: the document has no text, so there is nothing to train on; drop it",
                kind="no label",
            )
        if message.role == "assistant" and not any(_says_something(part) for part in message.content):
            raise error(
                f"messages[{index}]: the assistant's answer is empty; fill it in or drop the turn", kind="no label"
            )
    return Sample(
        id=sample_id,
        messages=messages,
        images=images,
        source=source,
        task=_optional_text(record, "task", error),
        group=_optional_text(record, "group", error),
        answers=tuple(_answer(a, error) for a in _sequence(record.get("answers") or [], "answers", error)),
        choices=tuple(str(choice) for choice in _sequence(record.get("choices") or [], "choices", error)),
    )


def _sequence(value: Any, key: str, error) -> list:
    if not isinstance(value, (list, tuple)):
        raise error(f"'{key}' must be a list, found {type(value).__name__}")
    return list(value)


def _message(value: Any, key: str, error) -> Message:
    if not isinstance(value, Mapping) or "role" not in value or "content" not in value:
        raise error(f"{key} must be an object with 'role' and 'content'")
    role, content = value["role"], value["content"]
    if role not in ROLES:
        raise error(f"{key}: unknown role {role!r}; use one of {', '.join(ROLES)}")
    begun = value.get("begun", False)
    if not isinstance(begun, bool) or (begun and role != "assistant"):
        raise error(f"{key}: 'begun' is true or false, and true for an answer of the assistant alone")
    if isinstance(content, str):
        return Message(role, (TextPart(content),), begun)
    parts = tuple(_part(part, f"{key}.content[{i}]", error) for i, part in enumerate(_sequence(content, key, error)))
    return Message(role, parts, begun)


def _part(value: Any, key: str, error) -> Part:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "image":
        return ImagePart()
    if kind == "text":
        if not isinstance(value.get("text"), str):
            raise error(f"{key}: 'text' must be a string, found {value.get('text')!r}")
        return TextPart(value["text"])
    if kind == "ref":
        if not isinstance(value.get("text"), str) or not value["text"].strip():
            raise error(f"{key}: 'text' of a ref must be a phrase, found {value.get('text')!r}")
        return RefPart(value["text"])
    if kind == "box" or kind == "quad" or kind == "point":
        return _region(value, kind, key, error)
    raise error(
        f"{key}: unknown content part {value!r}; use {{'type': 'text', 'text': ...}}, {{'type': 'image'}}, or a "
        "'ref', 'box', 'quad' or 'point'"
    )


def _region(value: Mapping[str, Any], kind: RegionKind, key: str, error) -> RegionPart:
    numbers, image, unit = value.get(kind), value.get("image", 0), value.get("unit", "share")
    if (
        not isinstance(numbers, (list, tuple))
        or len(numbers) != _NUM_VALUES[kind]
        or not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)
    ):
        raise error(
            f"{key}: a {kind} takes {_NUM_VALUES[kind]} numbers under the key {kind!r}, found {numbers!r}",
            kind="region",
        )
    if isinstance(image, bool) or not isinstance(image, int) or image < 0:
        raise error(f"{key}: 'image' must be the number of a picture, counted from 0, found {image!r}", kind="region")
    if unit not in get_args(RegionUnit):
        raise error(f"{key}: 'unit' must be one of {', '.join(get_args(RegionUnit))}, found {unit!r}", kind="region")
    values = [float(number) for number in numbers]
    if min(values) < 0 or (unit != "pixel" and max(values) > 1):
        limits = (
            "pixels start at 0" if unit == "pixel" else "shares of the picture lie in 0..1 ('unit': 'pixel' for pixels)"
        )
        raise error(f"{key}: {kind} {list(numbers)} lies outside of its picture; {limits}", kind="region")
    if kind == "box" and not (values[0] < values[2] and values[1] < values[3]):
        raise error(f"{key}: box {list(numbers)} is empty or inverted; give left, top, right, bottom", kind="region")
    return RegionPart(kind, tuple(zip(values[::2], values[1::2], strict=True)), image, unit)


def _says_something(part: Part) -> bool:
    return isinstance(part, RegionPart) or (isinstance(part, TextPart | RefPart) and bool(part.text.strip()))


def _answer(value: Any, error) -> tuple[str, float]:
    if isinstance(value, str):
        return value, 1.0
    if not isinstance(value, Mapping) or not isinstance(value.get("text"), str):
        raise error(f"an answer must be a string or {{'text', 'weight'}}, found {value!r}")
    try:
        return value["text"], float(value.get("weight", 1.0))
    except (TypeError, ValueError):
        raise error(f"the weight of answer {value['text']!r} must be a number, found {value['weight']!r}") from None


def _optional_text(record: Mapping[str, Any], key: str, error) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise error(f"'{key}' must be a string, found {value!r}")
    return value
