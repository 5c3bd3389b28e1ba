"""What the readers share: the parts of a chat, and sources of one sample for each record of a file."""

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.sources.base import JsonSource
from vlm.data.sources.fields import Fields, Record
from vlm.errors import UserError, quoted
from vlm.sample import Sample, parse_sample

Part = dict[str, Any]
IMAGE: Part = {"type": "image"}


def text(value: str) -> Part:
    return {"type": "text", "text": value}


def box(values: Sequence[float], *, unit: str) -> Part:
    """A box part of left, top, right, bottom."""
    return {"type": "box", "box": list(values), "unit": unit}


def exchange(question: list[Part], answer: list[Part]) -> list[dict[str, Any]]:
    """Messages of a question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def after_image(prompt: str) -> list[Part]:
    """An image and a text behind it, on a line of its own."""
    return [IMAGE, text(f"\n{prompt}")] if prompt else [IMAGE]


class RecordSource(JsonSource):
    """One sample per record of a JSON list or JSONL file; memory does not grow with the file."""

    task: str | None = None
    image_key: str | None = "image"

    @abstractmethod
    def chat(self, fields: Fields) -> dict[str, Any]:
        """`messages`, and `images` and `answers` where there are any, of a record."""

    def _flag(self, record: Record) -> bool:  # type: ignore[override]
        return self.image_key is not None and bool(record.get(self.image_key))

    def _schema(self, record: Record, index: int) -> dict[str, Any]:
        identity = record.get("id", index)
        fields = Fields(record, identity=identity, source=str(self.path))
        made = self.chat(fields)
        fields.check_unread(has_images=bool(made.get("images")))
        return {"id": identity, "task": self.task, **made}


class ObjectSource(JsonSource):
    """One sample per record that is put together from a file which is one JSON object.

    Such a file has to be read as a whole; what is kept of it are the bytes of its records and where they start, which
    workers share.
    """

    task: str | None = None

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """The records, each with an `id`; JSON can write them."""

    @abstractmethod
    def chat(self, fields: Fields) -> dict[str, Any]:
        """As in `RecordSource`."""

    @cached_property
    def _kept(self) -> tuple[bytes, np.ndarray]:
        return compact(self.path, self.records())

    def __len__(self) -> int:
        return len(self._kept[1]) - 1

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, asked for number {index}")
        content, ends = self._kept
        record = json.loads(content[ends[index] : ends[index + 1]])
        fields = Fields(record, identity=record["id"], source=str(self.path))
        made = self.chat(fields)
        fields.check_unread(has_images=bool(made.get("images")))
        return parse_sample(
            {"id": record["id"], "task": self.task, **made},
            source=str(self.path),
            position=index,
            image_root=self.image_root,
            max_pixels=self.max_pixels,
        )

    def has_image(self, index: int) -> bool:
        return 0 <= index < len(self)

    def image_mask(self) -> np.ndarray:
        return np.ones(len(self), dtype=bool)


def compact(path: Path, records: Iterable[Record]) -> tuple[bytes, np.ndarray]:
    """Records as bytes one after another, and int64[n + 1] where each begins and the last ends.

    Raises:
        UserError: there are none.
    """
    parts = [json.dumps(record, ensure_ascii=False).encode() for record in records]
    if not parts:
        raise UserError(f"{path}: holds no samples; remove it from the sources or fill it")
    return b"".join(parts), np.cumsum([0, *map(len, parts)])


def by_unique(path: Path, entries: Iterable[Any], key: str) -> dict[Any, Mapping[str, Any]]:
    """Entries by the value of a key.

    Raises:
        UserError: an entry without it, or two with the same.
    """
    found: dict[Any, Mapping[str, Any]] = {}
    for at, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not isinstance(entry.get(key), int | str):
            raise UserError(f"{path}: entry {at} has no {key!r}; it is {quoted(entry)}")
        if entry[key] in found:
            raise UserError(f"{path}: {key} {entry[key]!r} stands there twice (entry {at}); remove one of them")
        found[entry[key]] = entry
    return found
