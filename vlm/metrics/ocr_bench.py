"""OCRBench."""

from vlm.batch import SampleInfo
from vlm.metrics.base import MeanScore, references

_FORMULAS = "HME100k"


class OCRBench(MeanScore):
    """The share of answers that hold one of their references, in [0, 1]; the paper counts a thousand questions.

    As its `example.py`: without case, line breaks as blanks; in the handwritten formulas of HME100k case counts and
    blanks do not.
    """

    name = "ocr_bench"

    def score(self, prediction: str, sample: SampleInfo) -> float:
        plain = _formula if sample.group == _FORMULAS else _text
        return float(any(plain(text) in plain(prediction) for text in references(sample)))


def _text(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")
