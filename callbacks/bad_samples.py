"""What a run left out, in its run folder and in its log."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.log_cadence import is_logged
from callbacks.progress import warn
from vlm.checkpoints.files.atomic import atomic_file
from vlm.data.loading.loader import StepLoader
from vlm.data.loading.trainer_progress import ends_step
from vlm.data.wrappers.quarantine import LeftOut, as_lines

FILE = "bad_samples.jsonl"


class BadSamples(Callback):
    """Writes `<run>/bad_samples.jsonl`, a line for each time that a bad sample was left out of a step.

    The file is a list that `data.quarantine` takes. Where `data.max_bad_samples` lets a run go on, loggers get
    `data/bad_samples`, the number of different ones so far. A resumed run starts from what its checkpoint knows.
    """

    def __init__(self) -> None:
        self._written: list[LeftOut] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._written = []
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            # of an attempt that was cut off before its first checkpoint
            (Path(trainer.default_root_dir) / FILE).unlink(missing_ok=True)
        self._update(trainer, told=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._update(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loader, step = trainer.train_dataloader, trainer.global_step
        is_whole = ends_step(trainer, batch_idx)
        if not isinstance(loader, StepLoader) or not loader.max_bad_samples or not is_whole:
            return
        if is_logged(trainer, step):
            for logger in trainer.loggers:
                logger.log_metrics({"data/bad_samples": float(loader.num_bad_samples)}, step=step - 1)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # the sample that ends a run may be met by one rank alone; the exception says the rest
        self._update(trainer, told=True, everywhere=True)

    def _update(self, trainer: Trainer, *, told: bool = False, everywhere: bool = False) -> None:
        loader = trainer.train_dataloader
        if not isinstance(loader, StepLoader) or len(loader.left_out) == len(self._written):
            return
        new, self._written = loader.left_out[len(self._written) :], list(loader.left_out)
        if not (trainer.is_global_zero or everywhere):
            return
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            with atomic_file(Path(trainer.default_root_dir) / FILE) as file:
                file.write(as_lines(self._written))
        for entry in [] if told else new:
            warn(
                f"epoch {entry.epoch}, step {entry.step} goes without sample {entry.id!r} of {entry.source!r} "
                f"({loader.num_bad_samples} of at most {loader.max_bad_samples} bad samples): {entry.reason}"
            )
