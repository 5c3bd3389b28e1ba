"""HallusionBench."""

import re
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from vlm.batch import SampleInfo
from vlm.metrics.base import CorpusMetric, references, sample_error


class HallusionBench(CorpusMetric):
    """Shares in [0, 1]: of right answers (`aAcc`), of figures with all their questions right (`fAcc`), of questions
    that are right for every figure they are asked of (`qAcc`), and the mean of the three.

    Guan et al., "HallusionBench: An Advanced Diagnostic Suite for Entangled Language Hallucination and Visual Illusion
    in Large Vision-Language Models", 2024; groups as in its `utils.py`: a question of the category VS that is asked
    without an image belongs to no figure. The benchmark has a language model compare answers; here, as in VLMEvalKit,
    an answer counts as the one of the words yes and no that it holds, and is wrong where it holds both or neither.

    `SampleInfo.group` is category/subcategory/set/figure/question.
    """

    name = "hallusion_bench"

    def record(self, prediction: str, sample: SampleInfo) -> Any:
        group = (sample.group or "").split("/")
        if len(group) != 5:
            raise sample_error(sample, f"'group' is {sample.group!r}, not category/subcategory/set/figure/question")
        reference = references(sample)[0].strip().lower()
        if reference not in ("yes", "no"):
            raise sample_error(sample, f"the answer has to be yes or no, found {reference!r}")
        said = {"yes", "no"} & set(re.findall(r"\w+", prediction.lower()))
        return [group, said == {reference}]

    def compute(self) -> dict[str, Tensor]:
        """float32[] each."""
        answers: list[bool] = []
        figures: dict[tuple[str, ...], list[bool]] = defaultdict(list)
        questions: dict[tuple[str, ...], list[bool]] = defaultdict(list)
        for (category, subcategory, scenes, figure, question), is_right in self.records():
            answers.append(is_right)
            questions[category, subcategory, scenes, question].append(is_right)
            if (category, figure) != ("VS", "0"):
                figures[category, subcategory, scenes, figure].append(is_right)
        found = {
            "aAcc": _share(answers),
            "fAcc": _share([all(figure) for figure in figures.values()]),
            "qAcc": _share([all(question) for question in questions.values()]),
        }
        found["mean"] = sum(found.values()) / len(found)
        return {name: torch.tensor(value, device=self.device) for name, value in found.items()}


def _share(right: list[bool]) -> float:
    return sum(right) / len(right) if right else float("nan")
