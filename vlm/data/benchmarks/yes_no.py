"""Benchmarks of yes and no: POPE, MME, HallusionBench."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.data.benchmarks.base import Benchmark, records
from vlm.data.sources.requests import SHORT, asked
from vlm.errors import UserError
from vlm.sample import MAX_PIXELS


class Pope(Benchmark):
    """POPE: a folder with `coco_pope_{random,popular,adversarial}.json`, lines of {question_id, image, text, label}.

    Args:
        request: on a line behind the question, or text with `{}` in the place of the question.
    """

    task = "pope"
    categories = ("random", "popular", "adversarial")

    def __init__(self, path: str | Path, *, request: str = SHORT, **keywords: Any) -> None:
        super().__init__(path, **keywords)
        self.request = request

    def questions(self) -> Iterator[dict[str, Any]]:
        for category in self.categories:
            for number, record in enumerate(records(self.path / f"coco_pope_{category}.json")):
                identity = f"{category}/{self.fields(record, number).value('question_id')}"
                fields = self.fields(record, identity)
                label = fields.text("label").lower()
                if label not in ("yes", "no"):
                    raise fields.error(f"'label' must be yes or no, found {label!r}")
                yield {
                    "id": identity,
                    "image": fields.text("image"),
                    "text": asked(fields.text("text"), self.request),
                    "answers": [label],
                    "group": category,
                }


class MmeFolder(Benchmark):
    """MME: a folder per subtask; `<picture>.txt` beside the image, or images in `images/` and texts in
    `questions_answers_YN/`; a line is a question, a tab, and Yes or No.

    Args:
        request: on a line behind the question, or text with `{}` in the place of the question. The file's own request,
            "Please answer yes or no.", is cut off.
    """

    task = "mme"
    _ENDING = "Please answer yes or no."

    def __init__(
        self, path: str | Path, name: str | None = None, max_pixels: int = MAX_PIXELS, request: str = SHORT
    ) -> None:
        super().__init__(path, image_root=path, name=name, max_pixels=max_pixels)
        self.request = request

    def questions(self) -> Iterator[dict[str, Any]]:
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such folder; give MME_Benchmark_release_version")
        for folder in sorted(entry for entry in self.path.iterdir() if entry.is_dir()):
            inner = folder / "questions_answers_YN"
            texts, pictures = (inner, folder / "images") if inner.is_dir() else (folder, folder)
            images = {file.stem: file for file in sorted(pictures.iterdir()) if file.suffix.lower() in (".jpg", ".png")}
            for file in sorted(texts.glob("*.txt")):
                if file.stem not in images:
                    raise UserError(f"{file}: there is no picture {file.stem}.jpg or .png in {pictures}")
                for number, line in enumerate(_lines(file)):
                    question, tab, answer = line.strip().rpartition("\t")
                    if not tab or answer.lower() not in ("yes", "no"):
                        raise UserError(f"{file}: line {number + 1} must be a question, a tab, and Yes or No")
                    group = f"{folder.name}/{file.stem}"
                    yield {
                        "id": f"{group}/{number}",
                        "image": str(images[file.stem].relative_to(self.path)),
                        "text": asked(question.replace(self._ENDING, "").strip(), self.request),
                        "answers": [answer.lower()],
                        "group": group,
                    }


class HallusionBench(Benchmark):
    """HallusionBench: a list of {category, subcategory, set_id, figure_id, question_id, question, gt_answer (1 is yes),
    visual_input, filename}, with files such as `./hallusion_bench/VD/illusion/0_0.png`.

    `SampleInfo.group` is category/subcategory/set/figure/question, which the metric needs.

    Args:
        request: on a line behind the question, or text with `{}` in the place of the question.
        only_images: leave out the questions that are asked without an image, as VLMEvalKit does.
    """

    task = "hallusion_bench"
    _KEYS = ("category", "subcategory", "set_id", "figure_id", "question_id")

    def __init__(self, path: str | Path, *, request: str = SHORT, only_images: bool = False, **keywords: Any) -> None:
        super().__init__(path, **keywords)
        self.request, self.only_images = request, only_images

    def questions(self) -> Iterator[dict[str, Any]]:
        for number, record in enumerate(records(self.path)):
            fields = self.fields(record, number)
            group = "/".join(str(fields.value(key)) for key in self._KEYS)
            fields = self.fields(record, group)
            answer, seen = (str(fields.value(key)) for key in ("gt_answer", "visual_input"))
            if answer not in ("0", "1"):
                raise fields.error(f"'gt_answer' must be 0 or 1, found {answer!r}")
            if seen == "0" and self.only_images:
                continue
            yield {
                "id": group,
                "image": None if seen == "0" else fields.text("filename").removeprefix("./"),
                "text": asked(fields.text("question"), self.request),
                "answers": ["yes" if answer == "1" else "no"],
                "group": group,
            }


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as UTF-8 text ({error}); fetch it again") from error
