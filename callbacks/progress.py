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

from callbacks.log_cadence import is_logged
from vlm.data.loading.trainer_progress import ends_step
from vlm.module import VisionLanguageModule

_MINUTE = 60.0
_FORMAT = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}, {elapsed}<{remaining}{postfix}"


class Progress(ProgressBar):
    """One bar over the steps of the stage, wherever it began; in a file a line at every step that is logged.

    In a file, what a validation found has a line too, and a long one, a test or a prediction says how far it is.
    Losses are read at the logged steps alone: asking for them every step would make the host wait for the device.
    Lines come when all callbacks and the module have logged the step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm | None = None  # of the training
        self._check: tqdm | _Lines | None = None  # of a validation, test or prediction
        self._is_due = False
        self._enabled = True

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        tqdm.write(sep.join(map(str, args)), **kwargs)

    # -- training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, VisionLanguageModule)
        name = pl_module.stage.name if pl_module.stage is not None else "fit"
        self._name, self._total = name, pl_module.total_steps()
        self._told, self._told_at = trainer.global_step, time.monotonic()
        self._is_due = False
        if self._is_bar(trainer):
            self._bar = _bar(name, self._total, initial=trainer.global_step, leave=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._is_shown(trainer) or not ends_step(trainer, batch_idx):
            return
        self._is_due = is_logged(trainer, trainer.global_step)
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._tell(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(_metrics(trainer))
        self._close(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close(trainer)

    def _tell(self, trainer: Trainer) -> None:
        """Of the step before: the loss, the rate, the norm, the speed since the last line, and what is left at it."""
        if not self._is_due:
            return
        self._is_due = False
        if self._bar is not None:
            self._bar.set_postfix_str(_metrics(trainer), refresh=False)
            return
        step, now = trainer.global_step, time.monotonic()
        speed = (step - self._told) / max(now - self._told_at, 1e-9)
        self._told, self._told_at = step, now
        left = tqdm.format_interval((self._total - step) / speed) if speed else "?"
        parts = [
            f"{self._name}: step {step} of {self._total}",
            _metrics(trainer),
            f"{speed:.3g} steps/s",
            f"{left} left",
        ]
        print(", ".join(part for part in parts if part), flush=True)

    def _close(self, trainer: Trainer) -> None:
        self._tell(trainer)
        self._end_check()
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    # -- validation, test, prediction

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell(trainer)
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._begin_check(trainer, "validation", batches, often=trainer.state.fn != "fit")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_check(trainer, "test", trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_check(trainer, "predict", trainer.num_predict_batches)

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        if self._check is not None:
            self._check.update()

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_check()
        if self._is_shown(trainer) and trainer.state.fn == "fit" and not trainer.sanity_checking:
            found = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            values = ", ".join(f"{name.removeprefix('val/')} {value:.4g}" for name, value in found.items())
            if values and self._bar is None:
                print(f"{self._name}: validation after step {trainer.global_step}: {values}", flush=True)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_check()

    on_predict_end = on_test_end

    def _begin_check(self, trainer: Trainer, name: str, batches: Any, *, often: bool = True) -> None:
        if self._is_shown(trainer):
            total = int(sum(batches) if isinstance(batches, list) else batches)
            self._check = _bar(name, total) if self._is_bar(trainer) else _Lines(name, total, often=often)

    def _end_check(self) -> None:
        if self._check is not None:
            self._check.close()
            self._check = None

    def _is_shown(self, trainer: Trainer) -> bool:
        return self._enabled and trainer.is_global_zero

    def _is_bar(self, trainer: Trainer) -> bool:
        return self._is_shown(trainer) and sys.stderr.isatty()


class _Lines:
    """How far something is, for a file: a line at every tenth where it is wanted `often`, and every minute."""

    def __init__(self, name: str, total: int, *, often: bool) -> None:
        self.name, self.total, self.often = name, total, often
        self.done = 0
        self.start = self.told_at = time.monotonic()

    def update(self) -> None:
        self.done += 1
        now = time.monotonic()
        is_tenth = self.often and 10 * self.done // self.total > 10 * (self.done - 1) // self.total
        if is_tenth or now - self.told_at >= _MINUTE:
            self.told_at = now
            left = tqdm.format_interval((self.total - self.done) * (now - self.start) / self.done)
            print(f"{self.name}: batch {self.done} of {self.total}, {left} left", flush=True)

    def close(self) -> None:
        """As a bar has it."""


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


def _metrics(trainer: Trainer) -> str:
    """`loss 1.083, lr 0.001, norm 2.41, val loss 1.769, tokens/s 1.2e+04, mfu 0.41`, as far as they are known."""
    found = trainer.progress_bar_metrics | {name: value.item() for name, value in trainer.callback_metrics.items()}
    rates = {name: value for name, value in found.items() if name.startswith("lr/")}
    shown = {"loss": "train/loss", "lr": max(rates, key=rates.__getitem__, default=""), "norm": "grad_norm/total",
             "val loss": "val/loss", "tokens/s": "speed/tokens_per_s", "mfu": "mfu/total"}  # fmt: skip
    return ", ".join(f"{word} {found[name]:.4g}" for word, name in shown.items() if name in found)
