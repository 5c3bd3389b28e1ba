"""What benchmark readers share: questions with a picture each, and reading with errors that name the question."""

import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.sources.base import Source
from vlm.data.sources.json_records import RecordFile
from vlm.errors import SampleError, UserError
from vlm.sample import MAX_PIXELS, ImageFile, Sample, parse_sample

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def asked(question: str, request: str) -> str:
    """The question as a request puts it: in the place of its `{}`, else on a line before it."""
    if "{}" in request:
        return request.replace("{}", question, 1)
    return f"{question}\n{request}" if request else question


def filled(form: str, **fields: str) -> str:
    """A form with each `{name}` that is one of the fields replaced."""
    return re.sub(rf"\{{({'|'.join(fields)})\}}", lambda match: fields[match[1]], form)


class Benchmark(Source):
    """Questions with a picture each, in the order of their file.

    Args:
        path: file (or folder, where the benchmark is one) of the questions.
        image_root: folder of the pictures.
        name: of the source; metrics and logs use the task, which is the benchmark's own name.
        max_pixels: limit on decode.
    """

    task: str

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        name: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.path = Path(path)
        self.image_root = Path(image_root) if image_root is not None else self.path.parent
        self.name = name if name is not None else self.task
        self.max_pixels = max_pixels

    @abstractmethod
    def questions(self) -> Iterator[dict[str, Any]]:
        """{id, image: path or bytes or None, text, and answers, choices, group where there are any}."""

    @cached_property
    def _all(self) -> list[dict[str, Any]]:
        found = list(self.questions())
        if not found:
            raise UserError(f"{self.path}: holds no questions; check the path")
        return found

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: int) -> Sample:
        question = self._all[index]
        image = question["image"]
        content = [{"type": "text", "text": question["text"]}]
        if image is not None:
            content = [{"type": "image"}, {"type": "text", "text": f"\n{question['text']}"}]
        images = [ImageFile(name=f"image of {question['id']}", data=image)] if isinstance(image, bytes) else [image]
        record = {
            "id": str(question["id"]),
            "images": images if image is not None else [],
            "messages": [{"role": "user", "content": content}],
            "task": self.task,
        }
        return parse_sample(
            record | {key: question[key] for key in ("answers", "choices", "group") if key in question},
            source=str(self.path),
            position=index,
            image_root=self.image_root,
            max_pixels=self.max_pixels,
        )

    def has_image(self, index: int) -> bool:
        return self._all[index]["image"] is not None

    def image_mask(self) -> np.ndarray:
        return np.array([question["image"] is not None for question in self._all])

    def error(self, identity: Any, message: str) -> SampleError:
        return SampleError(message, sample_id=str(identity), source=str(self.path))

    def need(self, record: Any, key: str, identity: Any) -> Any:
        if not isinstance(record, Mapping) or key not in record:
            found = sorted(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
            raise self.error(identity, f"key {key!r} is missing; found {found}")
        return record[key]

    def text(self, record: Any, key: str, identity: Any) -> str:
        value = self.need(record, key, identity)
        if not isinstance(value, str) or not value.strip():
            raise self.error(identity, f"{key!r} must be a text, found {value!r}")
        return value

    def file_name(self, pattern: str, value: Any, identity: Any) -> str:
        try:
            return pattern.format(value)
        except (IndexError, KeyError, ValueError) as error:
            raise self.error(
                identity, f"image_pattern {pattern!r} makes no file name of {value!r} ({error}); give another pattern"
            ) from error

    def people(self, entries: Any, identity: Any) -> list[str]:
        """Answers of several people, as texts or as {"answer": text}."""
        if not isinstance(entries, list) or not entries:
            raise self.error(identity, f"'answers' must be a list of answers, found {entries!r}")
        return [entry if isinstance(entry, str) else self.text(entry, "answer", identity) for entry in entries]


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list or JSONL file."""
    file = RecordFile(path, flag=bool)
    return (file[index] for index in range(len(file)))


def read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except ValueError as error:
        raise UserError(f"{path}: broken JSON ({error}); fetch it again") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply; fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object, found a {type(content).__name__}")
    return content


def listed(path: Path, key: str) -> list[Any]:
    content = read_object(path)
    if not isinstance(content.get(key), list):
        raise UserError(f"{path}: key {key!r} must hold a list; found keys {sorted(content)[:8]}")
    return content[key]
