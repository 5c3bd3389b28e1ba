"""`trainer.max_time`, asked for like all else that ends a training."""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from vlm.data.loading.trainer_progress import is_time_over, timers_of


class TimeLimit:
    """Whether the time of this start is over, by the clock of the first rank.

    Lightning's Timer sends its answer to the others in every micro-batch, and all of them wait for it.
    """

    def __init__(self) -> None:
        self._timers: list[Timer] = []  # of the first rank

    def begin(self, trainer: Trainer) -> None:
        """From now on the timer counts, and tells nobody."""
        timers = timers_of(trainer)
        for timer in timers:
            timer._check_time_remaining = lambda trainer: None  # type: ignore[method-assign]
        self._timers = timers if trainer.is_global_zero else []

    @property
    def is_over(self) -> bool:
        return is_time_over(self._timers)
