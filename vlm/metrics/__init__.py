"""Metrics of generated answers, as published. All are updated alike: `metric.update(answers, batch.samples)`."""

from vlm.metrics.agents import ActionMatching, ElementAccuracy, StepSuccess
from vlm.metrics.anls import ANLS
from vlm.metrics.answers import Answers
from vlm.metrics.base import AnswerMetric
from vlm.metrics.bleu import BLEU
from vlm.metrics.choice import MultipleChoice
from vlm.metrics.cider import CIDErD
from vlm.metrics.circular import CircularAccuracy
from vlm.metrics.exact import ExactMatch, QwenGQA
from vlm.metrics.grounding import GroundingAccuracy
from vlm.metrics.hallusion import HallusionBench
from vlm.metrics.mme import MME
from vlm.metrics.mmmu import MMMUAccuracy
from vlm.metrics.ocr_bench import OCRBench
from vlm.metrics.pope import POPE
from vlm.metrics.relaxed import RelaxedAccuracy
from vlm.metrics.tdiuc import TDIUCAccuracy
from vlm.metrics.vqa import IVQAAccuracy, TextVQAAccuracy, VQAAccuracy
from vlm.metrics.weighed import AreaUnderCurve, MeanReciprocalRank

__all__ = [
    "ANLS",
    "BLEU",
    "MME",
    "POPE",
    "ActionMatching",
    "AnswerMetric",
    "Answers",
    "AreaUnderCurve",
    "CIDErD",
    "CircularAccuracy",
    "ElementAccuracy",
    "ExactMatch",
    "GroundingAccuracy",
    "HallusionBench",
    "IVQAAccuracy",
    "MMMUAccuracy",
    "MeanReciprocalRank",
    "MultipleChoice",
    "OCRBench",
    "QwenGQA",
    "RelaxedAccuracy",
    "StepSuccess",
    "TDIUCAccuracy",
    "TextVQAAccuracy",
    "VQAAccuracy",
]
