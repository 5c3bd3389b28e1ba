"""Instructions with any number of images, or none, as VILA mixes them into its last stage (M3IT, FLAN)."""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.data.sources.fields import Fields, Record
from vlm.data.sources.record_sources import IMAGE, Part, RecordSource, exchange, text
from vlm.errors import UserError, quoted
from vlm.sample import ImageFile, Sample
from vlm.sample.keys import SUFFIXES

MAX_IMAGES = 8
"""VILA's limit; so many are the frames of a video."""
_KEYS = {  # the file that VILA makes, M3IT, FLAN
    "question": ("question", "inputs"),
    "answer": ("answer", "outputs", "targets"),
    "images": ("image", "image_base64_str"),
}


class VisualFlan(RecordSource):
    """Question and answer with up to eight images in front, and no system text: VILA's `vflan_no_system_prompt`.

    ::

        {"question": "What differs?", "answer": "The dog is gone.", "image": ["a.jpg", "b.jpg"]}
        {"instruction": "Answer the question.", "inputs": "What is this?", "outputs": "A boat.",
         "image_base64_str": ["/9j/4AAQ..."]}                                         as M3IT has it
        {"inputs": "Translate: Hund", "targets": "dog"}                               as FLAN has it

    An entry of the images is a path or a file in base64. Marks of images in the question are left out; each image
    stands on a line of its own before it. A dialogue about an image that M3IT writes as one question ("Image
    Descriptions ... Question: ... Answer: ...") becomes the turns that it tells.

    Args:
        path: JSON list or JSONL.
        num_samples: take so many records, evenly over the file (VILA: a million of FLAN's 378).
        system: of the conversation; empty for none, None for the template's own.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    task = "instruct"

    def __init__(
        self, path: str | Path, num_samples: int | None = None, system: str | None = "", **keywords: Any
    ) -> None:
        super().__init__(path, **keywords)
        if num_samples is not None and num_samples < 1:
            raise UserError(f"num_samples must be at least 1, found {num_samples}")
        self.num_samples = num_samples
        self.system = system

    def __len__(self) -> int:
        found = len(self._records)
        return found if self.num_samples is None else min(found, self.num_samples)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, asked for number {index}")
        return super().__getitem__(self._record(index))

    def has_image(self, index: int) -> bool:
        return super().has_image(self._record(index))

    def image_mask(self):
        return super().image_mask()[[self._record(index) for index in range(len(self))]]

    def _record(self, index: int) -> int:
        return index * (len(self._records) - 1) // max(len(self) - 1, 1)

    def _flag(self, record: Record) -> bool:  # type: ignore[override]
        return any(record.get(key) for key in _KEYS["images"])

    def chat(self, fields: Fields) -> dict[str, Any]:
        question = fields.words("instruction") + _first(fields, "question")
        question, answer = question.rstrip(), _first(fields, "answer").rstrip()
        key = next((key for key in _KEYS["images"] if fields.record.get(key)), None)
        entries = fields.record[key] if key is not None else []
        if not isinstance(entries, str | list):
            raise fields.error(f"{key!r} must be a path or a list of paths, found {quoted(entries)}")
        images = [self._image(entry, fields) for entry in ([entries] if isinstance(entries, str) else entries)]
        if len(images) > MAX_IMAGES:
            raise fields.error(f"{len(images)} pictures, and {MAX_IMAGES} are the limit; leave some out")
        if "Image Descriptions" in question:
            messages = _dialogue(question, answer, num_images=len(images), fields=fields)
        else:
            for mark in ("<image>\n", "\n<image>", "<image>"):
                question = question.replace(mark, "")
            if not (question or images):
                raise fields.error("the question is empty; fill it in or remove the record")
            messages = exchange(_behind_images(question, len(images)), [text(answer)])
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *messages]
        return {"images": images, "messages": messages}

    def _image(self, entry: Any, fields: Fields) -> Any:
        if not isinstance(entry, str) or not entry:
            raise fields.error(f"an image must be a path or a file in base64, found {quoted(entry)}", kind="image")
        if Path(entry[-8:]).suffix.lower() in SUFFIXES:
            return entry
        try:
            data = base64.b64decode(entry, validate=True)
        except (binascii.Error, ValueError) as error:
            raise fields.error(
                f"an image is neither a path nor base64 ({entry[:40]}...; {error})", kind="image"
            ) from error
        return ImageFile(name="<base64>", data=data, max_pixels=self.max_pixels)


def _first(fields: Fields, kind: str) -> str:
    found: Mapping[str, Any] = fields.record
    key = next((key for key in _KEYS[kind] if key in found), _KEYS[kind][0])
    value: str = fields.need(key, str, "a text")
    return value


def _behind_images(question: str, num_images: int) -> list[Part]:
    content: list[Part] = []
    for number in range(num_images):
        content += [IMAGE, text("\n" if number < num_images - 1 else f"\n{question}")]
    return content or [text(question)]


def _dialogue(question: str, answer: str, *, num_images: int, fields: Fields) -> list[dict[str, Any]]:
    """The turns of a visual dialogue; what stands before its first question is left out."""
    pairs = [turn.split("\nAnswer: ") for turn in question.split("\nQuestion: ")[1:]]
    if num_images != 1 or not pairs or [len(pair) for pair in pairs] != [2] * (len(pairs) - 1) + [1]:
        raise fields.error(
            "'Image Descriptions' starts a dialogue about one picture: lines of 'Question: ' and 'Answer: ' in turn, a "
            "question last"
        )
    pairs[-1] = [pairs[-1][0].replace("\n", ""), answer]
    first, *others = pairs
    messages = exchange(_behind_images(first[0], num_images), [text(first[1])])
    for asked, answered in others:
        messages += exchange([text(asked)], [text(answered)])
    return messages
