"""Checkpoints to resume from, and the best one to look at."""

import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.progress import warn
from callbacks.stop_signals import StopSignals
from vlm.checkpoints.files.atomic import remove
from vlm.checkpoints.resume.best import Mode, is_better, mode_of, write_score
from vlm.checkpoints.resume.pointer import BEST, LAST
from vlm.data.loading.trainer_progress import is_finished
from vlm.errors import UserError
from vlm.recipes.run_folder import RunFolder


class ResumeCheckpoint(Checkpoint):
    """Keeps the newest states of a running training in the run folder's `checkpoints`.

    A state is saved after every n-th optimizer step, after the last one (so that a failure while the artefact is
    written costs no training), and when the trainer is about to stop: `max_time` is over, EarlyStopping says so, or a
    process got SIGTERM or Ctrl-C. An older state is removed once a newer one is complete, the one this process resumed
    from as well, and the last one when the whole stage has its artefact.

    With `monitor`, the weights after the validation with the best value so far are kept besides, without the optimizer.

    Lightning's ModelCheckpoint is made for choosing the best of many: it keeps every checkpoint a run was resumed from,
    forgets those it made when the interval changes, and can save between two epochs, where Lightning has already
    counted an epoch that was stopped halfway as finished.

    Args:
        every_n_train_steps: optimizer steps between two states.
        keep: how many of the newest stay.
        monitor: logged value of the validation, such as val/loss, whose best state is kept as `RUN@best`.
        mode: min or max, whichever of it is best; by default its name says.
    """

    def __init__(
        self, every_n_train_steps: int = 500, keep: int = 1, monitor: str | None = None, mode: Mode | None = None
    ) -> None:
        for name, value in (("every_n_train_steps", every_n_train_steps), ("keep", keep)):
            if value < 1:
                raise UserError(f"checkpoint.{name} must be at least 1, found {value}")
        self.every_n_train_steps = every_n_train_steps
        self.keep = keep
        self.monitor = monitor
        self.mode: Mode = "min" if monitor is None else mode or mode_of(monitor)
        self._signals = StopSignals()
        self._saved_step = 0
        self._due = False
        self._unflushed = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # `max_time` is how long one start may run; restored, the timer would stop every further start at once
        checkpoint["callbacks"].pop(Timer.__qualname__, None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step
        self._signals.listen(trainer)
        folder = RunFolder(trainer.default_root_dir).checkpoints / BEST
        if trainer.global_step == 0 and trainer.is_global_zero and self._saves(trainer):
            remove(folder)  # of a start that was cut off before its first checkpoint

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
        if step != self._saved_step and self._saves(trainer):
            if trainer.should_stop or terminated:
                self._save(trainer, step)
            elif whole and (step % self.every_n_train_steps == 0 or is_finished(trainer)):
                # after the validation that comes now: a resume from before it would go on behind it
                self._due = _validates_next(trainer)
                if not self._due:
                    self._save(trainer, step)
        if terminated:
            raise SIGTERMException(self._signals.received or signal.SIGTERM)

    def _saves(self, trainer: Trainer) -> bool:
        return not trainer.fast_dev_run  # type: ignore[attr-defined]

    def _is_terminated(self, trainer: Trainer, *, whole: bool) -> bool:
        """Whether any rank got a signal: they learn of it at different micro-batches and have to stop at the same one.

        Several ranks ask each other only where they wait for each other anyway, to log: a question is a GPU sync.
        """
        if trainer.world_size == 1:
            return self._signals.received is not None
        asks = whole and trainer.global_step % max(1, trainer.log_every_n_steps) == 0  # type: ignore[attr-defined]
        return asks and trainer.strategy.reduce_boolean_decision(self._signals.received is not None, all=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or not self._saves(trainer):
            return
        self._keep_best(trainer)
        self._save_at_end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_at_end(trainer)

    def _save_at_end(self, trainer: Trainer) -> None:
        """What EarlyStopping ends, at the validation or the epoch where it does."""
        ends = trainer.should_stop and trainer.global_step != self._saved_step and self._saves(trainer)
        if self._due or ends:
            self._due = False
            self._save(trainer, trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not self._saves(trainer):
            return
        folder = RunFolder(trainer.default_root_dir)
        if self.monitor is not None and not (folder.checkpoints / BEST).is_dir():
            warn(f"checkpoint.monitor: no validation has run, so no state is known as the best by {self.monitor}")
        if folder.finished and folder.shortened is None:
            for path in (folder.checkpoints / LAST, *folder.checkpoints.glob("step=*.ckpt")):
                remove(path)

    def _keep_best(self, trainer: Trainer) -> None:
        if self.monitor is None:
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise UserError(f"checkpoint.monitor: {self.monitor} is not logged; the validation logs {known}")
        folder = RunFolder(trainer.default_root_dir).checkpoints / BEST
        better = trainer.is_global_zero and is_better(float(value), self.monitor, self.mode, folder)
        if not trainer.strategy.broadcast(better):
            return
        step = trainer.global_step
        path = folder / f"step={step}.ckpt"
        trainer.save_checkpoint(path, weights_only=True)
        if trainer.is_global_zero:
            write_score(folder, monitor=self.monitor, value=float(value), step=step)
            for old in folder.glob("step=*.ckpt"):
                if old != path:
                    remove(old)

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
