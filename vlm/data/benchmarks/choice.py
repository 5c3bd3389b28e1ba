"""Benchmarks of multiple choice: MMBench, SEED-Bench, Q-Bench."""

import base64
import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from vlm.data.benchmarks.base import Benchmark, records
from vlm.data.sources.fields import read_list, read_object
from vlm.data.sources.requests import LETTER, filled
from vlm.errors import UserError

LETTERS = "ABCDEFGHIJ"
CHINESE_LETTER = "请直接回答选项字母。"
_ROUND = 1_000_000
"""MMBench numbers a question's rotations index, index + 1,000,000, index + 2,000,000, ..."""


_PANDAS = "#N/A #NA -1.#IND -1.#QNAN -NaN -nan 1.#IND 1.#QNAN <NA> N/A NA NULL NaN None n/a nan null"
_EMPTY = frozenset({"", "#N/A N/A", *_PANDAS.split()})
"""What pandas takes for an empty cell: the published prompts were made from its tables."""


class MMBench(Benchmark):
    """MMBench: a TSV with index, question, hint, A to D, answer, and the image in base64.

    The rotations of a question's options are rows of the file; their `group` is the question. The options end at the
    first empty one. The test split has no answers.

    Args:
        language: of the request for a letter: `en`, or `cn` for MMBench-CN.
        form: instead of it, the text of `{hint}` (N/A where there is none), `{question}` and `{options}`, which are
            lines such as `A. a cat`, or `{row}`: the same behind one another, with a blank between.
    """

    task = "mmbench"

    def __init__(self, path: str | Path, language: str = "en", form: str | None = None, **keywords: Any) -> None:
        if language not in ("en", "cn"):
            raise UserError(f"MMBench: language {language!r}: use en or cn")
        super().__init__(path, **keywords)
        self.request = LETTER if language == "en" else CHINESE_LETTER
        self.form = form

    def questions(self) -> Iterator[dict[str, Any]]:
        pictures: dict[str, bytes] = {}
        for number, row in enumerate(table_rows(self.path)):
            index = self.fields(row, number).text("index")
            fields = self.fields(row, index)
            choices = list(takewhile(bool, (_cell(row, letter) for letter in "ABCD")))
            hint, question = _cell(row, "hint"), fields.text("question")
            if self.form is None:
                text = "\n".join([*([hint] if hint else []), question, _lines(choices), self.request])
            else:
                text = filled(self.form, hint=hint or "N/A", question=question, **option_fields(choices))
            image = fields.text("image")
            if len(image) < 64 and image in pictures:  # a later rotation names the row that has the image
                pictures[index] = pictures[image]
            else:
                try:
                    pictures[index] = base64.b64decode(image, validate=True)
                except ValueError as error:
                    raise fields.error(f"'image' is no base64 ({error}); fetch the file again") from error
            if not index.isdecimal():
                raise fields.error("'index' must be a number")
            found = {"id": index, "image": pictures[index], "text": text}
            found |= {"choices": choices, "group": str(int(index) % _ROUND)}
            yield found | ({"answers": [answer]} if (answer := _cell(row, "answer")) else {})


def table_rows(path: Path) -> Iterator[dict[str, str | None]]:
    """The rows of a TSV by their columns, None for an empty cell."""
    csv.field_size_limit(sys.maxsize)  # an image is one field
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                yield {name: None if cell in _EMPTY else cell for name, cell in row.items() if name is not None}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is no TSV in UTF-8 ({error}); fetch it again") from error


def _cell(row: Mapping[str, str | None], name: str) -> str:
    """Empty also where LLaVA-1.5 takes a written word for an empty cell."""
    cell = row.get(name) or ""
    return "" if cell.lower() in ("nan", "none") else cell


class FormedChoice(Benchmark):
    """Questions with options, written as a form says.

    Args:
        form: the text of `{question}` and `{options}`, which are lines such as `A. a cat`, or `{row}`: the same behind
            one another, with a blank between.
    """

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        *,
        form: str = f"{{question}}\n{{options}}\n{LETTER}",
        **keywords: Any,
    ) -> None:
        super().__init__(path, image_root, **keywords)
        self.form = form


class SeedBench(FormedChoice):
    """SEED-Bench: `SEED-Bench.json`, {"questions": [{question_id, question, choice_a.., answer, data_id, data_type}]}.

    The questions about images alone; those about videos are left out.
    """

    task = "seed_bench"

    def questions(self) -> Iterator[dict[str, Any]]:
        for number, record in enumerate(read_list(self.path, "questions")):
            identity = self.fields(record, number).value("question_id")
            fields = self.fields(record, identity)
            if record.get("data_type", "image") != "image":
                continue
            choices = [fields.text(f"choice_{letter}") for letter in "abcd"]
            question = fields.text("question")
            yield {
                "id": identity,
                "image": fields.text("data_id"),
                "text": filled(self.form, question=question, **option_fields(choices)),
                "choices": choices,
                "answers": [fields.text("answer")],
                "group": str(record.get("question_type_id", "")),
            }


class QBench(FormedChoice):
    """Q-Bench's questions about how an image looks (LLVisionQA): a list of {img_path, question, candidates,
    correct_ans}; the test split has no answers.
    """

    task = "q_bench"

    def questions(self) -> Iterator[dict[str, Any]]:
        for number, record in enumerate(records(self.path)):
            fields = self.fields(record, number)
            choices = fields.texts("candidates")
            question = fields.text("question")
            found = {
                "id": str(number),
                "image": fields.text("img_path"),
                "text": filled(self.form, question=question, **option_fields(choices)),
                "choices": choices,
            }
            if not fields.has("correct_ans"):
                yield found
                continue
            answer = fields.text("correct_ans")
            if answer not in choices:
                raise fields.error(f"'correct_ans' is {answer!r}, which is none of the candidates")
            yield found | {"answers": [LETTERS[choices.index(answer)]]}


class ScienceQAPictures(Benchmark):
    """ScienceQA in its own layout, the questions of a split that have an image, asked in any form.

    The folder holds `problems.json` and `images/<split>/<id>/image.png`; `vlm.data.ScienceQA` reads it to train on.

    Args:
        path: the folder.
        image_root: by default its `images`.
        split: as the questions name it.
        form: the text of `{hint}` (N/A where there is none), `{question}` and `{options}`, which are lines such as
            `A. a ball`.
    """

    task = "science_qa"

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        *,
        split: str = "test",
        form: str = f"{{question}}\nContext: {{hint}}\n{{options}}\n{LETTER}",
        **keywords: Any,
    ) -> None:
        super().__init__(path, Path(path) / "images" if image_root is None else image_root, **keywords)
        self.split, self.form = split, form

    def questions(self) -> Iterator[dict[str, Any]]:
        for identity, problem in read_object(self.path / "problems.json").items():
            fields = self.fields(problem, identity)
            if fields.value("split") != self.split or not fields.has("image"):
                continue
            choices, letter = fields.choice(LETTERS)
            parts = {"question": fields.text("question"), "hint": fields.words("hint") or "N/A"}
            yield {
                "id": identity,
                "image": f"{self.split}/{identity}/{problem['image']}",
                "text": filled(self.form, **parts, options=_lines(choices)),
                "choices": choices,
                "answers": [letter],
            }


def option_fields(choices: Sequence[str]) -> dict[str, str]:
    """What a form may name of a question's options."""
    lines = _lines(choices)
    return {"options": lines, "row": " ".join(lines.split("\n"))}


def _lines(choices: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
