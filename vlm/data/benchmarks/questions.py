"""Benchmarks of questions with short answers: VQA v2, GQA, VizWiz, TextVQA."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.data.benchmarks.base import SHORT, Benchmark, asked, listed, read_object, records

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


class VQAv2(Benchmark):
    """VQA v2: `{"questions": [{question_id, image_id, question}]}` and the annotations beside it.

    Args:
        annotations: `{"annotations": [{question_id, answers: [{answer}]}]}`, ten people each; test splits have none.
        image_pattern: file name from the number of the picture; `COCO_test2015_{:012d}.jpg` for the test splits.
        request: on a line behind the question, or text with `{}` in the place of the question.
    """

    task = "vqav2"

    def __init__(
        self,
        path: str | Path,
        annotations: str | Path | None = None,
        image_pattern: str = "COCO_val2014_{:012d}.jpg",
        request: str = SHORT,
        **keywords: Any,
    ) -> None:
        super().__init__(path, **keywords)
        self.annotations = None if annotations is None else Path(annotations)
        self.image_pattern, self.request = image_pattern, request

    def questions(self) -> Iterator[dict[str, Any]]:
        entries = listed(self.annotations, "annotations") if self.annotations is not None else []
        answers = {self.need(entry, "question_id", at): entry for at, entry in enumerate(entries)}
        for number, record in enumerate(listed(self.path, "questions")):
            identity = self.need(record, "question_id", number)
            found = {
                "id": identity,
                "image": self.file_name(self.image_pattern, self.need(record, "image_id", identity), identity),
                "text": asked(self.text(record, "question", identity), self.request),
            }
            if self.annotations is not None:
                if identity not in answers:
                    raise self.error(identity, f"no annotation in {self.annotations}; the files do not belong together")
                found["answers"] = self.people(self.need(answers[identity], "answers", identity), identity)
            yield found


class GQA(Benchmark):
    """GQA: `testdev_balanced_questions.json`, {id: {question, imageId, answer}}; pictures are `<imageId>.jpg`.

    Args:
        request: as in `VQAv2`.
    """

    task = "gqa"

    def __init__(
        self, path: str | Path, image_root: str | Path | None = None, *, request: str = SHORT, **keywords: Any
    ) -> None:
        super().__init__(path, image_root, **keywords)
        self.request = request

    def questions(self) -> Iterator[dict[str, Any]]:
        for identity, record in read_object(self.path).items():
            yield {
                "id": identity,
                "image": f"{self.text(record, 'imageId', identity)}.jpg",
                "text": asked(self.text(record, "question", identity), self.request),
                "answers": [self.text(record, "answer", identity)],
            }


class VizWiz(Benchmark):
    """VizWiz: `val.json`, [{image, question, answers: [{answer}]}].

    Args:
        request: as in `VQAv2`.
    """

    task = "vizwiz"

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        *,
        request: str = f"{UNANSWERABLE}\n{SHORT}",
        **keywords: Any,
    ) -> None:
        super().__init__(path, image_root, **keywords)
        self.request = request

    def questions(self) -> Iterator[dict[str, Any]]:
        for number, record in enumerate(records(self.path)):
            image = self.text(record, "image", number)
            yield {
                "id": image,
                "image": image,
                "text": asked(self.text(record, "question", image), self.request),
                "answers": self.people(self.need(record, "answers", image), image),
            }


class TextVQA(Benchmark):
    """TextVQA: `TextVQA_0.5.1_val.json`, {"data": [{question_id, image_id, question, answers}]}; pictures are
    `<image_id>.jpg`.

    Args:
        prompts: LLaVA's `llava_textvqa_val_v051_ocr.jsonl`, whose texts name the OCR tokens that the paper's figures
            were measured with; without it the question stands alone.
        request: as in `VQAv2`, without `prompts`.
    """

    task = "textvqa"

    def __init__(
        self, path: str | Path, prompts: str | Path | None = None, request: str = SHORT, **keywords: Any
    ) -> None:
        super().__init__(path, **keywords)
        self.prompts = None if prompts is None else Path(prompts)
        self.request = request

    def questions(self) -> Iterator[dict[str, Any]]:
        told: dict[tuple[str, str], str] = {}
        for at, record in enumerate(records(self.prompts)) if self.prompts is not None else ():
            text = self.text(record, "text", at)
            # the file names a question by its picture, which may have several
            told[str(self.need(record, "question_id", at)), _question(text)] = text
        for number, record in enumerate(listed(self.path, "data")):
            identity = self.need(record, "question_id", number)
            image, question = self.text(record, "image_id", identity), self.text(record, "question", identity)
            key = image, _question(question)
            if self.prompts is not None and key not in told:
                raise self.error(identity, f"no prompt for {question!r} in {self.prompts}; it is of another version")
            yield {
                "id": identity,
                "image": f"{image}.jpg",
                "text": told[key] if self.prompts is not None else asked(question, self.request),
                "answers": self.people(self.need(record, "answers", identity), identity),
            }


def _question(prompt: str) -> str:
    """The question of a prompt, which the OCR tokens may stand before or behind."""
    lines = prompt.strip().split("\n")
    return lines[len(lines) > 1 and lines[0].startswith("Reference OCR token:")].strip().lower()
