"""Which steps are logged."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from vlm.module import VisionLanguageModule

_POINTS, _SPARSEST = 20, 50


class LogCadence(Callback):
    """Logs a short stage often enough to show how it goes, and the last step of every stage.

    Callbacks, loggers and Lightning itself go by `trainer.log_every_n_steps` (`is_logged`). At the start of a stage it
    becomes a twentieth of its steps, at most 50; at the last step it is 1.

    Args:
        adapt: false keeps the trainer's own number, but for the last step; 0 logs nothing.
    """

    def __init__(self, adapt: bool = True) -> None:
        self.adapt = adapt

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, VisionLanguageModule)
        if self.adapt:
            _set(trainer, min(_SPARSEST, max(1, pl_module.total_steps() // _POINTS)))
        self._usual = _steps(trainer)
        self._unlogged = -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._usual and _is_last(trainer):
            _set(trainer, 1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not is_logged(trainer, trainer.global_step):
            self._unlogged = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation_start(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _set(trainer, self._usual)
        if not self._usual or self._unlogged != trainer.global_step:
            return
        # what came after the step has ended the stage early: nobody knew at the step that it was the last
        losses = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        for logger in trainer.loggers:
            logger.log_metrics(losses, step=trainer.global_step - 1)  # where Lightning writes the step's losses


def is_logged(trainer: Trainer, step: int) -> bool:
    """Whether the optimizer step that makes `global_step` this number is one of those that are logged."""
    every = _steps(trainer)
    return bool(every) and (step % every == 0 or trainer.should_stop)


def _is_last(trainer: Trainer) -> bool:
    """Whether a micro-batch that begins belongs to the last optimizer step, or is the last of all."""
    if trainer.max_steps != -1 and trainer.global_step + 1 >= trainer.max_steps:
        return True
    is_last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
    return is_last_epoch and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def _steps(trainer: Trainer) -> int:
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]


def _set(trainer: Trainer, steps: int) -> None:
    trainer.log_every_n_steps = steps  # type: ignore[attr-defined]
