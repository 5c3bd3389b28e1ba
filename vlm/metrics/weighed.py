"""Metrics of how likely the choices of a question are, not of the likeliest alone (`AnswerMetric.weighs`)."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from vlm.batch import SampleInfo
from vlm.metrics.base import CorpusMetric, MeanScore, references, sample_error


class MeanReciprocalRank(MeanScore):
    """The mean of 1 / rank of the right one among the choices, in [0, 1]: Visual Dialog (Das et al., 2017)."""

    name = "mrr"
    weighs = True

    def score(self, prediction: Any, sample: SampleInfo) -> float:
        losses, right = prediction.losses, _place(sample)
        before = (losses < losses[right]).sum() + (losses[:right] == losses[right]).sum()  # of equals the first
        return 1.0 / (1 + int(before))


class AreaUnderCurve(CorpusMetric):
    """The area under the ROC curve of questions with two choices, in [0, 1]: Hateful Memes (Kiela et al., 2020).

    How often a sample of the second choice is told to be likelier so than one of the first; ties count half. nan where
    all samples are of one choice.
    """

    name = "auroc"
    weighs = True

    def record(self, prediction: Any, sample: SampleInfo) -> Any:
        right = _place(sample)
        if len(sample.choices) != 2:
            raise sample_error(
                sample, f"has {len(sample.choices)} 'choices'; this metric compares two, so leave it out"
            )
        first, second = prediction.losses.tolist()
        return [first - second, right]

    def compute(self) -> Tensor:
        """float32[]."""
        rows = list(self.records())
        labels = torch.tensor([label for _, label in rows], dtype=torch.int64)
        if len(labels.unique()) < 2:
            return torch.tensor(float("nan"), device=self.device)
        margins = torch.tensor([margin for margin, _ in rows], dtype=torch.float64)
        ranks = margins.unique(return_inverse=True)[1].double()  # exact, where a sigmoid would make ties
        return binary_auroc(ranks / ranks.max().clamp(min=1), labels).float().to(self.device)


def _place(sample: SampleInfo) -> int:
    """Which of the choices is the right one: the first reference."""
    right = references(sample)[0]
    if right not in sample.choices:
        raise sample_error(sample, f"its answer {right!r} is none of its {len(sample.choices)} 'choices'; correct it")
    return sample.choices.index(right)
