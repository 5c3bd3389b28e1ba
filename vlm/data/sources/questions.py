"""Questions and answers to train on: VQA v2, documents, charts, pairs of images."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from vlm.data.sources.fields import Fields, Record, read_list
from vlm.data.sources.record_sources import IMAGE, ObjectSource, RecordSource, after_image, by_unique, exchange, text
from vlm.data.sources.requests import SHORT, asked
from vlm.errors import UserError
from vlm.sample.paths import located


class VQAv2Training(ObjectSource):
    """VQA v2 (Goyal et al., 2017) with its annotations, to train on: one sample per question.

    The answer is the one that most people gave, the first of equals. All answers are in `answers`, the weight of each
    the share of people who gave it (BLIP trains on them all, `PretrainingData` on another one each epoch).

    Args:
        path: `{"questions": [{question_id, image_id, question}]}`.
        annotations: `{"annotations": [{question_id, answers: [{answer}]}]}`.
        image_pattern: file name from the number of the image.
        request: on a line behind the question, or text with `{}` in the place of the question.
        ask: for the `answer`, or for the `question` to the answer that most people gave, which then stands in the
            request's `{}` (InstructBLIP's generation of questions).
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    task = "vqa"

    def __init__(
        self,
        path: str | Path,
        annotations: str | Path,
        image_pattern: str = "COCO_train2014_{:012d}.jpg",
        request: str = SHORT,
        ask: Literal["answer", "question"] = "answer",
        **keywords: Any,
    ) -> None:
        super().__init__(path, **keywords)
        if ask not in ("answer", "question"):
            raise UserError(f"VQAv2Training: ask must be answer or question, found {ask!r}")
        self.annotations = located(annotations)
        self.image_pattern, self.request, self.ask = image_pattern, request, ask

    def records(self) -> Iterator[Record]:
        answers = by_unique(self.annotations, read_list(self.annotations, "annotations"), "question_id")
        for identity, question in by_unique(self.path, read_list(self.path, "questions"), "question_id").items():
            if identity not in answers:
                raise UserError(
                    f"{self.path}: question {identity} has no annotation in {self.annotations}; "
                    "the files do not belong together"
                )
            yield {**question, "id": str(identity), "people": answers[identity].get("answers")}

    def chat(self, fields: Fields) -> dict[str, Any]:
        counts = Counter(person.text("answer") for person in fields.objects("people"))
        if not counts:
            raise fields.error("'answers' of its annotation is empty; remove the question")
        image = fields.file_name(self.image_pattern, "image_id")
        question, answer = fields.text("question"), counts.most_common(1)[0][0]
        if self.ask == "question":
            asking = after_image(asked(answer, self.request))
            return {"images": [image], "messages": exchange(asking, [text(question)]), "answers": [question]}
        return {
            "images": [image],
            "messages": exchange(after_image(asked(question, self.request)), [text(answer)]),
            "answers": [{"text": answer, "weight": n / counts.total()} for answer, n in counts.items()],
        }


class DocVQA(ObjectSource):
    """DocVQA (Mathew et al., 2021): questions about pages; the first answer is trained, all are in `answers`.

    ::

        {"data": [{"questionId": 7, "question": "Who signed?", "image": "documents/a.png", "answers": ["Ann"]}]}

    Args:
        path: `train_v1.0.json` or any file of its form; InfographicVQA's are (`image_key: image_local_name`).
        image_key: of the file name.
        id_key: of the number of a question; Scene Text VQA's files are of this form too (`id_key: question_id,
            image_key: file_path`).
        request: as in `VQAv2Training`.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    task = "document"

    def __init__(
        self,
        path: str | Path,
        image_key: str = "image",
        id_key: str = "questionId",
        request: str = SHORT,
        **keywords: Any,
    ) -> None:
        super().__init__(path, **keywords)
        self.image_key, self.id_key, self.request = image_key, id_key, request

    def records(self) -> Iterator[Record]:
        for identity, entry in by_unique(self.path, read_list(self.path, "data"), self.id_key).items():
            yield {**entry, "id": str(identity)}

    def chat(self, fields: Fields) -> dict[str, Any]:
        answers = fields.texts("answers")
        question = asked(fields.text("question"), self.request)
        return {
            "images": [fields.text(self.image_key)],
            "messages": exchange(after_image(question), [text(answers[0])]),
            "answers": answers,
        }


class ChartQA(RecordSource):
    """ChartQA (Masry et al., 2022): questions about charts.

    ::

        [{"imgname": "a.png", "query": "Which bar is the tallest?", "label": "blue"}]

    Args:
        path: `train_human.json`, `train_augmented.json` or any file of their form.
        request: as in `VQAv2Training`.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    task = "chart"
    image_key = "imgname"

    def __init__(self, path: str | Path, request: str = SHORT, **keywords: Any) -> None:
        super().__init__(path, **keywords)
        self.request = request

    def chat(self, fields: Fields) -> dict[str, Any]:
        answer = fields.text("label")
        question = asked(fields.text("query"), self.request)
        return {
            "images": [fields.text("imgname")],
            "messages": exchange(after_image(question), [text(answer)]),
            "answers": [answer],
        }


class ImagePairs(RecordSource):
    """Several images with one question about them, such as what differs.

    ::

        {"id": "7", "images": ["a.png", "b.png"], "question": "What differs?", "answer": "The dog is gone."}

    Args:
        path: JSON list or JSONL.
        mark: text before each image, `{}` its number from 1; Qwen-VL's is `Picture {}: `.
        **keywords: `image_root`, `name`, `max_pixels` as in `JsonSource`.
    """

    task = "compare"
    image_key = "images"

    def __init__(self, path: str | Path, mark: str = "", **keywords: Any) -> None:
        super().__init__(path, **keywords)
        self.mark = mark

    def chat(self, fields: Fields) -> dict[str, Any]:
        images = fields.texts("images")
        content = []
        for number in range(1, len(images) + 1):
            content += [text(self.mark.format(number))] if self.mark else []
            content += [IMAGE, text("\n")]
        return {
            "images": images,
            "messages": exchange([*content, text(fields.text("question"))], [text(fields.text("answer"))]),
        }
