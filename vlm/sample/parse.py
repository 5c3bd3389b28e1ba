"""The one form every source delivers: a chat with images, plus what evaluation needs.

::

    {"id": "7", "images": ["a.png"], "task": "vqa", "source": "coco",
     "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A boat."}],
     "answers": [{"text": "boat", "weight": 1.0}], "choices": [], "group": null}

It is the content-part form of the Hugging Face chat tools. `content` may be a plain string. Image parts take the
entries of `images` in order. Places in a picture are parts too, and every system writes them in its own way
(`vlm.prompts.regions`)::

    {"type": "ref", "text": "the boat"}                                  a phrase; the regions behind it belong to it
    {"type": "box", "box": [0.1, 0.2, 0.5, 0.9]}                         left, top, right, bottom
    {"type": "quad", "quad": [0.1, 0.2, 0.5, 0.2, 0.5, 0.9, 0.1, 0.9]}   corners, clockwise from the text's top left
    {"type": "point", "point": [0.1, 0.2], "image": 1, "unit": "share"}

A document in which text and pictures alternate (MMC4, OBELICS) is one message, of the role `document`::

    {"images": ["a.png"], "messages": [{"role": "document", "content": [
        {"type": "text", "text": "The harbour at dawn."}, {"type": "image"}, {"type": "text", "text": "A boat."}]}]}

Several such messages are documents that share a step and see nothing of each other (`vlm.data.Grouped`).

`image` counts the entries of `images` from 0, which is the default. `unit` is `share` of the stored picture's width and
height (the default), `pixel`, or `square`: share of the side of the picture padded to square, as LLaVA-1.5 counts.
"""

import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlm.errors import SampleError
from vlm.geometry import Points
from vlm.sample.paths import is_remote, located

DOCUMENT = "document"
ROLES = ("system", "user", "assistant", DOCUMENT)
MAX_PIXELS = 100_000_000
"""Default limit on decode: a 100-megapixel picture is a mistake or an attack."""


@dataclass(frozen=True)
class ImagePart:
    """Stands where a picture is; takes the next entry of `Sample.images`."""


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class RefPart:
    """A phrase that the regions behind it belong to."""

    text: str


RegionKind = Literal["box", "quad", "point"]
RegionUnit = Literal["share", "pixel", "square"]


@dataclass(frozen=True)
class RegionPart:
    """A place in a picture.

    Attributes:
        kind: box, quad or point.
        points: top left and bottom right of a box, the four corners of a quad, or the one point.
        image: index into `Sample.images`.
        unit: of the points.
    """

    kind: RegionKind
    points: Points
    image: int = 0
    unit: RegionUnit = "share"

    def shares(self, width: int, height: int) -> Points:
        """The points in shares of the stored picture, given its size in pixels; those beyond its edge too."""
        if self.unit == "share":
            return self.points
        side = max(width, height)
        if self.unit == "pixel":
            return tuple((x / width, y / height) for x, y in self.points)
        shift_x, shift_y = (side - width) / 2, (side - height) / 2
        return tuple(((x * side - shift_x) / width, (y * side - shift_y) / height) for x, y in self.points)


Part = ImagePart | TextPart | RefPart | RegionPart
Places = Literal["unnamed", "sides", "regions"]
"""What a sample says about where things are in its pictures: nothing, left or right, or regions."""
_NUM_VALUES: dict[RegionKind, int] = {"box": 4, "quad": 8, "point": 2}


@dataclass(frozen=True)
class Message:
    role: str
    content: tuple[Part, ...]


@dataclass(frozen=True)
class ImageFile:
    """A picture that is not decoded yet: a file, or bytes out of a shard or a parquet row."""

    name: str
    path: Path | None = None
    data: bytes | None = None
    max_pixels: int = MAX_PIXELS

    def size(self, sample: "Sample") -> tuple[int, int]:
        """(width, height), read from the header alone."""
        with self._open(sample) as image:
            return image.size

    def read(self, sample: "Sample") -> Image.Image:
        """The picture, decoded, in RGB, as the published pipelines have it: `Image.open(...).convert("RGB")`.

        So transparency is dropped, of an animation the first frame is taken, and a rotation that a camera noted in
        EXIF is not applied. 16 bits of grey become the upper 8, where that conversion would cut them off to white.

        Raises:
            SampleError: missing, truncated, not a picture, larger than `max_pixels`, or with pixels of 32 bits, whose
                range nobody knows.
        """
        with self._open(sample) as image, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Palette images with Transparency")  # dropped, as said above
            if image.mode in ("I", "F"):
                raise sample.error(f"image {self.name!r} has pixels of 32 bits; bring them to 0..255 and save 8 bits")
            try:
                if image.mode.startswith("I;16"):
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                return image.convert("RGB")
            except (OSError, SyntaxError, ValueError) as error:
                raise sample.error(f"image {self.name!r} cannot be decoded ({error}); replace or remove it") from error

    def _open(self, sample: "Sample") -> Image.Image:
        try:
            with warnings.catch_warnings():
                # our own limit below says the same with the sample's name
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                if self.path is not None and is_remote(self.path):
                    image = Image.open(io.BytesIO(self.path.read_bytes()))
                else:
                    image = Image.open(self.path if self.path is not None else io.BytesIO(self.data or b""))
        except FileNotFoundError as error:
            remedy = "correct the path or image_root"
            if "\\" in self.name:
                remedy = "write / for \\ in paths"
            elif "://" in self.name:
                remedy = "download it and give its path"
            raise sample.error(f"image {self.name!r} does not exist (looked at {self.path}); {remedy}") from error
        except Image.DecompressionBombError as error:
            raise sample.error(f"image {self.name!r} is too large ({error}); shrink it") from error
        except (UnidentifiedImageError, OSError) as error:
            raise sample.error(
                f"image {self.name!r} is not a readable picture ({error}); save it as PNG or JPEG"
            ) from error
        width, height = image.size
        if width * height > self.max_pixels:
            image.close()
            raise sample.error(
                f"image {self.name!r} has {width}x{height} pixels, over the limit of {self.max_pixels:,}; "
                "shrink it or raise max_pixels"
            )
        return image


@dataclass(frozen=True)
class Sample:
    """One parsed sample. Build it with `parse_sample`, which checks everything that can be wrong with it.

    `resolution` is not part of a record: the data module says at which resolution the pictures of a data set are shown
    (`vlm.data.wrappers.resolution`), in words of the system's codec; None leaves it to the system.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[ImageFile, ...] = ()
    source: str = "<memory>"
    task: str | None = None
    group: str | None = None
    answers: tuple[tuple[str, float], ...] = ()
    choices: tuple[str, ...] = ()
    resolution: str | None = None

    def error(self, message: str) -> SampleError:
        """A `SampleError` that names this sample and its file."""
        return SampleError(message, sample_id=self.id, source=self.source)


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
    sample_id = str(record.get("id", position if position is not None else "?")) if isinstance(record, Mapping) else "?"

    def error(message: str) -> SampleError:
        name = sample_id if sample_id != "?" or position is None else str(position)
        return SampleError(message, sample_id=name, source=source)

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
        raise error(f"{marks} image marks in the text but {len(images)} images; every image needs exactly one mark")
    for index, message in enumerate(messages):
        for part in message.content:
            if isinstance(part, RegionPart) and part.image >= len(images):
                raise error(
                    f"messages[{index}]: a {part.kind} of image {part.image}, but there are {len(images)} images "
                    "(they are counted from 0)"
                )
        alone = all(other.role == DOCUMENT for other in messages) and not record.get("answers")
        if message.role == DOCUMENT and not alone:
            raise error(f"messages[{index}]: a document stands alone; leave other messages and 'answers' out")
        if message.role == DOCUMENT and not any(_says_something(part) for part in message.content):
            raise error(f"messages[{index}]: the document has no text, so there is nothing to train on; drop it")
        if message.role == "assistant" and not any(_says_something(part) for part in message.content):
            raise error(f"messages[{index}]: the assistant's answer is empty; fill it in or drop the turn")
    return Sample(
        id=sample_id if sample_id != "?" or position is None else str(position),
        messages=messages,
        images=images,
        source=source,
        task=_optional_text(record, "task", error),
        group=_optional_text(record, "group", error),
        answers=tuple(_answer(a, error) for a in _sequence(record.get("answers") or [], "answers", error)),
        choices=tuple(str(choice) for choice in _sequence(record.get("choices") or [], "choices", error)),
    )


def parse_image(entry: Any, *, error, image_root: str | Path | None, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """A path (or bytes) as an `ImageFile`; `error` makes the exception for a bad one. A finished one stays as it is."""
    if isinstance(entry, ImageFile):
        return entry
    if isinstance(entry, bytes):
        return ImageFile(name="<bytes>", data=entry, max_pixels=max_pixels)
    if not isinstance(entry, str) or not entry:
        raise error(f"an image must be a path, found {entry!r}")
    if image_root is None:
        return ImageFile(name=entry, path=Path(entry), max_pixels=max_pixels)
    root = located(image_root)
    outside = f"image {entry!r} lies outside the image root {root}; set image_root to a folder that holds it"
    if is_remote(root):
        if ".." in entry.split("/") or entry.startswith("/") or "://" in entry:
            raise error(outside)
        return ImageFile(name=entry, path=root / entry, max_pixels=max_pixels)
    root = root.resolve()
    path = (root / entry).resolve()
    if not path.is_relative_to(root):
        raise error(outside)
    return ImageFile(name=entry, path=path, max_pixels=max_pixels)


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
    if isinstance(content, str):
        return Message(role, (TextPart(content),))
    parts = tuple(_part(part, f"{key}.content[{i}]", error) for i, part in enumerate(_sequence(content, key, error)))
    return Message(role, parts)


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
        raise error(f"{key}: a {kind} takes {_NUM_VALUES[kind]} numbers under the key {kind!r}, found {numbers!r}")
    if isinstance(image, bool) or not isinstance(image, int) or image < 0:
        raise error(f"{key}: 'image' must be the number of a picture, counted from 0, found {image!r}")
    if unit not in get_args(RegionUnit):
        raise error(f"{key}: 'unit' must be one of {', '.join(get_args(RegionUnit))}, found {unit!r}")
    values = [float(number) for number in numbers]
    if min(values) < 0 or (unit != "pixel" and max(values) > 1):
        limits = (
            "pixels start at 0" if unit == "pixel" else "shares of the picture lie in 0..1 ('unit': 'pixel' for pixels)"
        )
        raise error(f"{key}: {kind} {list(numbers)} lies outside of its picture; {limits}")
    if kind == "box" and not (values[0] < values[2] and values[1] < values[3]):
        raise error(f"{key}: box {list(numbers)} is empty or inverted; give left, top, right, bottom")
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
