"""Which metrics judge which samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlm.language import Decoding
from vlm.metrics import AnswerMetric


@dataclass(frozen=True)
class Judges:
    """Attributes:

    metrics: those of each source or task, by its name.
    decoding: how the answers are searched for.
    """

    metrics: Mapping[str, Sequence[AnswerMetric]] = field(default_factory=dict)
    decoding: Decoding = field(default_factory=Decoding)

    def of(self, *, source: str, task: str | None) -> str | None:
        """Name of the metrics for a sample, those of its source before those of its task; None if there are none."""
        return next((name for name in (source, task) if name in self.metrics), None)
