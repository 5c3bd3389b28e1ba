"""Rows of tables, images among their columns: what parquet files and the `datasets` library have in common.

Images are read when they are decoded, not with the text: every rank looks at the text of a whole step, but only at
the images of its own packs.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.data.sources.base import Source
from vlm.data.sources.messages import IMAGE_KEYS, TURN_KEYS, chat_record
from vlm.errors import Fault, SampleError, UserError, quoted
from vlm.sample import ImageFile, Sample, parse_image, parse_sample
from vlm.sample.keys import names_images

EXCHANGES = "texts"
"""Column of questions and answers as in `the_cauldron`: [{"user": ..., "assistant": ...}]."""


class Rows(Source):
    """Rows with `messages`, `conversations` or `texts`, and `images` or `image`; or, with `caption`, an image and its
    caption.

    Args:
        image_root: folder that image paths start at and that none may leave.
        name: how mixing weights call it.
        max_pixels: limit on decode.
        caption: column of the caption.
        prompt: the user's text beside a captioned image.
    """

    def __init__(
        self, image_root: Path | None, name: str, max_pixels: int, caption: str | None = None, prompt: str = ""
    ) -> None:
        self.image_root = image_root
        self.name = name
        self.max_pixels = max_pixels
        self.caption, self.prompt = caption, prompt

    @abstractmethod
    def text(self, index: int) -> tuple[dict[str, Any], str, int]:
        """The row without the bytes of its images, which file it is in, and its place there."""

    @abstractmethod
    def image_key(self, index: int) -> str | None:
        """The column of a row's images, whose bytes `text` leaves out; None where images are paths in the text."""

    @abstractmethod
    def images(self, index: int) -> Any:
        """What a row has in that column, bytes too: `{bytes, path}`, or a list of them."""

    @abstractmethod
    def root(self, index: int) -> Path | None:
        """The folder that image paths of a row start at; None: they are taken as they are."""

    def has_image(self, index: int) -> bool:
        return bool(self.image_mask()[index])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, asked for number {index}")
        record, file, position = self.text(index)

        def error(message: str, *, kind: Fault | None = None) -> SampleError:
            identity = record.get("id")
            name = position if identity is None else identity
            return SampleError(f"row {position}: {message}", sample_id=str(name), source=file, kind=kind)

        if (key := self.image_key(index)) is not None:
            entries: Any = record.get(key)
            places = [None] if isinstance(entries, Mapping) else range(len(entries or []))
            record[key] = []
            for place in places if entries is not None else []:
                path = (entries if place is None else entries[place])["path"]
                label = f"{path or key} of row {position}"
                load = partial(self._image, index, place, label, error)
                record[key].append(RowImage(name=label, max_pixels=self.max_pixels, load=load))
        if self.caption is not None:
            record = _captioned(record, self.caption, self.prompt, error)
        elif record.get(EXCHANGES) is not None and not any(record.get(key) is not None for key in TURN_KEYS):
            record = _exchanged(record, error)
        chat = chat_record(record, position, error=error, max_pixels=self.max_pixels)
        if not chat["images"] and names_images(chat["messages"]):
            raise error("images are named in parts of the turns; a table has them in a column 'images'", kind="image")
        root, limit = self.root(index), self.max_pixels
        try:
            return parse_sample(chat, source=file, position=position, image_root=root, max_pixels=limit)
        except SampleError as found:
            raise error(found.reason, kind=found.kind) from found

    def _image(self, index: int, place: int | None, name: str, error: Callable[..., SampleError]) -> ImageFile:
        value = self.images(index)
        entry = value if place is None else value[place]
        if entry["bytes"] is None:
            if entry["path"] is None:
                raise error("an image has neither 'bytes' nor 'path'", kind="image")
            found = parse_image(entry["path"], error=error, image_root=self.root(index), max_pixels=self.max_pixels)
            return replace(found, name=name)
        return ImageFile(name=name, data=entry["bytes"], max_pixels=self.max_pixels)


@dataclass(frozen=True)
class RowImage(ImageFile):
    """An image that still lies in its row; `load` fetches it."""

    _: KW_ONLY
    load: Callable[[], ImageFile]

    @property
    def is_light(self) -> bool:
        return False

    def _open(self, sample: Sample) -> Image.Image:
        return self.load()._open(sample)


def needed_columns(caption: str | None) -> tuple[str, ...]:
    """The columns of which rows need one."""
    return (*TURN_KEYS, EXCHANGES) if caption is None else (caption,)


def check_columns(where: object, names: Sequence[str], caption: str | None) -> None:
    """Raises `UserError` unless there is a column that rows are read from."""
    needed = needed_columns(caption)
    if not any(key in names for key in needed):
        wanted = f"no column {needed[0]!r}" if caption is not None else f"none of the columns {', '.join(needed)}"
        raise UserError(f"{where}: has {wanted}; found {', '.join(names)}")


def _captioned(
    record: Mapping[str, Any], column: str, prompt: str, error: Callable[..., SampleError]
) -> dict[str, Any]:
    caption = record.get(column)
    if not isinstance(caption, str) or not caption.strip():
        raise error(f"column {column!r} must hold a caption, found {quoted(caption)}")
    question = f"<image>\n{prompt}" if prompt else "<image>"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": caption.strip()}]
    kept = {key: record[key] for key in ("id", *IMAGE_KEYS) if key in record}
    return kept | {"messages": turns, "task": "caption"}


def _exchanged(record: Mapping[str, Any], error: Callable[..., SampleError]) -> dict[str, Any]:
    """`texts` as `messages`; the images, of which the texts say nothing, stand before the first question."""
    images: Any = next((record[key] for key in IMAGE_KEYS if record.get(key) is not None), [])
    marks = [{"type": "image"} for _ in (images if isinstance(images, list) else [images])]
    turns: list[dict[str, Any]] = []
    for at, exchange in enumerate(record[EXCHANGES]):
        if not isinstance(exchange, Mapping) or not {"user", "assistant"} <= exchange.keys():
            raise error(f"{EXCHANGES}[{at}] must be an object with 'user' and 'assistant'")
        for role in ("user", "assistant"):
            if not isinstance(exchange[role], str):
                raise error(f"{EXCHANGES}[{at}]: {role!r} must be a text, found {quoted(exchange[role])}")
            parts = marks if role == "user" and not at else []
            turns.append({"role": role, "content": [*parts, {"type": "text", "text": exchange[role]}]})
    return {key: value for key, value in record.items() if key != EXCHANGES} | {"messages": turns}
