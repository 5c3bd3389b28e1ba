"""One record in, a checked `Sample` out; `vlm.sample` describes the form."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

from vlm.errors import SampleError, quoted
from vlm.sample.images import MAX_PIXELS, parse_image
from vlm.sample.keys import check_record, check_turn, is_empty, own_image, turn_weight
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

_READ = frozenset({"id", "images", "messages", "task", "group", "answers", "choices"})
_LARGEST = 1e9
_IMAGE_TYPES = ("image", "image_url")
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
        for entry in _image_entries(record, error)
    )
    check_record(record, read=_READ, has_images=bool(images), error=error)
    messages = tuple(
        _message(message, f"messages[{index}]", error)
        for index, message in enumerate(_sequence(record["messages"], "messages", error))
    )
    if not messages:
        raise error("'messages' is empty; a sample needs at least one message")
    marks = sum(isinstance(part, ImagePart) for message in messages for part in message.content)
    if marks != len(images):
        found = f"{marks} image marks in the text but {len(images)} images; every image needs exactly one mark"
        literal = ", and a mark that is meant as text stands in a part: {'type': 'text', 'text': '<image>'}"
        raise error(found + (literal if not images else ""), kind="marks")
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
    answers = [message for message in messages if message.role == "assistant"]
    if answers and not any(message.weight for message in answers):
        raise error("no answer is trained: the weight of each is 0; drop the sample", kind="no label")
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


def _image_entries(record: Mapping[str, Any], error) -> list:
    """The images of a record: its list, or what its image parts name themselves, in their order."""
    listed = _sequence(record.get("images") or [], "images", error)
    turns = record["messages"] if isinstance(record["messages"], list | tuple) else []
    contents = [turn.get("content") for turn in turns if isinstance(turn, Mapping)]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
    own = [own_image(part) for part in parts if isinstance(part, Mapping) and part.get("type") in _IMAGE_TYPES]
    if not any(image is not None for image in own) or own == listed:
        return listed
    if listed:
        raise error("images are named both under 'images' and in parts of the messages; keep one of them", kind="image")
    if None in own:
        raise error(f"image part {own.index(None)} names no image, but others do; name all of them", kind="image")
    return own


def _message(value: Any, key: str, error) -> Message:
    if not isinstance(value, Mapping) or "role" not in value or "content" not in value:
        raise error(f"{key} must be an object with 'role' and 'content'")
    check_turn(value, read=("role", "content"), where=key, error=error)
    role, content = value["role"], value["content"]
    if role not in ROLES:
        raise error(f"{key}: unknown role {quoted(role)}; use one of {', '.join(ROLES)}")
    if content is None:
        raise error(f"{key}: 'content' is null; write its text, or drop the turn")
    begun = value.get("begun") or False
    if not isinstance(begun, bool) or (begun and role != "assistant"):
        raise error(f"{key}: 'begun' is true or false, and true for an answer of the assistant alone")
    weight = turn_weight(value, where=key, error=error)
    if isinstance(content, str):
        return Message(role, (TextPart(content),), begun, weight)
    parts = tuple(_part(part, f"{key}.content[{i}]", error) for i, part in enumerate(_sequence(content, key, error)))
    return Message(role, parts, begun, weight)


def _part(value: Any, key: str, error) -> Part:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind in _IMAGE_TYPES:
        return ImagePart()
    if kind in ("text", "ref") and not is_empty(value.get("image")):
        raise error(f"{key}: a part of type {kind!r} names an image; give that a part of type 'image'", kind="image")
    if kind == "text":
        if not isinstance(value.get("text"), str):
            raise error(f"{key}: 'text' must be a string, found {quoted(value.get('text'))}")
        return TextPart(value["text"])
    if kind == "ref":
        if not isinstance(value.get("text"), str) or not value["text"].strip():
            raise error(f"{key}: 'text' of a ref must be a phrase, found {quoted(value.get('text'))}")
        return RefPart(value["text"])
    if kind == "box" or kind == "quad" or kind == "point":
        return _region(value, kind, key, error)
    raise error(
        f"{key}: unknown content part {quoted(value)}; use {{'type': 'text', 'text': ...}}, {{'type': 'image'}}, or a "
        "'ref', 'box', 'quad' or 'point'"
    )


def _region(value: Mapping[str, Any], kind: RegionKind, key: str, error) -> RegionPart:
    numbers, image, unit = value.get(kind), value.get("image", 0), value.get("unit", "share")
    if (
        not isinstance(numbers, (list, tuple))
        or len(numbers) != _NUM_VALUES[kind]
        or not all(isinstance(number, int | float) and abs(number) <= _LARGEST for number in numbers)
    ):
        raise error(
            f"{key}: a {kind} takes {_NUM_VALUES[kind]} numbers under the key {kind!r}, found {quoted(numbers)}",
            kind="region",
        )
    if isinstance(image, bool) or not isinstance(image, int) or image < 0:
        raise error(
            f"{key}: 'image' must be the number of a picture, counted from 0, found {quoted(image)}", kind="region"
        )
    if unit not in get_args(RegionUnit):
        raise error(
            f"{key}: 'unit' must be one of {', '.join(get_args(RegionUnit))}, found {quoted(unit)}", kind="region"
        )
    values = [float(number) for number in numbers]
    if min(values) < 0 or (unit != "pixel" and max(values) > 1):
        limits = (
            "pixels start at 0" if unit == "pixel" else "shares of the picture lie in 0..1 ('unit': 'pixel' for pixels)"
        )
        raise error(f"{key}: {kind} {quoted(list(numbers))} lies outside of its picture; {limits}", kind="region")
    if kind == "box" and not (values[0] < values[2] and values[1] < values[3]):
        raise error(
            f"{key}: box {quoted(list(numbers))} is empty or inverted; give left, top, right, bottom", kind="region"
        )
    return RegionPart(kind, tuple(zip(values[::2], values[1::2], strict=True)), image, unit)


def _says_something(part: Part) -> bool:
    return isinstance(part, RegionPart) or (isinstance(part, TextPart | RefPart) and bool(part.text.strip()))


def _answer(value: Any, error) -> tuple[str, float]:
    if isinstance(value, str):
        return value, 1.0
    if not isinstance(value, Mapping) or not isinstance(value.get("text"), str):
        raise error(f"an answer must be a string or {{'text', 'weight'}}, found {quoted(value)}")
    try:
        return value["text"], float(value.get("weight", 1.0))
    except (TypeError, ValueError):
        raise error(
            f"the weight of answer {value['text']!r} must be a number, found {quoted(value['weight'])}"
        ) from None


def _optional_text(record: Mapping[str, Any], key: str, error) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise error(f"'{key}' must be a string, found {quoted(value)}")
    return value
