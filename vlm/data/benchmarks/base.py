"""What benchmark readers share: questions with an image each."""

from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.sources.base import Source
from vlm.data.sources.fields import Fields
from vlm.data.sources.json_records import RecordFile
from vlm.errors import UserError
from vlm.sample import MAX_PIXELS, ImageFile, Sample, parse_sample


class Benchmark(Source):
    """Questions with an image each, in the order of their file.

    Args:
        path: file (or folder, where the benchmark is one) of the questions.
        image_root: folder of the images.
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

    def fields(self, record: Any, identity: Any) -> Fields:
        """The values of a record; `identity` names it in errors."""
        return Fields(record, identity=identity, source=self.path)


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list or JSONL file."""
    file = RecordFile(path, flag=bool)
    return (file[index] for index in range(len(file)))
