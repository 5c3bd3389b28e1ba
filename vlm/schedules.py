"""The learning rate over a stage."""

import math
from dataclasses import dataclass
from typing import Literal

from vlm.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Learning-rate factor over optimizer steps.

    Attributes:
        kind: what follows the warm-up: `cosine` to `final`, `linear` to `final`, or `constant`. Or one rate for each
            epoch: `cosine_per_epoch` to `final` (BLIP's fine-tuning, LAVIS), `staircase`, times `decay` with each
            epoch and not below `final` (BLIP's pretraining); their warm-up ends with the first epoch at the latest.
        warmup: linear warm-up from `start`: a share of all steps when below 1, else a number of steps.
        start: factor at step 0 of a warm-up.
        final: factor at the last step.
        decay: factor between two epochs of a `staircase`.
        from_start: the way down of `cosine` and `linear` is counted from step 0 and the warm-up lies over its beginning
            (MiniGPT-4), not from the end of the warm-up.
        total_steps: length when it is not the trainer's own (a phase of a longer published run).
    """

    kind: Literal["cosine", "linear", "constant", "cosine_per_epoch", "staircase"] = "cosine"
    warmup: float = 0.0
    start: float = 0.0
    final: float = 0.0
    decay: float | None = None
    from_start: bool = False
    total_steps: int | None = None

    def __post_init__(self) -> None:
        if (self.kind == "staircase") != (self.decay is not None):
            raise UserError(f"stage.schedule.decay belongs to kind: staircase, which needs it; found kind: {self.kind}")
        if self.from_start and self.kind not in ("cosine", "linear"):
            raise UserError(f"stage.schedule.from_start is for kind: cosine or linear, not {self.kind}; remove it")

    @property
    def is_per_epoch(self) -> bool:
        """Whether the factor is the same through an epoch, but for the warm-up."""
        return self.kind in ("cosine_per_epoch", "staircase")

    def factor(self, step: int, total: int, *, epoch: int = 0, epochs: int | None = None) -> float:
        """The factor for one update.

        Args:
            step: finished updates, out of `total`.
            epoch: finished epochs, out of `epochs`; only looked at where `is_per_epoch`.

        Raises:
            UserError: `cosine_per_epoch` in a run without a number of epochs.
        """
        warmup = math.ceil(self.warmup * total) if self.warmup < 1 else int(self.warmup)
        if step < warmup and not (self.is_per_epoch and epoch):
            return self.start + (1 - self.start) * step / warmup
        if self.kind == "staircase":
            assert self.decay is not None
            return max(self.final, self.decay**epoch)
        if self.kind == "cosine_per_epoch":
            if epochs is None or epochs < 1:
                raise UserError("stage.schedule.kind: cosine_per_epoch counts epochs; set trainer.max_epochs")
            progress = epoch / epochs
        else:
            passed = 0 if self.from_start else warmup
            progress = min(1.0, (step - passed) / max(1, total - passed))
        if self.kind == "linear":
            return 1 - (1 - self.final) * progress
        if self.kind == "constant":
            return 1.0
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
