"""Keeping the loader's position and Lightning's own counters of micro-batches in step.

Lightning counts the micro-batches of the epoch and never looks at the loader's position again. Left alone, a run
resumed under another `accumulate_grad_batches`, or from the middle of an accumulation window, would take its optimizer
steps at the wrong packs, and an epoch with another number of steps would be cut to the length of the first one.
"""

from collections.abc import Sequence

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


class TrainerProgress:
    """The training loop of a Lightning trainer, as `vlm.data.loading.loader.LoopPosition`."""

    def __init__(self, trainer: L.Trainer) -> None:
        loop = trainer.fit_loop
        # such as `trainer.estimated_stepping_batches` in a hook: the loader would start at the epoch's first step
        assert not trainer.ckpt_path or loop.is_resuming or loop.epoch_loop.batch_progress.total.ready, (
            "the training loader is made before the trainer has restored its position"
        )
        self.trainer = trainer

    def trained(self) -> int:
        # `processed` counts finished training steps: a pack whose step raised has been handed out but not trained on
        return _current(self.trainer.fit_loop.epoch_loop).processed

    def begin_epoch(self, packs: int) -> None:
        loop = self.trainer.fit_loop
        if loop._data_fetcher is not None:
            loop.max_batches = loop._data_fetcher.length = self._limited(packs)
        # Resumed from the last step of an epoch, Lightning begins the next one without counting it as begun, and would
        # take a checkpoint written in it for one between two epochs
        for epochs in (loop.epoch_progress.total, loop.epoch_progress.current):
            assert isinstance(epochs, _ProcessedTracker)
            if epochs.ready == epochs.processed:
                epochs.ready = epochs.started = epochs.processed + 1

    def resume(self, packs: int, *, total: int, mid_step: bool) -> None:
        loop = self.trainer.fit_loop
        assert loop._combined_loader is not None
        loop._combined_loader.limits = [self._limited(total)]
        progress = loop.epoch_loop.batch_progress
        current = _current(loop.epoch_loop)
        # Lightning tells a checkpoint written in `on_train_batch_end` by `completed` being one behind
        in_batch_end = current.completed == current.processed - 1
        whole = not mid_step and current.ready == current.processed
        # at the start of an epoch Lightning's counter of the epoch still shows the one before
        of_this_epoch = current.completed if packs or mid_step else 0
        earlier = progress.total.completed - of_this_epoch
        assert isinstance(progress.total, _ProcessedTracker)
        for tracker, count in ((current, packs), (progress.total, earlier + packs)):
            tracker.ready = tracker.started = tracker.processed = count
            tracker.completed = count - (in_batch_end and whole)
        if packs == 0:  # nothing of the epoch is done: it starts like any other
            loop.epoch_loop.restarting = False
        progress.is_last_batch = packs >= self._limited(total)

    def _limited(self, packs: int) -> int:
        limit = self.trainer.limit_train_batches
        return min(packs, limit) if isinstance(limit, int) else int(packs * limit)


def ends_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a micro-batch of the epoch is the last one of its optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def is_finished(trainer: L.Trainer) -> bool:
    """Whether the last optimizer step of the training is done; False for one that was stopped before it."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    loop = trainer.fit_loop
    last_epoch = trainer.max_epochs not in (None, -1) and loop.epoch_progress.current.ready >= trainer.max_epochs
    return last_epoch and _current(loop.epoch_loop).processed >= loop.max_batches


def begin_validation_again(trainer: L.Trainer) -> None:
    """Sets Lightning's counters as a state has to have them whose resume begins with the validation of its step."""
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    for tracker in (progress.total, progress.current):
        assert isinstance(tracker, _ProcessedTracker)
        tracker.ready = tracker.started = 1  # begun, and nothing of it is done
        tracker.processed = tracker.completed = 0
    progress.is_last_batch = False


def is_ended_early(trainer: L.Trainer) -> bool:
    """Whether something decided that the training is done, as EarlyStopping does; False where its time was over."""
    # of clocks the first rank's counts
    return trainer.strategy.broadcast(trainer.should_stop and not is_time_over(timers_of(trainer)))


def timers_of(trainer: L.Trainer) -> list[Timer]:
    """Those that keep `trainer.max_time`."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]


def is_time_over(timers: Sequence[Timer]) -> bool:
    """By this process's clock."""
    return any(left is not None and left <= 0 for left in (timer.time_remaining() for timer in timers))


def cuts(trainer: L.Trainer) -> list[str]:
    """Settings by which a training sees less than its data and epochs say."""
    found = []
    loader, packs = trainer.train_dataloader, int(trainer.num_training_batches)
    for name in ("overfit_batches", "limit_train_batches"):
        value = getattr(trainer, name)
        if value and loader is not None and packs < len(loader):
            found.append(f"trainer.{name}: {value}, {packs:,} of {len(loader):,} micro-batches of an epoch")
            break
    epochs, steps = trainer.max_epochs, -(-packs // trainer.accumulate_grad_batches)
    if epochs not in (None, -1) and 0 <= trainer.max_steps < steps * epochs:
        found.append(f"trainer.max_steps: {trainer.max_steps:,} of {steps * epochs:,} steps")
    return found


def why_stopped(trainer: L.Trainer) -> str:
    """What `is_ended_early` saw."""
    stoppers = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]
    found = next((stopper for stopper in stoppers if stopper.stopping_reason.value), None)
    who = f"EarlyStopping on {found.monitor}" if found is not None else "a callback"
    return f"{who} stopped it after step {trainer.global_step:,}"


def _current(loop: _TrainingEpochLoop) -> _ProcessedTracker:
    current = loop.batch_progress.current
    assert isinstance(current, _ProcessedTracker)
    return current
