"""Benchmarks in their own file layouts, with the prompts of LLaVA-1.5 (paper, table 8; scripts/v1_5/eval) where it has
been asked them."""

from vlm.data.benchmarks.choice import MMBench, QBench, ScienceQAPictures, SeedBench
from vlm.data.benchmarks.expert import MMMU, MathVista
from vlm.data.benchmarks.llava import LlavaQuestions, LlavaScienceQA, MMVet
from vlm.data.benchmarks.questions import GQA, TDIUC, OCRBench, TextVQA, VizWiz, VQAv2
from vlm.data.benchmarks.yes_no import HallusionBench, MmeFolder, Pope

__all__ = [
    "GQA",
    "MMMU",
    "TDIUC",
    "HallusionBench",
    "LlavaQuestions",
    "LlavaScienceQA",
    "MMBench",
    "MMVet",
    "MathVista",
    "MmeFolder",
    "OCRBench",
    "Pope",
    "QBench",
    "ScienceQAPictures",
    "SeedBench",
    "TextVQA",
    "VQAv2",
    "VizWiz",
]
