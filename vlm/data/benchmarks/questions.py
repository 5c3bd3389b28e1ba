"""Benchmarks of questions with short answers: VQA v2, TDIUC, GQA, VizWiz, TextVQA, OCRBench."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.data.benchmarks.base import Benchmark, records
from vlm.data.sources.fields import Fields, read_list, read_object
from vlm.data.sources.requests import SHORT, asked

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


class VQAv2(Benchmark):
    """VQA v2: `{"questions": [{question_id, image_id, question}]}` and the annotations beside it.

    Args:
        annotations: `{"annotations": [{question_id, answers: [{answer}]}]}`, ten people each; test splits have none.
        image_pattern: file name from the number of the image; `COCO_test2015_{:012d}.jpg` for the test splits.
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
        entries = read_list(self.annotations, "annotations") if self.annotations is not None else []
        answers = {self.fields(entry, at).value("question_id"): entry for at, entry in enumerate(entries)}
        for number, record in enumerate(read_list(self.path, "questions")):
            identity = self.fields(record, number).value("question_id")
            fields = self.fields(record, identity)
            found = {
                "id": identity,
                "image": fields.file_name(self.image_pattern, "image_id"),
                "text": asked(fields.text("question"), self.request),
            }
            if self.annotations is not None:
                if identity not in answers:
                    raise fields.error(f"no annotation in {self.annotations}; the files do not belong together")
                found |= self.annotated(self.fields(answers[identity], identity))
            yield found

    def annotated(self, annotation: Fields) -> dict[str, Any]:
        """What an annotation says of its question."""
        return {"answers": annotation.answers("answers")}


class TDIUC(VQAv2):
    """TDIUC (Kafle and Kanan, 2017): the files of VQA v2, whose annotations name the kind of a question too.

    Questions that are absurd of their image have the answer "doesnotapply".

    Args:
        annotations: `{"annotations": [{question_id, question_type, answers: [{answer}]}]}`.
        **keywords: as in `VQAv2`.
    """

    task = "tdiuc"

    def __init__(self, path: str | Path, annotations: str | Path, **keywords: Any) -> None:
        super().__init__(path, annotations, **keywords)

    def annotated(self, annotation: Fields) -> dict[str, Any]:
        return super().annotated(annotation) | {"group": annotation.text("question_type")}


class GQA(Benchmark):
    """GQA: `testdev_balanced_questions.json`, {id: {question, imageId, answer}}; images are `<imageId>.jpg`.

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
            fields = self.fields(record, identity)
            yield {
                "id": identity,
                "image": f"{fields.text('imageId')}.jpg",
                "text": asked(fields.text("question"), self.request),
                "answers": [fields.text("answer")],
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
            image = self.fields(record, number).text("image")
            fields = self.fields(record, image)
            yield {
                "id": image,
                "image": image,
                "text": asked(fields.text("question"), self.request),
                "answers": fields.answers("answers"),
            }


class TextVQA(Benchmark):
    """TextVQA: `TextVQA_0.5.1_val.json`, {"data": [{question_id, image_id, question, answers}]}; images are
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
            fields = self.fields(record, at)
            text = fields.text("text")
            # the file names a question by its image, which may have several
            told[str(fields.value("question_id")), _question(text)] = text
        for number, record in enumerate(read_list(self.path, "data")):
            identity = self.fields(record, number).value("question_id")
            fields = self.fields(record, identity)
            image, question = fields.text("image_id"), fields.text("question")
            key = image, _question(question)
            if self.prompts is not None and key not in told:
                raise fields.error(f"no prompt for {question!r} in {self.prompts}; it is of another version")
            yield {
                "id": identity,
                "image": f"{image}.jpg",
                "text": told[key] if self.prompts is not None else asked(question, self.request),
                "answers": fields.answers("answers"),
            }


def _question(prompt: str) -> str:
    """The question of a prompt, which the OCR tokens may stand before or behind."""
    lines = prompt.strip().split("\n")
    return lines[len(lines) > 1 and lines[0].startswith("Reference OCR token:")].strip().lower()


class OCRBench(Benchmark):
    """OCRBench (Liu et al., 2023): a list of {id, image_path, question, answers, dataset_name, type}; `answers` is a
    text or several.

    Args:
        request: as in `VQAv2`.
    """

    task = "ocr_bench"

    def __init__(self, path: str | Path, request: str = SHORT, **keywords: Any) -> None:
        super().__init__(path, **keywords)
        self.request = request

    def questions(self) -> Iterator[dict[str, Any]]:
        for number, record in enumerate(records(self.path)):
            identity = self.fields(record, number).value("id")
            fields = self.fields(record, identity)
            answers = record.get("answers")
            yield {
                "id": identity,
                "image": fields.text("image_path"),
                "text": asked(fields.text("question"), self.request),
                "answers": [fields.text("answers")] if isinstance(answers, str) else fields.texts("answers"),
                "group": fields.text("dataset_name"),
            }
