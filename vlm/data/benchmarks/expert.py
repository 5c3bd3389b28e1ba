"""Benchmarks of knowledge and reasoning: MMMU, MathVista."""

import ast
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

from vlm.data.benchmarks.base import Benchmark
from vlm.data.benchmarks.choice import option_fields
from vlm.data.sources.fields import Fields, read_object
from vlm.data.sources.parquet import read_table
from vlm.data.sources.requests import LETTER, SHORT, asked, filled
from vlm.data.sources.rows import RowImage
from vlm.errors import SampleError, UserError
from vlm.metrics.choice import LETTERS
from vlm.sample import ImageFile


class MMMU(Benchmark):
    """MMMU as its hub folder has it: `<Subject>/<split>-*.parquet` with question, options, answer and up to 7 images.

    Prompts are those of the benchmark's own script for LLaVA (MMMU-Benchmark/MMMU, `run_llava.py`): it shows the first
    image alone, and leaves `<image 1>` in the text.

    Args:
        split: `validation`, or `dev`.
        form: instead of that script's words for a choice, the text of `{question}` and `{options}`, which are lines
            such as `A. a cat`, or `{row}`: the same behind one another, with a blank between.
        request: of a question without options: on a line behind it, or text with `{}` in its place.
    """

    task = "mmmu"

    def __init__(
        self,
        path: str | Path,
        split: str = "validation",
        form: str | None = None,
        request: str = SHORT,
        **keywords: Any,
    ) -> None:
        super().__init__(path, **keywords)
        self.split, self.form, self.request = split, form, request

    def questions(self) -> Iterator[dict[str, Any]]:
        files = sorted(self.path.glob(f"*/{self.split}-*.parquet"))
        if not files:
            raise UserError(f"{self.path}: has no <Subject>/{self.split}-*.parquet; give the folder of MMMU/MMMU")
        for file in files:
            columns = ("id", "question", "options", "answer", "question_type")
            for row, record in enumerate(read_table(file, columns).to_pylist()):
                yield self._question(file, row, record)

    def _question(self, file: Path, row: int, record: Mapping[str, Any]) -> dict[str, Any]:
        identity = self.fields(record, f"{file.parent.name} {row}").text("id")
        fields = self.fields(record, identity)
        question, answer = fields.text("question"), fields.text("answer")
        load = partial(_picture, file, row, identity, self.max_pixels)
        found = {
            "id": identity,
            "image": RowImage(name=f"image_1 of {identity}", max_pixels=self.max_pixels, load=load),
            "group": file.parent.name,
        }
        if fields.text("question_type") != "multiple-choice":
            answers = _spelled(fields, "answer") if answer.startswith("[") else [answer]
            return found | {"text": asked(question, self.request), "answers": answers}
        choices = _spelled(fields, "options")
        if self.form is None:
            options = "".join(f"({letter}) {choice}\n" for letter, choice in zip(LETTERS, choices, strict=False))
            text = f"{question}\n{options}\n{LETTER}"
        else:
            text = filled(self.form, question=question, **option_fields(choices))
        return found | {"text": text, "choices": choices, "answers": [answer]}


def _spelled(fields: Fields, key: str) -> list[str]:
    """A list that a text spells."""
    text = fields.text(key)
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise fields.error(f"{key!r} is no list ({error}); fetch the file again") from error
    if not isinstance(values, list) or not values:
        raise fields.error(f"{key!r} must spell a list, found {text!r}")
    return [str(value) for value in values]


def _picture(file: Path, row: int, identity: str, max_pixels: int) -> ImageFile:
    data = _pictures(file)[row]
    if data is None:
        raise SampleError("has no 'image_1'; fetch the file again", sample_id=identity, source=str(file))
    return ImageFile(name=f"image_1 of {identity}", data=data, max_pixels=max_pixels)


@lru_cache(maxsize=1)  # questions are asked subject by subject
def _pictures(file: Path) -> list[bytes | None]:
    rows = read_table(file, ("image_1",)).to_pylist()
    return [(row.get("image_1") or {}).get("bytes") for row in rows]


class MathVista(Benchmark):
    """MathVista: `testmini.json`, {pid: {question, image, choices, unit, precision, question_type, answer_type, ...}}.

    Prompts are those of the benchmark's `build_query.py` without examples, captions and detected text. The answer to
    look for is found by a language model in its `extract_answer.py`, so scoring is left to it.

    Args:
        hint_first: as the column `query` of AI4Math/MathVista has it, which VLMEvalKit asks: the hint before the
            question, and no `Solution:`.
    """

    task = "math_vista"
    _HINTS: ClassVar = {
        ("multi_choice", "text"): "and provide the correct option letter, e.g., A, B, C, D, at the end.",
        ("free_form", "integer"): "requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.",
        ("free_form", "float"): "requiring a floating-point number with {} and provide the final value, e.g., {}, at "
        "the end.",
        ("free_form", "list"): "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], "
        "[1.2, 1.3, 1.4], at the end.",
    }
    _PLACES: ClassVar = {1: ("one decimal place", "1.2, 1.3, 1.4"), 2: ("two decimal places", "1.23, 1.34, 1.45")}

    def __init__(self, path: str | Path, *, hint_first: bool = False, **keywords: Any) -> None:
        super().__init__(path, **keywords)
        self.hint_first = hint_first

    def questions(self) -> Iterator[dict[str, Any]]:
        for identity, record in read_object(self.path).items():
            fields = self.fields(record, identity)
            question, unit = fields.text("question"), fields.record.get("unit")
            choices = fields.need("choices", list, "a list") if fields.has("choices") else []
            lines = [f"Question: {question} (Unit: {unit})" if unit else f"Question: {question}"]
            lines += ["Choices:"] if choices else []
            lines += [f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
            hint = f"Hint: Please answer the question {self._hint(fields)}"
            lines = [hint, *lines] if self.hint_first else [*lines, hint, "Solution:"]
            found = {"id": identity, "image": fields.text("image"), "text": "\n".join(lines)}
            yield found | {"answers": [str(fields.value("answer"))]}

    def _hint(self, fields: Fields) -> str:
        kind = fields.text("question_type"), fields.text("answer_type")
        precision = fields.record.get("precision")
        places = int(precision or 0)
        if kind not in self._HINTS or (kind[1] == "float" and places not in self._PLACES):
            raise fields.error(f"no prompt is published for {kind} with precision {precision!r}")
        return self._HINTS[kind].format(*self._PLACES.get(places, ()))
