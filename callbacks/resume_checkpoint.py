"""Checkpoints to resume from."""

import signal
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from vlm.data.loading.trainer_progress import is_finished
from vlm.errors import UserError
from vlm.recipes.run_folder import RunFolder


class ResumeCheckpoint(Checkpoint):
    """Keeps the newest states of a running training in the run folder's `checkpoints`.

    A state is saved after every n-th optimizer step, after the last one (so that a failure while the artefact is
    written costs no training), and when the trainer is about to stop: `max_time` is over, or a process got SIGTERM. An
    older state is removed once a newer one is complete, the one this process resumed from as well.

    Lightning's ModelCheckpoint is made for choosing the best of many: it keeps every checkpoint a run was resumed from,
    forgets those it made when the interval changes, and can save between two epochs, where Lightning has already
    counted an epoch that was stopped halfway as finished.

    Args:
        every_n_train_steps: optimizer steps between two states.
        keep: how many of the newest stay.
    """

    def __init__(self, every_n_train_steps: int = 500, keep: int = 1) -> None:
        for name, value in (("every_n_train_steps", every_n_train_steps), ("keep", keep)):
            if value < 1:
                raise UserError(f"checkpoint.{name} must be at least 1, found {value}")
        self.every_n_train_steps = every_n_train_steps
        self.keep = keep
        self._saved_step = 0
        self._due = False
        self._unflushed = False
        self._terminated = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # `max_time` is how long one start may run; restored, the timer would stop every further start at once
        checkpoint["callbacks"].pop(Timer.__qualname__, None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            # Lightning's own handler talks to the other ranks from wherever the signal finds it: they wait for ever.
            # After the training Lightning puts back what was there before.
            signal.signal(signal.SIGTERM, self._note_sigterm)

    def _note_sigterm(self, *_: Any) -> None:
        self._terminated = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._unflushed:  # what the step that was saved logged, which happens after its hooks
            self._flush(trainer)
            self._unflushed = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        terminated = self._is_terminated(trainer, whole=whole)
        if step != self._saved_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            if trainer.should_stop or terminated:
                self._save(trainer, step)
            elif whole and (step % self.every_n_train_steps == 0 or is_finished(trainer)):
                # after the validation that comes now: a resume from before it would go on behind it
                self._due = _validates_next(trainer)
                if not self._due:
                    self._save(trainer, step)
        if terminated:
            raise SIGTERMException

    def _is_terminated(self, trainer: Trainer, *, whole: bool) -> bool:
        """Whether any rank got SIGTERM: they learn of it at different micro-batches and have to stop at the same one.

        Several ranks ask each other only where they wait for each other anyway, to log: a question is a GPU sync.
        """
        if trainer.world_size == 1:
            return self._terminated
        asks = whole and trainer.global_step % max(1, trainer.log_every_n_steps) == 0  # type: ignore[attr-defined]
        return asks and trainer.strategy.reduce_boolean_decision(self._terminated, all=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._due:
            self._due = False
            self._save(trainer, trainer.global_step)

    def _save(self, trainer: Trainer, step: int) -> None:
        self._flush(trainer)
        path = RunFolder(trainer.default_root_dir).checkpoints / f"step={step}.ckpt"
        trainer.save_checkpoint(path)
        self._saved_step, self._unflushed = step, True
        if trainer.is_global_zero:
            for old in self._outdated(path):
                trainer.strategy.remove_checkpoint(old)

    def _flush(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:  # a resumed run does not log again what came before its checkpoint
            logger.save()

    def _outdated(self, newest: Path) -> list[Path]:
        # by age, not by step: a run may have been set back to an earlier state
        others = [path for path in newest.parent.glob("step=*.ckpt") if path != newest]
        others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        return others[self.keep - 1 :]


def _validates_next(trainer: Trainer) -> bool:
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher) and not loop.epoch_loop.val_loop.skip
