"""Accuracy by kinds of questions."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from vlm.batch import SampleInfo
from vlm.metrics.base import CorpusMetric, sample_error
from vlm.metrics.exact import ExactMatch


class TDIUCAccuracy(CorpusMetric):
    """How TDIUC is reported, all in [0, 1]: over all questions, and two means over its twelve kinds of questions.

    Kafle and Kanan, "An Analysis of Visual Question Answering Algorithms", 2017. The harmonic mean is 0 as soon as one
    kind is never answered right. The kind is `SampleInfo.group`; answers are compared as `ExactMatch` compares them.
    """

    name = "accuracy"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.single = ExactMatch()

    def record(self, prediction: str, sample: SampleInfo) -> Any:
        if sample.group is None:
            raise sample_error(sample, "has no 'group', which names the kind of the question")
        return [sample.group, self.single.score(prediction, sample)]

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """float32[] each."""
        kinds: dict[str, list[float]] = defaultdict(list)
        for kind, score in self.records():
            kinds[kind].append(score)
        scores = [score for kind in kinds.values() for score in kind]
        means = [sum(kind) / len(kind) for kind in kinds.values()]
        found = dict.fromkeys(("accuracy", "mean_per_type", "harmonic_per_type"), float("nan"))
        if scores:
            found["accuracy"] = sum(scores) / len(scores)
            found["mean_per_type"] = sum(means) / len(means)
            found["harmonic_per_type"] = len(means) / sum(1 / mean for mean in means) if all(means) else 0.0
        return {name: torch.tensor(value, device=self.device) for name, value in found.items()}
