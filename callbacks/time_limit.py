"""`trainer.max_time`, asked for like all else that ends a training."""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer


class TimeLimit:
    """Whether the time of this start is over, by the clock of the first rank.

    Lightning's Timer sends its answer to the others in every micro-batch, and all of them wait for it.
    """

    def __init__(self) -> None:
        self._timer: Timer | None = None

    def begin(self, trainer: Trainer) -> None:
        """From now on the timer counts, and tells nobody."""
        timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
        for timer in timers:
            timer._check_time_remaining = lambda trainer: None  # type: ignore[method-assign]
        self._timer = timers[0] if timers and trainer.is_global_zero else None

    @property
    def is_over(self) -> bool:
        left = self._timer.time_remaining() if self._timer is not None else None
        return left is not None and left <= 0
