"""What data is generated from: records of images with captions and boxes, of questions, or of dialogues."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vlm.data.sources.json_records import RecordFile
from vlm.errors import SampleError, UserError
from vlm.procedures.instruct.task_specs import Box, Kind
from vlm.sample import ImageFile, Sample, parse_image

IMAGE_MARK = "<image>"
_TOLERANCE = 1e-3  # boxes that were rounded may end a little outside
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


@dataclass(frozen=True)
class Item:
    """One record.

    Attributes:
        image: as the record names it.
        file: where it lies.
        turns: (`human` or `gpt`, text) of a dialogue.
        source: file of the record, for messages.
    """

    id: str
    image: str | None = None
    captions: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    question: str | None = None
    turns: tuple[tuple[str, str], ...] = ()
    file: ImageFile | None = field(default=None, compare=False)
    source: str = "<memory>"

    @property
    def sample(self) -> Sample:
        """Its image, in the form that images are read from."""
        assert self.file is not None
        return Sample(self.id, (), (self.file,), source=self.source)

    def digest(self) -> str:
        """Changes with whatever a model is told about the record."""
        content = [self.image, self.captions, [str(box) for box in self.boxes], self.question, self.turns]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def read_records(path: str | Path, kind: Kind, *, image_root: str | Path | None = None) -> list[Item]:
    """The records of a JSON list or JSONL file.

    ::

        {"id": "7", "image": "a.jpg", "captions": ["A dog."], "boxes": [{"name": "dog", "box": [0.1, 0.2, 0.5, 0.9]}]}
        {"id": "8", "image": "b.jpg", "question": "What is sold here?"}
        {"id": "9", "conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}

    `caption` for one caption alone. A box is left, top, right, bottom as shares of the picture's size.

    Args:
        image_root: folder that image paths start at and that none may leave; by default that of the file.

    Raises:
        UserError: no such file; ids that stand twice; nothing of what the kind needs.
        SampleError: a record without something it needs, or with something wrong.
    """
    file = RecordFile(path, flag=bool)
    root = Path(path).parent if image_root is None else Path(image_root)
    return distinct((_item(file[at], at, kind, str(path), root) for at in range(len(file))), str(path))


def _item(record: Mapping[str, Any], at: int, kind: Kind, source: str, root: Path) -> Item:
    name = str(record.get("id", at))
    error = partial(SampleError, sample_id=name, source=source)

    def missing(key: str, form: str) -> SampleError:
        return error(f"{kind.name} needs {key!r}, {form}; found keys {sorted(map(str, record))}")

    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise error("holds half a surrogate pair, which is no character; take it out") from None
    captions = record.get("captions", [record["caption"]] if "caption" in record else [])
    if not isinstance(captions, list) or not all(isinstance(text, str) and text.strip() for text in captions):
        raise error(f"'captions' must be a list of texts, found {captions!r}")
    image, question = record.get("image"), record.get("question")
    if image is not None and not isinstance(image, str):
        raise error(f"'image' must be a path, found {image!r}")
    if question is not None and not (isinstance(question, str) and question.strip()):
        raise error(f"'question' must be a text, found {question!r}")
    if question is not None and IMAGE_MARK in question:
        raise error(f"'question' holds {IMAGE_MARK}; leave it out, its place is drawn")
    turns = _turns(record.get("conversations", record.get("messages", [])), error)
    if "captions" in kind.needs and not captions:
        raise missing("captions", "a list of texts")
    if "image" in kind.needs and not image:
        raise missing("image", "a path")
    if "question" in kind.needs and not question:
        raise missing("question", "a text")
    if "turns" in kind.needs and not turns:
        raise missing("conversations", "[{'from': 'human', 'value': ...}, ...]")
    return Item(
        id=name,
        image=image,
        captions=tuple(" ".join(text.split()) for text in captions),
        boxes=tuple(_box(box, f"boxes[{i}]", error) for i, box in enumerate(_list(record.get("boxes", []), error))),
        question=question.strip() if question else None,
        turns=turns,
        file=parse_image(image, error=error, image_root=root) if image else None,
        source=source,
    )


def _list(value: Any, error: Callable[[str], SampleError]) -> list[Any]:
    if not isinstance(value, list):
        raise error(f"'boxes' must be a list of {{'name', 'box'}}, found {value!r}")
    return value


def _box(value: Any, key: str, error: Callable[[str], SampleError]) -> Box:
    name, corners = (value.get("name"), value.get("box")) if isinstance(value, Mapping) else (None, None)
    if not isinstance(name, str) or not name.strip() or not isinstance(corners, list) or len(corners) != 4:
        raise error(f"{key} must be {{'name': ..., 'box': [left, top, right, bottom]}}, found {value!r}")
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in corners):
        raise error(f"{key}: 'box' must hold four numbers, found {corners}")
    left, top, right, bottom = corners
    if not (left < right and top < bottom):
        raise error(f"{key}: box {corners} has no area; it must be left, top, right, bottom")
    if min(corners) < -_TOLERANCE or max(corners) > 1 + _TOLERANCE:
        raise error(f"{key}: box {corners} leaves 0..1; divide pixels by the picture's width and height")
    return Box(" ".join(name.split()), *(min(1.0, max(0.0, x)) for x in corners))


def _turns(value: Any, error: Callable[[str], SampleError]) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list):
        raise error(f"'conversations' must be a list, found {value!r}")
    turns = []
    for at, turn in enumerate(value):
        role = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
        text = turn.get("value", turn.get("content")) if isinstance(turn, Mapping) else None
        if role == "system":
            continue
        if role not in _ROLES or not isinstance(text, str) or not text.strip():
            raise error(f"conversations[{at}] must be {{'from': 'human' or 'gpt', 'value': text}}, found {turn!r}")
        if IMAGE_MARK in text:
            raise error(f"conversations[{at}] holds {IMAGE_MARK}; give dialogues without pictures")
        turns.append((_ROLES[role], text.strip()))
    if any(role != ("human", "gpt")[at % 2] for at, (role, _) in enumerate(turns)) or len(turns) % 2:
        raise error("'conversations': human and gpt must take turns and gpt have the last word")
    return tuple(turns)


def distinct(items: Iterable[Item], source: str) -> list[Item]:
    """The items; raises `UserError` where there are none, or two with one id."""
    found: dict[str, Item] = {}
    for item in items:
        if item.id in found:
            raise SampleError("this id stands twice; give every record its own", sample_id=item.id, source=source)
        found[item.id] = item
    if not found:
        raise UserError(f"{source}: holds no records")
    return list(found.values())


def check_pictures(items: Iterable[Item]) -> None:
    """Raises `SampleError` for the first image that is not there: found before anything is paid for."""
    for item in items:
        if item.file is not None and item.file.path is not None and not item.file.path.is_file():
            remedy = "correct the path or --image_root"
            raise item.sample.error(f"image {item.image!r} does not exist (looked at {item.file.path}); {remedy}")
