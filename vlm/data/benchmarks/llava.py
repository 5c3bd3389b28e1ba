"""Open questions that a judge scores, and question files of LLaVA's own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.data.benchmarks.base import Benchmark, records
from vlm.data.sources.fields import read_object
from vlm.data.sources.requests import LETTER, asked

LETTERS = "ABCDE"


class LlavaQuestions(Benchmark):
    """A question file of LLaVA's own (its eval.zip): JSONL of `question_id`, `image`, `text`; the texts are used as
    they are. For benchmarks that a server or a judge scores: VQAv2 test-dev, VizWiz test, LLaVA-Bench.

    Args:
        task: name of the benchmark.
        image_pattern: file name of an image from what the file calls it; LLaVA-Bench (COCO) needs
            `COCO_val2014_{}`.
        request: text with `{}` in the place of the question.
        id_key: what names a question; VizWiz' server wants the image.
    """

    def __init__(
        self,
        path: str | Path,
        task: str,
        image_pattern: str = "{}",
        id_key: str = "question_id",
        request: str = "{}",
        **keywords: Any,
    ) -> None:
        self.task = task
        self.request = request
        self.id_key = id_key
        self.image_pattern = image_pattern
        super().__init__(path, **keywords)

    def questions(self) -> Iterator[dict[str, Any]]:
        for number, record in enumerate(records(self.path)):
            identity = self.fields(record, number).value(self.id_key)
            fields = self.fields(record, identity)
            fields.text("image")
            image = fields.file_name(self.image_pattern, "image")
            found = {"id": identity, "image": image, "text": asked(fields.text("text"), self.request)}
            yield found | ({"group": str(record["category"])} if "category" in record else {})


class MMVet(Benchmark):
    """MM-Vet: `mm-vet.json`, {"v1_0": {imagename, question, answer, capability: [...]}}; the question stands alone.

    The reference, in which alternatives stand between <OR> and parts between <AND>, is for the judge.

    Args:
        request: text with `{}` in the place of the question.
    """

    task = "mm_vet"

    def __init__(self, path: str | Path, *, request: str = "{}", **keywords: Any) -> None:
        super().__init__(path, **keywords)
        self.request = request

    def questions(self) -> Iterator[dict[str, Any]]:
        for identity, record in read_object(self.path).items():
            fields = self.fields(record, identity)
            yield {
                "id": identity,
                "image": fields.text("imagename"),
                "text": asked(fields.text("question"), self.request),
                "answers": [fields.text("answer")],
            }


class LlavaScienceQA(Benchmark):
    """ScienceQA as LLaVA-1.5 asks it: LLaVA's `llava_test_CQM-A.json` and the `problems.json` of ScienceQA.

    Args:
        problems: has the options and the right one of each question.
        only_images: leave out the questions without an image (the figure of LLaVA-1.5's table, SQA-IMG).
    """

    task = "science_qa"

    def __init__(self, path: str | Path, problems: str | Path, only_images: bool = True, **keywords: Any) -> None:
        super().__init__(path, **keywords)
        self.problems = Path(problems)
        self.only_images = only_images

    def questions(self) -> Iterator[dict[str, Any]]:
        problems = read_object(self.problems)
        for number, record in enumerate(records(self.path)):
            identity = str(self.fields(record, number).value("id"))
            fields = self.fields(record, identity)
            if self.only_images and not fields.has("image"):
                continue
            turns = fields.value("conversations")
            text = self.fields(turns[0] if isinstance(turns, list) and turns else None, identity).text("value")
            choices, letter = self.fields(self.fields(problems, identity).value(identity), identity).choice(LETTERS)
            yield {
                "id": identity,
                "image": record.get("image"),
                "text": f"{text.replace('<image>', '').strip()}\n{LETTER}",
                "choices": choices,
                "answers": [letter],
            }
