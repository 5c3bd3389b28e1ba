"""What all metrics of generated answers share: how they are updated, how they sum, how they meet across ranks."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from vlm.batch import SampleInfo
from vlm.errors import SampleError

_UNIT = 2**32
"""Scores are summed in whole multiples of 1 / 2**32: integer sums depend neither on the order of the samples nor on how
they were spread over ranks, and they exist on every device (float64 does not)."""


class AnswerMetric(Metric, ABC):
    """A metric of answers that a system wrote freely.

    All subclasses are updated alike, so that a loop can hold any of them. Fillers (see `SampleInfo`) do not count.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    name: ClassVar[str]
    """What logs and tables call the value; a metric of several values names them in what `compute` gives."""

    weighs: ClassVar[bool] = False
    """It looks at how likely each choice is, not at the answer alone."""

    def check(self) -> None:
        """Before anything is answered.

        Raises:
            UserError: something that it needs is not installed.
        """

    def update(self, predictions: Sequence[Any], samples: Sequence[SampleInfo]) -> None:
        """Adds answers.

        Args:
            predictions: what the system answered, special tokens removed; what it chose from, where it `weighs`.
            samples: one for each prediction; `answers` are the references.

        Raises:
            SampleError: the sample has no reference, or one that this metric cannot read.
        """
        assert len(predictions) == len(samples), f"{len(predictions)} predictions for {len(samples)} samples"
        for prediction, sample in zip(predictions, samples, strict=True):
            if not sample.filler:
                self._add(prediction, sample)

    @abstractmethod
    def _add(self, prediction: Any, sample: SampleInfo) -> None:
        """Adds one answer."""

    def values(self) -> dict[str, float]:
        """`compute` by name; every rank has to call it."""
        computed = self.compute()
        named = computed if isinstance(computed, dict) else {self.name: computed}
        return {name: value.item() for name, value in named.items()}


class MeanScore(AnswerMetric):
    """The mean over samples of a score in [0, 1]; nan when there were no samples."""

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @abstractmethod
    def score(self, prediction: Any, sample: SampleInfo) -> float:
        """How good one answer is, in [0, 1]."""

    def _add(self, prediction: Any, sample: SampleInfo) -> None:
        self.total += round(self.score(prediction, sample) * _UNIT)
        self.count += 1

    def compute(self) -> Tensor:
        """float32[]."""
        return ratio(self.total, self.count * _UNIT)


class CorpusMetric(AnswerMetric):
    """A metric that has to see all answers together.

    Every answer is kept as one line of JSON in a list of uint8 tensors, which torchmetrics concatenates over ranks.
    """

    lines: list[Tensor] | Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("lines", [], dist_reduce_fx="cat")

    @abstractmethod
    def record(self, prediction: Any, sample: SampleInfo) -> Any:
        """What has to be kept of one answer; anything JSON can write."""

    def sync(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.lines, list) and not self.lines:
            # torchmetrics would gather an empty float32 tensor from a rank without answers, and bytes from the others
            self.lines = [torch.zeros(0, dtype=torch.uint8, device=self.device)]
        super().sync(*args, **kwargs)

    def _add(self, prediction: Any, sample: SampleInfo) -> None:
        line = json.dumps(self.record(prediction, sample)) + "\n"
        assert isinstance(self.lines, list)
        self.lines.append(torch.frombuffer(bytearray(line, "ascii"), dtype=torch.uint8).to(self.device))

    def records(self) -> Iterator[Any]:
        """All records of all ranks."""
        parts = self.lines if isinstance(self.lines, list) else [self.lines]
        for part in [torch.cat(parts)] if parts else []:
            yield from map(json.loads, part.cpu().numpy().tobytes().decode("ascii").splitlines())


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """float32 quotient of two integer counts, rounded once; nan for an empty one."""
    whole = denominator.item()
    return torch.tensor(numerator.item() / whole if whole else float("nan"), device=numerator.device)


def references(sample: SampleInfo) -> list[str]:
    """The texts of the sample's answers, at least one."""
    if not sample.answers:
        raise sample_error(sample, "has no 'answers' to compare with; add them, or leave the metric out")
    return [text for text, _ in sample.answers]


def sample_error(sample: SampleInfo, message: str) -> SampleError:
    return SampleError(message, sample_id=sample.id, source=sample.source)
