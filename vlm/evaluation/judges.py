"""Who judges a system: asks it about packs, hears what it says, and comes to figures.

A judge of answers has them written or chosen and hands them to metrics; a judge of retrieval compares embeddings
(`vlm.evaluation.retrieval`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vlm.batch import Batch, SampleInfo
from vlm.errors import UserError
from vlm.language import Decoding
from vlm.language.choosing import WeighedChoices
from vlm.metrics import AnswerMetric, Answers


class Judge(ABC):
    """Judges the samples of one source or task over an epoch of validation or test.

    Attributes:
        wants_answers: samples are encoded up to where the answer has to begin; else whole, as in training.
    """

    wants_answers: ClassVar[bool]

    def check(self) -> None:  # noqa: B027  (most need nothing)
        """Before anything is built.

        Raises:
            UserError: something that it needs is not installed.
        """

    @abstractmethod
    def start(self, device: torch.device) -> None:
        """Forgets what was heard."""

    @abstractmethod
    def ask(self, module: Any, batch: Batch) -> Any:
        """What the system says to a pack; runs inside of its step, where a sharded network has its parameters."""

    @abstractmethod
    def hear(self, said: Any, samples: Sequence[SampleInfo]) -> None:
        """Takes in what was said to a pack; fillers (see `SampleInfo`) do not count."""

    @abstractmethod
    def finish(self, module: Any) -> dict[str, float]:
        """The figures, by name; every rank calls it. It may ask once more, by the public methods of the system."""

    @abstractmethod
    def records(self) -> list[dict[str, Any]]:
        """What was said to each sample, of all ranks, for the record; every rank calls it."""


class AnswerJudge(Judge):
    """Has answers written, or one of several options chosen, and hands them to metrics.

    Args:
        metrics: at least one.
        decoding: how the answers are searched for.

    Raises:
        UserError: a metric weighs choices, and answers are written.
    """

    wants_answers = True

    def __init__(self, metrics: Sequence[AnswerMetric], decoding: Decoding = Decoding()) -> None:  # noqa: B008  (frozen)
        self.metrics, self.decoding = list(metrics), decoding
        self.answers = Answers()
        self.weighs = any(metric.weighs for metric in metrics)
        if self.weighs and not decoding.chooses:
            names = ", ".join(metric.name for metric in metrics if metric.weighs)
            raise UserError(f"evaluation.decoding: {names} weighs choices; set options or candidates")

    def check(self) -> None:
        for metric in self.metrics:
            metric.check()

    def start(self, device: torch.device) -> None:
        for metric in (*self.metrics, self.answers):
            metric.reset()
            metric.to(device)

    def ask(self, module: Any, batch: Batch) -> list[str] | list[WeighedChoices]:
        said: list[str] | list[WeighedChoices]
        said = module.weigh(batch, self.decoding) if self.weighs else module.answers(batch, self.decoding)
        return said

    def hear(self, said: list[str] | list[WeighedChoices], samples: Sequence[SampleInfo]) -> None:
        answers = [one if isinstance(one, str) else one.likeliest for one in said]
        for metric in (*self.metrics, self.answers):
            metric.update(said if metric.weighs else answers, samples)

    def finish(self, module: Any) -> dict[str, float]:
        return {name: value for metric in self.metrics for name, value in metric.values().items()}

    def records(self) -> list[dict[str, Any]]:
        return self.answers.over_ranks()


@dataclass(frozen=True)
class Judges:
    """Attributes:

    by_name: the judge of each source or task.
    """

    by_name: Mapping[str, Judge] = field(default_factory=dict)

    def of(self, *, source: str, task: str | None) -> str | None:
        """Name of the judge of a sample, that of its source before that of its task; None if there is none."""
        return next((name for name in (source, task) if name in self.by_name), None)
