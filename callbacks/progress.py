"""How far a run is, on a terminal and in a log file."""

import shutil
import sys
import textwrap
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tqdm import tqdm

from vlm.module import VisionLanguageModule

_FORMAT = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}, {elapsed}<{remaining}{postfix}"


class Progress(ProgressBar):
    """One bar over the steps of the stage, wherever it began; a line every `trainer.log_every_n_steps` in a file.

    Losses are read at these steps alone: asking for them every step would make the host wait for the device. They are
    those of the step before, since the module logs after its callbacks have run.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm | None = None  # of the training
        self._check: tqdm | None = None  # of a validation or test
        self._enabled = True

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        tqdm.write(sep.join(map(str, args)), **kwargs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, VisionLanguageModule)
        name = pl_module.stage.name if pl_module.stage is not None else "fit"
        self._name, self._total = name, pl_module.total_steps()
        self._start = self._told = trainer.global_step
        self._told_at = time.monotonic()
        if self._is_shown(trainer):
            self._bar = _bar(name, self._total, initial=trainer.global_step, leave=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._enabled or not trainer.is_global_zero or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        is_due = step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if self._bar is not None:
            if is_due:
                self._bar.set_postfix_str(_metrics(trainer), refresh=False)
            self._bar.update(step - self._bar.n)
        elif is_due:
            self._tell(trainer)

    def _tell(self, trainer: Trainer) -> None:
        """A line for a file: the loss, the speed since the last one, and the time that is left at it."""
        step, now = trainer.global_step, time.monotonic()
        speed = (step - self._told) / max(now - self._told_at, 1e-9)
        self._told, self._told_at = step, now
        left = tqdm.format_interval((self._total - step) / speed)
        parts = [
            f"{self._name}: step {step} of {self._total}",
            _metrics(trainer),
            f"{speed:.3g} steps/s",
            f"{left} left",
        ]
        print(", ".join(part for part in parts if part), flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(_metrics(trainer))
        self._close(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_shown(trainer):
            batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
            self._check = _bar("validation", _count(batches))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_shown(trainer):
            self._check = _bar("test", _count(trainer.num_test_batches))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_shown(trainer):
            self._check = _bar("predict", _count(trainer.num_predict_batches))

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        if self._check is not None:
            self._check.update()

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._check is not None:
            self._check.close()
            self._check = None

    on_test_end = on_predict_end = on_validation_end

    def _close(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation_end(trainer, pl_module)
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _is_shown(self, trainer: Trainer) -> bool:
        return self._enabled and trainer.is_global_zero and sys.stderr.isatty()


@rank_zero_only
def say(text: str) -> None:
    """Prints once for all ranks, above the bars; on a terminal in lines that fit, in a file as it is."""
    if sys.stdout.isatty():
        text = wrapped(text, width=max(60, shutil.get_terminal_size().columns))
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def wrapped(text: str, *, width: int) -> str:
    """Lines of at most `width` columns, each continued further in; those that fit keep their blanks."""
    return "\n".join(
        line if len(line) <= width else textwrap.fill(line, width, subsequent_indent=" " * 6, break_on_hyphens=False)
        for line in text.split("\n")
    )


def warn(text: str) -> None:
    """Prints on this rank, above the bars, where errors go."""
    tqdm.write(f"vlm: warning: {text}", file=sys.stderr)
    sys.stderr.flush()


def _bar(name: str, total: int, *, initial: int = 0, leave: bool = False) -> tqdm:
    return tqdm(total=total, desc=name, initial=initial, leave=leave, bar_format=_FORMAT, dynamic_ncols=True)


def _count(batches: Any) -> int:
    return int(sum(batches) if isinstance(batches, list) else batches)


def _metrics(trainer: Trainer) -> str:
    """`loss 1.083, val loss 1.769`."""
    names = {"train/loss": "loss", "val/loss": "val loss"}
    found = trainer.progress_bar_metrics
    return ", ".join(f"{shown} {found[name]:.4g}" for name, shown in names.items() if name in found)
