"""Answers in the forms that servers and judges of benchmarks take."""

import io
import json
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from vlm.data.benchmarks.base import records
from vlm.data.benchmarks.choice import table_rows
from vlm.data.sources.fields import read_list, read_object
from vlm.errors import UserError
from vlm.metrics.vqa import normalize_textvqa

Rows = Sequence[Mapping[str, Any]]


class Submission(ABC):
    """A form of answers.

    Attributes:
        file: the name of what `content` gives.
    """

    file: str

    def check(self) -> None:
        """Raises `UserError` for files that `content` needs and that are not there; before the first answer."""
        return

    @abstractmethod
    def content(self, rows: Rows) -> bytes:
        """The file's bytes.

        Args:
            rows: with `id` and `answer`.

        Raises:
            UserError: the answers do not belong to the benchmark.
        """


class VQAServer(Submission):
    """[{question_id, answer}] of the VQA v2 server, which wants every question of the test split, test-dev or not:
    those that were not asked are answered with nothing. Answers are normalised as LLaVA-1.5 does before it submits
    (scripts/convert_vqav2_for_submission.py).

    Args:
        questions: of the whole split: VQA's `{"questions": [{question_id}]}`, or LLaVA's JSONL of {question_id}.
    """

    file = "submission.json"

    def __init__(self, questions: str | Path) -> None:
        self.questions = Path(questions)

    def check(self) -> None:
        self._split()

    def content(self, rows: Rows) -> bytes:
        answers = {str(row["id"]): normalize_textvqa(row["answer"]) for row in rows}
        split = self._split()
        if lost := answers.keys() - map(str, split):
            raise UserError(
                f"{self.questions}: has no question {min(lost)!r}, which was answered; give the file of the whole split"
            )
        return _json([{"question_id": identity, "answer": answers.get(str(identity), "")} for identity in split])

    def _split(self) -> list[Any]:
        is_list = self.questions.suffix == ".jsonl"
        entries: Iterable[Any] = records(self.questions) if is_list else read_list(self.questions, "questions")
        split = [entry.get("question_id") if isinstance(entry, Mapping) else None for entry in entries]
        if None in split:
            raise UserError(
                f"{self.questions}: question {split.index(None)} has no 'question_id'; give a question file"
            )
        return split


class VizWizServer(Submission):
    """[{image, answer}] of the VizWiz server, normalised as for VQA v2. A question's id is the name of its image."""

    file = "submission.json"

    def content(self, rows: Rows) -> bytes:
        return _json([{"image": row["id"], "answer": normalize_textvqa(row["answer"])} for row in rows])


class MMVetGrader(Submission):
    """{id: answer} of MM-Vet's grader."""

    file = "submission.json"

    def content(self, rows: Rows) -> bytes:
        return _json({row["id"]: row["answer"] for row in rows})


class LlavaReview(Submission):
    """JSONL of {question_id, text, ...}, which LLaVA's review scripts (`eval_gpt_review_*.py`) read."""

    file = "submission.jsonl"

    def content(self, rows: Rows) -> bytes:
        lines = (
            {"question_id": _number(row["id"]), "text": row["answer"], "answer_id": row["id"], "model_id": "vlm"}
            for row in rows
        )
        return "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode()


class MathVistaExtraction(Submission):
    """{pid: problem with its `response`}, which MathVista's `extract_answer.py` and `calculate_score.py` read.

    Args:
        problems: the file that was asked.
    """

    file = "submission.json"

    def __init__(self, problems: str | Path) -> None:
        self.problems = Path(problems)

    def check(self) -> None:
        read_object(self.problems)

    def content(self, rows: Rows) -> bytes:
        problems = read_object(self.problems)
        if lost := {row["id"] for row in rows} - problems.keys():
            raise UserError(f"{self.problems}: has no {min(lost)!r}, which was answered; give the file that was asked")
        return _json({row["id"]: problems[row["id"]] | {"response": row["answer"]} for row in rows})


class MMBenchSheet(Submission):
    """An Excel sheet for MMBench's server: the columns of the benchmark's table without its images and categories,
    and a column `prediction` behind the options (scripts/convert_mmbench_for_submission.py).

    Args:
        table: the TSV that was asked.
    """

    file = "submission.xlsx"
    _DROPPED = ("hint", "category", "source", "image", "comment", "l2-category", "prediction")

    def __init__(self, table: str | Path) -> None:
        self.table = Path(table)

    def check(self) -> None:
        first = next(table_rows(self.table), {})
        if "index" not in first or "D" not in first:
            raise UserError(f"{self.table}: has no rows with columns 'index' and 'D'; give the table that is asked")

    def content(self, rows: Rows) -> bytes:
        self.check()
        answers = {row["id"]: row["answer"] for row in rows}
        sheet: list[list[str | int | None]] = []
        columns: list[str] = []
        asked: set[str | None] = set()
        for row in table_rows(self.table):
            if not columns:
                columns = [name for name in row if name not in self._DROPPED]
                columns.insert(columns.index("D") + 1, "prediction")
                sheet.append([*columns])
            asked.add(row["index"])
            known = row | {"index": _number(row["index"] or ""), "prediction": answers.get(row["index"] or "")}
            sheet.append([known[name] for name in columns])
        if lost := answers.keys() - asked:
            raise UserError(
                f"{self.table}: has no row {min(lost)!r}, which was answered; give the table that was asked"
            )
        return _workbook(sheet)


def _number(identity: str) -> int | str:
    return int(identity) if identity.isdecimal() else identity


def _json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=1).encode()


_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_LINKS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_TYPES = "application/vnd.openxmlformats-officedocument.spreadsheetml"
_HEAD = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'


def _workbook(sheet: list[list[str | int | None]]) -> bytes:
    """An Excel workbook (ECMA-376) of one sheet."""
    lines = (f"<row>{''.join(map(_cell, row))}</row>" for row in sheet)
    files = {
        "[Content_Types].xml": f'<Types xmlns="{_PACKAGE}/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{_TYPES}.sheet.main+xml"/>'
        f'<Override PartName="/xl/sheet.xml" ContentType="{_TYPES}.worksheet+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{_PACKAGE}/relationships">'
        f'<Relationship Id="rId1" Type="{_LINKS}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{_MAIN}" xmlns:r="{_LINKS}">'
        '<sheets><sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{_PACKAGE}/relationships">'
        f'<Relationship Id="rId1" Type="{_LINKS}/worksheet" Target="sheet.xml"/></Relationships>',
        "xl/sheet.xml": f'<worksheet xmlns="{_MAIN}"><sheetData>{"".join(lines)}</sheetData></worksheet>',
    }
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), f"{_HEAD}{text}", zipfile.ZIP_DEFLATED)
    return content.getvalue()


def _cell(value: str | int | None) -> str:
    if value is None or value == "":
        return "<c/>"
    if isinstance(value, int):
        return f"<c><v>{value}</v></c>"
    plain = escape(_NO_XML.sub("", value))
    return f'<c t="inlineStr"><is><t xml:space="preserve">{plain}</t></is></c>'
