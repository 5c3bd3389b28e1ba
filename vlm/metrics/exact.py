"""Equality with a reference."""

import re

from vlm.batch import SampleInfo
from vlm.metrics.base import MeanScore, references


class ExactMatch(MeanScore):
    """The share of answers that equal one of their references, in [0, 1].

    Case, blanks around the answer and periods at its end do not count: what LLaVA-1.5 does to its answers before GQA's
    official `eval.py` compares them (scripts/convert_gqa_for_eval.py).
    """

    name = "exact_match"

    def score(self, prediction: str, sample: SampleInfo) -> float:
        return float(_plain(prediction) in map(_plain, references(sample)))


class QwenGQA(ExactMatch):
    """GQA's answers as Qwen-VL's `evaluate_vqa.py` cuts them before they are compared: the first phrase, without what
    stands before its noun. Published figures of Qwen-VL are counted so.
    """

    def score(self, prediction: str, sample: SampleInfo) -> float:
        text = re.split(r"[.,!]", prediction.strip(), maxsplit=1)[0].lower()
        for word in ("is ", "are ", "a ", "an ", "the "):
            if word in text:
                text = text.split(word)[1]
        return super().score(text.split(" of")[0], sample)


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()
