"""ScienceQA (Learn to Explain, Lu et al., 2022) in its own layout: `problems.json`, `pid_splits.json`, `images/`."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlm.data.sources.base import Source
from vlm.data.sources.fields import Fields, read_object
from vlm.data.sources.instructions import fill_instruction
from vlm.data.sources.record_sources import after_image, exchange, text
from vlm.errors import UserError, quoted
from vlm.sample import MAX_PIXELS, Sample, parse_sample

TASK = "science_qa"
LETTERS = "ABCDE"
Form = Literal["QCM-LEA", "QCM-A"]


class ScienceQA(Source):
    """Multiple-choice questions, half of them with an image, with a lecture and an explanation of the answer.

    ::

        problems.json        {"7": {"question": "Which is a solid?", "choices": ["a ball", "air"], "answer": 0,
                                    "hint": "", "image": "image.png" or null, "lecture": "...", "solution": "...",
                                    "split": "train"}, ...}
        pid_splits.json      {"train": ["7", ...], "val": [...], "minival": [...], "test": [...], "minitest": [...]}
        images/train/7/image.png

    A sample reads as in LLaVA's `convert_sqa_to_llava` (haotian-liu/LLaVA)::

        Which is a solid?                          question
        Context: N/A                               hint
        Options: (A) a ball (B) air                choices
        <image>                                    behind the question

        {lecture} {solution} The answer is A.      with the form QCM-LEA

    Blanks at both ends are stripped, every double blank becomes one, and a backslash with an n in lecture or solution
    is a new line, all as published. `choices` are the options and `answers` the
    letter, with the task `science_qa`.

    Args:
        path: the folder.
        split: a key of `pid_splits.json`; a question's image lies under the split that the question itself names.
        form: what the answer is: QCM-LEA reasons first (LLaVA), QCM-A is the letter's sentence alone.
        name: by default `science_qa_{split}`.
        max_pixels: limit on decode.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        form: Form = "QCM-LEA",
        name: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if form not in ("QCM-LEA", "QCM-A"):
            raise UserError(f"ScienceQA: unknown form {form!r}; use QCM-LEA or QCM-A")
        self.path = Path(path)
        self.split = split
        self.form = form
        self.name = name if name is not None else f"{TASK}_{split}"
        self.max_pixels = max_pixels

    @cached_property
    def _problems(self) -> list[tuple[str, Any]]:
        """(id, problem) of the split, in its order."""
        problems, splits = (read_object(self.path / name) for name in ("problems.json", "pid_splits.json"))
        ids = splits.get(self.split)
        if not isinstance(ids, list):
            raise UserError(f"{self.path / 'pid_splits.json'}: no split {self.split!r}; it has {', '.join(splits)}")
        ids = [str(pid) for pid in ids]
        if lost := [pid for pid in ids if pid not in problems]:
            raise UserError(f"{self.path / 'problems.json'}: question {lost[0]!r} of split {self.split!r} is missing")
        if not ids:
            raise UserError(f"{self.path / 'pid_splits.json'}: split {self.split!r} is empty; choose another one")
        return [(pid, problems[pid]) for pid in ids]

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} questions, asked for number {index}")
        pid, problem = self._problems[index]
        return parse_sample(
            self._record(pid, problem),
            source=str(self.path / "problems.json"),
            image_root=self.path / "images",
            max_pixels=self.max_pixels,
        )

    def has_image(self, index: int) -> bool:
        problem = self._problems[index][1]
        return isinstance(problem, Mapping) and bool(problem.get("image"))

    def image_mask(self) -> np.ndarray:
        return np.array([self.has_image(index) for index in range(len(self))])

    def _record(self, pid: str, problem: Any) -> dict[str, Any]:
        fields = Fields(problem, identity=pid, source=self.path / "problems.json")
        texts = {key: fields.words(key) for key in ("question", "hint", "lecture", "solution")}
        options_needed = f"a list of 2 to {len(LETTERS)} texts"
        if not 1 < len(found := fields.need("choices", list, options_needed)) <= len(LETTERS):
            raise fields.error(f"'choices' must be {options_needed}, found {quoted(found)}")
        choices, letter = fields.choice(LETTERS)
        lecture, solution = (texts[key].replace("\\n", "\n") for key in ("lecture", "solution"))
        options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        question = _tidy(
            f"Question: {texts['question']}\nContext: {texts['hint'].strip() or 'N/A'}\nOptions: {options}\n"
        )
        reasons = f"{lecture} {solution} " if self.form == "QCM-LEA" else ""
        reply = _tidy(f"Answer: {reasons}The answer is {letter}.")
        content: list[dict[str, str]] = [{"type": "text", "text": question.replace("Question: ", "")}]
        image = problem.get("image")
        if image:
            content = [{"type": "text", "text": content[0]["text"] + "\n"}, {"type": "image"}]
        return {
            "id": pid,
            "images": [f"{problem.get('split', self.split)}/{pid}/{image}"] if image else [],
            "messages": [
                {"role": "user", "content": content},
                {"role": "assistant", "content": reply.replace("Answer: ", "")},
            ],
            "task": TASK,
            "choices": choices,
            "answers": [letter],
        }


class ScienceQAChoices(ScienceQA):
    """The questions of a split that have an image, asked for the text of the right choice (InstructBLIP).

    Args:
        path: the folder.
        split: as in `ScienceQA`.
        request: text with `{}` in the place of the question, `{hint}` in that of the hint (N/A where there is none),
            and `{options}` in that of the choices, `(a) x (b) y`.
        name: by default `science_qa_{split}`.
        max_pixels: limit on decode.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        request: str = "Context: {hint} Question: {} Options: {options}. Answer:",
        name: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(path, split, name=name, max_pixels=max_pixels)
        self.request = request

    @cached_property
    def _problems(self) -> list[tuple[str, Any]]:
        found = [
            (pid, problem)
            for pid, problem in super()._problems
            if Fields(problem, identity=pid, source="").has("image")
        ]
        if not found:
            raise UserError(f"{self.path}: no question of split {self.split!r} has an image; choose another one")
        return found

    def _record(self, pid: str, problem: Any) -> dict[str, Any]:
        record = super()._record(pid, problem)
        choices = [str(choice) for choice in record["choices"]]
        right = choices[LETTERS.index(record["answers"][0])]
        form = self.request.replace("{hint}", (problem.get("hint") or "").strip() or "N/A")
        asked = _tidy(fill_instruction(form, problem["question"], choices))
        return record | {"messages": exchange(after_image(asked), [text(right)]), "answers": [right]}


def _tidy(text: str) -> str:
    return text.replace("  ", " ").strip()
