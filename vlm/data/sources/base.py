"""Files of samples, in the forms people publish them."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.sampling.order import Blocks
from vlm.data.sources.forms import read_with
from vlm.data.sources.json_records import RecordFile
from vlm.data.sources.llava_boxes import mark_places, says_again
from vlm.errors import SampleError, UserError, quoted
from vlm.sample import MAX_PIXELS, Sample, parse_sample
from vlm.sample.keys import TURN_EXTRAS, MakeError, check_record, check_turn, names_images
from vlm.sample.paths import located

IMAGE_MARK = "<image>"
_LLAVA_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_TURNS = ("conversations", "messages")
_QWEN_IMAGE = re.compile(r"<img>[^<>\n]+</img>")
EXTRA_KEYS = ("task", "group", "answers", "choices")
"""Of the form of `vlm.sample`; other forms hand them on as they are."""
_LLAVA_KEYS = frozenset({"id", "image", "images", "conversations", "system", *EXTRA_KEYS})


Tell = Callable[[Any], list[Any]]
"""What a rank tells all ranks -> what each of them told."""


class Source(ABC):
    """A sequence of samples that travels to worker processes and reads each sample when asked.

    Attributes:
        name: how mixing weights, logs and metrics call it.
    """

    name: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Raises `SampleError` for a sample that breaks the schema, `IndexError` beyond the end."""

    @abstractmethod
    def has_image(self, index: int) -> bool:
        """Whether the sample has an image, without reading the sample again."""

    def place(self, index: int) -> tuple[str, int]:
        """Name of the source that a sample comes from and its number there, as lists of bad samples have them."""
        return self.name, index

    def notes(self) -> list[str]:
        """What of the files is in no sample, a line each."""
        return []

    def image_mask(self) -> np.ndarray:
        """bool[len(self)], `has_image` of every sample."""
        return np.fromiter((self.has_image(i) for i in range(len(self))), dtype=bool, count=len(self))

    def blocks(self) -> Blocks | None:
        """Samples that are fetched together; None: they are as quickly read in any order."""
        return None

    def open_together(self, tell: Tell, *, world: int, rank: int) -> None:  # noqa: B027  (most have nothing to share)
        """Opens what knows its samples only after a look at its files: each rank looks at a share of them.

        All ranks call it, before anything else is asked; otherwise a source opens by itself.
        """


class JsonSource(Source):
    """A JSON list or JSONL file. The file is scanned once, when something first asks about its samples.

    Args:
        path: the file, or a URL (`s3://...`) that fsspec can open.
        image_root: folder that image paths start at and that none may leave; by default the folder of the file.
        name: by default the file's name without its ending.
        max_pixels: limit on decode.

    Attributes:
        reader: the class in `vlm.data` that people name, where it is another one.
    """

    reader: str | None = None

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        name: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.path = located(path)
        self.image_root = located(image_root) if image_root is not None else self.path.parent
        self.name = name if name is not None else self.path.stem
        self.max_pixels = max_pixels

    @cached_property
    def _records(self) -> RecordFile:
        return RecordFile(self.path, flag=self._flag)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        record = self._records[index]
        with read_with(self.reader or type(self).__name__, record):
            return parse_sample(
                self._schema(record, index),
                source=str(self.path),
                position=index,
                image_root=self.image_root,
                max_pixels=self.max_pixels,
            )

    def has_image(self, index: int) -> bool:
        return bool(self._records.flags[index])

    def image_mask(self) -> np.ndarray:
        return self._records.flags

    @staticmethod
    def _flag(record: Mapping[str, Any]) -> bool:
        return bool(record.get("images")) or names_images(record.get("messages"))

    def _schema(self, record: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        """The record in the form of `vlm.sample`."""
        return record


class ChatJson(JsonSource):
    """Records that are in the form of `vlm.sample` already."""


class LlavaJson(JsonSource):
    """The form LLaVA and most of its followers publish.

    ::

        [{"id": "7", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                         {"from": "gpt", "value": "A boat."}]}]

    Each `<image>` becomes an image part where it stands; the text around it is kept to the last blank, because what
    to strip is the template's business and differs between the systems. `image` (or `images`) is a path or a list;
    `system` beside the turns is the system's text. A `value` may be a list of parts as in `ChatJson`, in which text
    that spells `<image>` is text. A turn may say `weight` (or `loss`, `train`, `loss_weight`).

    Args:
        path: as in `JsonSource`.
        places: boxes in the text, such as `[0.12, 0.30, 0.55, 0.80]`, are places in the (last) image, counted from
            its padded square: each system then writes them in its own form, and every transform moves them along.
            `answers` that only say the answer again are written in that form too. Without, they are text.
        **keywords: as in `JsonSource`.
    """

    def __init__(self, path: str | Path, places: bool = False, **keywords: Any) -> None:
        super().__init__(path, **keywords)
        self.places = places

    @staticmethod
    def _flag(record: Mapping[str, Any]) -> bool:
        return bool(record.get("image") or record.get("images")) or names_images(record.get("conversations"))

    def _schema(self, record: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        error = partial(SampleError, sample_id=str(record.get("id", index)), source=str(self.path))
        if "conversations" not in record:
            raise error(f"key 'conversations' is missing; {without_turns(record)}")
        turns = record["conversations"]
        if not isinstance(turns, list) or not turns:
            raise error("'conversations' must be a list of at least one {'from', 'value'}")
        if record.get("image") and record.get("images"):
            raise error("has both 'image' and 'images'; keep one of them")
        images = record.get("image") or record.get("images") or []
        if not isinstance(images, (str, list)):
            raise error(f"'image' must be a path or a list of paths, found {quoted(images)}")
        check_record(record, read=_LLAVA_KEYS, has_images=bool(images) or names_images(turns), error=error)
        converted = {
            "id": record.get("id", index),
            "images": [images] if isinstance(images, str) else images,
            "messages": with_system(
                [_message(turn, f"conversations[{i}]", error) for i, turn in enumerate(turns)],
                record.get("system"),
                error=error,
            ),
        }
        extra = {key: record[key] for key in EXTRA_KEYS if key in record}
        if self.places and images:
            answer_has_some = mark_places(converted["messages"])
            if answer_has_some and says_again(extra.get("answers"), turns[-1]["value"]):
                del extra["answers"]
        return converted | extra


def without_turns(record: Mapping[str, Any]) -> str:
    """What to do about a record that holds no conversation."""
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and {*_TURNS} & value[0].keys():
            return f"the file is one object; make it the list that is under {quoted(key)}"
        if isinstance(value, Mapping) and {*_TURNS} & value.keys():
            return f"the file is an object by id ({quoted(key)}, ...); make it a list of its values"
    return (
        f"found keys {quoted(sorted(map(str, record)))}; a record needs 'conversations': "
        "[{'from': 'human', 'value': ...}, {'from': 'gpt', 'value': ...}]"
    )


def _message(turn: Any, key: str, error: MakeError) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        raise error(f"{key} must be an object with 'from' and 'value'")
    check_turn(turn, read=("from", "value"), where=key, error=error)
    role, value = turn["from"], turn["value"]
    if not isinstance(role, str) or role not in _LLAVA_ROLES:
        raise error(f"{key}: unknown role 'from': {quoted(role)}; use one of {', '.join(_LLAVA_ROLES)}")
    return {"role": _LLAVA_ROLES[role], "content": content_of(value, f"{key}: 'value'", error), **turn_extras(turn)}


def turn_extras(turn: Mapping[str, Any]) -> dict[str, Any]:
    """What a turn says besides role and content."""
    return {key: turn[key] for key in TURN_EXTRAS if turn.get(key) is not None}


def with_system(messages: list[dict[str, Any]], system: Any, *, error: MakeError) -> list[dict[str, Any]]:
    """Messages with the system text that the record has beside them."""
    if system is not None and not isinstance(system, str):
        raise error(f"'system' must be a string, found {quoted(system)}")
    if not system:
        return messages
    if any(message["role"] == "system" for message in messages):
        raise error("has both a key 'system' and a turn of the system; keep one of them")
    return [{"role": "system", "content": [{"type": "text", "text": system}]}, *messages]


def content_of(value: Any, key: str, error: MakeError) -> list[Any]:
    """The parts of a turn: those of a string, in which `<image>` is an image; or parts, in which text is text."""
    if isinstance(value, list):
        return value
    if value is None:
        raise error(f"{key} is null; write its text, or drop the turn")
    if not isinstance(value, str):
        raise error(f"{key} must be a string or a list of parts, found {quoted(value)}")
    if _QWEN_IMAGE.search(value):
        raise error(
            f"{key} names an image as Qwen-VL does, <img>path</img>; read the file with vlm.data.QwenJson, or put text "
            "that is no image into a part: {'type': 'text', 'text': ...}",
            kind="marks",
        )
    return content_parts(value)


def content_parts(text: str) -> list[dict[str, str]]:
    """Content parts of a text in which `<image>` is the place of an image."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


class Concat(Source):
    """Several sources, one after another.

    Args:
        key: the setting that lists the sources, for messages.
    """

    def __init__(self, sources: Sequence[Source], *, name: str = "all", key: str = "data.sources") -> None:
        if not sources:
            raise UserError(f"{key} is empty; list at least one source")
        self.name = name
        self.sources = tuple(sources)
        self.ends = np.cumsum([len(source) for source in self.sources])
        if not self.ends[-1]:
            raise UserError(f"{key} holds no samples ({', '.join(source.name for source in self.sources)})")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Sample:
        source, local = self._locate(index)
        return source[local]

    def has_image(self, index: int) -> bool:
        source, local = self._locate(index)
        return source.has_image(local)

    def place(self, index: int) -> tuple[str, int]:
        source, local = self._locate(index)
        return source.place(local)

    def image_mask(self) -> np.ndarray:
        return np.concatenate([source.image_mask() for source in self.sources])

    def notes(self) -> list[str]:
        return [note for source in self.sources for note in source.notes()]

    def _locate(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, asked for number {index}")
        which = int(np.searchsorted(self.ends, index, side="right"))
        start = int(self.ends[which - 1]) if which else 0
        return self.sources[which], index - start
