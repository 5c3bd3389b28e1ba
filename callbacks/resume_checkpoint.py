"""Checkpoints to resume from, and the best one to look at."""

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from callbacks.agreement import Agreement
from callbacks.fsdp_strategy import FSDP2Strategy
from callbacks.progress import warn
from callbacks.stop_signals import StopSignals
from callbacks.time_limit import TimeLimit
from vlm.checkpoints.files.atomic import remove
from vlm.checkpoints.resume.background import BackgroundWriter, copy_to_host
from vlm.checkpoints.resume.best import Mode, is_better, mode_of, write_score
from vlm.checkpoints.resume.pointer import BEST, LAST
from vlm.data.loading.trainer_progress import begin_validation_again, ends_step, is_finished
from vlm.errors import UserError
from vlm.recipes.run_folder import RunFolder


class ResumeCheckpoint(Checkpoint):
    """Keeps the newest states of a running training in the run folder's `checkpoints`.

    A state is saved after every n-th optimizer step and every few minutes, after the last step (so that a failure while
    the artefact is written costs no training), and when the trainer is about to stop: `max_time` is over, EarlyStopping
    says so, or any process got SIGTERM or Ctrl-C. A validation that a signal cuts off begins again. An older state is
    removed once a newer one is complete, the one this process resumed from as well, and the last one when the whole
    stage has its artefact.

    With `monitor`, the weights after the validation with the best value so far are kept besides, without the optimizer.

    Lightning's ModelCheckpoint is made for choosing the best of many: it keeps every checkpoint a run was resumed from,
    forgets those it made when the interval changes, and can save between two epochs, where Lightning has already
    counted an epoch that was stopped halfway as finished.

    Args:
        every_n_train_steps: optimizer steps between two states; None: only minutes count.
        every_n_minutes: time between two states, by the clock of the first rank; saved after the step that reaches it.
        background: write on a thread while the training goes on, from a copy in the host's memory (12 bytes for each
            trained parameter that a rank holds, with AdamW). An error ends the run at the next step. A run that stops
            waits for what is being written, and writes its last state before it ends.
        keep: how many of the newest stay.
        monitor: logged value of the validation, such as val/loss, whose best state is kept as `RUN@best`.
        mode: min or max, whichever of it is best; by default its name says.
    """

    def __init__(
        self,
        every_n_train_steps: int | None = 500,
        every_n_minutes: float | None = None,
        background: bool = False,
        keep: int = 1,
        monitor: str | None = None,
        mode: Mode | None = None,
    ) -> None:
        for name, value in (("every_n_train_steps", every_n_train_steps), ("keep", keep)):
            if value is not None and value < 1:
                raise UserError(f"checkpoint.{name} must be at least 1, found {value}")
        if every_n_minutes is not None and every_n_minutes <= 0:
            raise UserError(f"checkpoint.every_n_minutes must be more than 0, found {every_n_minutes:g}")
        if every_n_train_steps is None and every_n_minutes is None:
            raise UserError("checkpoint: set every_n_train_steps, every_n_minutes or both; neither says when to save")
        self.every_n_train_steps = every_n_train_steps
        self.every_n_minutes = every_n_minutes
        self.background = background
        self.keep = keep
        self.monitor = monitor
        self.mode: Mode = "min" if monitor is None else mode or mode_of(monitor)
        self._signals = StopSignals()
        self._time = TimeLimit()
        self._agreement = Agreement(self._wishes)
        self._writer = BackgroundWriter()
        self._clock: float | None = None  # when it was last saved; on the first rank
        self._saved_step = 0
        self._due = False
        self._unflushed = False
        self._is_cut = False  # in a validation

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # `max_time` is how long one start may run; restored, the timer would stop every further start at once
        checkpoint["callbacks"].pop(Timer.__qualname__, None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step
        self._clock = time.monotonic() if trainer.is_global_zero else None
        self._signals.listen(trainer)
        self._time.begin(trainer)
        self._agreement.begin(trainer)
        _own_moments(trainer)
        folder = RunFolder(trainer.default_root_dir).checkpoints / BEST
        if trainer.global_step == 0 and trainer.is_global_zero and self._saves(trainer):
            remove(folder)  # of a start that was cut off before its first checkpoint

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._unflushed:  # what the step that was saved logged, which happens after its hooks
            self._flush(trainer)
            self._unflushed = False
        if ends_step(trainer, batch_idx):
            self._agreement.ask()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, whole = trainer.global_step, ends_step(trainer, batch_idx)
        # one process need not wait for the end of the step to stop
        asked = whole or trainer.world_size == 1
        stop, minutes_over, failed, time_over = self._agreement.answer() if asked else (0, 0, 0, 0)
        trainer.should_stop = trainer.should_stop or bool(time_over)
        if failed:
            self._writer.wait()
            raise UserError("another rank could not write the checkpoint before this one; its own message says why")
        if step != self._saved_step and self._saves(trainer):
            if trainer.should_stop or stop:
                self._save(trainer, step, ends=True)
            elif whole and (minutes_over or self._is_due_by_step(step) or is_finished(trainer)):
                # after the validation that comes now: a resume from before it would go on behind it
                self._due = _validates_next(trainer)
                if not self._due:
                    self._save(trainer, step)
        if stop:
            self._writer.wait()  # nothing new may have been there to save
            raise SIGTERMException(signal.Signals(stop))

    def _wishes(self) -> tuple[int, int, int, int]:
        """What this rank asks for: the signal that it got, a save because of the time, an end because of an error, an
        end because of the time."""
        minutes_over = False
        if self._clock is not None and self.every_n_minutes is not None:
            minutes_over = time.monotonic() - self._clock >= 60 * self.every_n_minutes
        return self._signals.received or 0, int(minutes_over), int(self._writer.has_failed), int(self._time.is_over)

    def _is_due_by_step(self, step: int) -> bool:
        return self.every_n_train_steps is not None and step % self.every_n_train_steps == 0

    def _saves(self, trainer: Trainer) -> bool:
        return not trainer.fast_dev_run  # type: ignore[attr-defined]

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if _may_be_cut(trainer):
            self._agreement.ask()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if _may_be_cut(trainer) and (stop := self._agreement.answer()[0]):
            self._is_cut = True
            raise SIGTERMException(signal.Signals(stop))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _is_training(trainer) or not self._saves(trainer):
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
            self._save(trainer, trainer.global_step, ends=ends)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._writer.wait()  # before the artefact, behind which the states are removed

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        with suppress(Exception):  # there is one already, which says why the run ends
            self._writer.wait()
        # not where the validation was cut off: there it may run with other weights (`callbacks.EMA`), put back by now
        if self._is_cut and trainer.global_step != self._saved_step and self._saves(trainer):
            self._is_cut = False
            begin_validation_again(trainer)
            self._save(trainer, trainer.global_step, ends=True)

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
        self._writer.wait()
        step = trainer.global_step
        path = folder / f"step={step}.ckpt"
        trainer.save_checkpoint(path, weights_only=True)
        if trainer.is_global_zero:
            write_score(folder, monitor=self.monitor, value=float(value), step=step)
            for old in folder.glob("step=*.ckpt"):
                if old != path:
                    remove(old)

    def _save(self, trainer: Trainer, step: int, *, ends: bool = False) -> None:
        self._flush(trainer)
        path = RunFolder(trainer.default_root_dir).checkpoints / f"step={step}.ckpt"
        self._writer.wait()
        if self.background and not ends and not is_finished(trainer):
            self._writer.start(partial(self._write, trainer, path, _prepare_save(trainer, path)))
        else:
            self._write(trainer, path, partial(trainer.save_checkpoint, path))
        self._saved_step, self._unflushed = step, True
        self._clock = None if self._clock is None else time.monotonic()

    def _write(self, trainer: Trainer, path: Path, write: Callable[[], None]) -> None:
        write()
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


def _may_be_cut(trainer: Trainer) -> bool:
    """Whether a validation may end before its last batch: Lightning goes back to none behind the last `max_steps`."""
    return _is_training(trainer) and not 0 <= trainer.max_steps <= trainer.global_step


def _is_training(trainer: Trainer) -> bool:
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def _validates_next(trainer: Trainer) -> bool:
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher) and not loop.epoch_loop.val_loop.skip


def _prepare_save(trainer: Trainer, path: Path) -> Callable[[], None]:
    """Copies the state to the host; what is returned writes it, as `trainer.save_checkpoint` does, on any thread."""
    checkpoint, strategy = trainer._checkpoint_connector.dump_checkpoint(), trainer.strategy
    if isinstance(strategy, FSDP2Strategy):
        return strategy.prepare_save(checkpoint, path)
    if not trainer.is_global_zero:
        return lambda: None
    return partial(strategy.checkpoint_io.save_checkpoint, copy_to_host(checkpoint), path)


def _own_moments(trainer: Trainer) -> None:
    """On the CPU they would lie in the file that they were read from, which takes its place on the disk until then."""
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            on_cpu = {key: v for key, v in state.items() if isinstance(v, Tensor) and v.device.type == "cpu"}
            state.update({key: value.clone() for key, value in on_cpu.items()})
