"""How fast a stage trains, and how its parts move."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.log_cadence import is_logged
from vlm.batch import Batch
from vlm.monitoring.norms import learning_rates, squared_gradient_norms, trained_parts
from vlm.module import VisionLanguageModule


class Throughput(Callback):
    """Writes speed, rates and gradient norms to the loggers at the steps that are logged.

    Means over the steps since the last time, validation left out, over all ranks::

        speed/tokens_per_s        tokens of all rows, pictures' tokens included
        speed/label_tokens_per_s  tokens that are trained
        speed/images_per_s
        speed/steps_per_s
        speed/data_wait           share of the time spent waiting for the loader: near 0 unless the data is too slow
        speed/peak_memory_gib     of the fullest device so far (CUDA)
        lr/<pattern>              of a pattern of `stage.train`; with layer-wise decay, of its top layers
        grad_norm/<part>          of the step that is logged, before clipping
        grad_norm/total           of all parts together

    In between it only adds up sizes that are known without asking the device. The first step of a start, in which
    workers begin and kernels are chosen, does not count.

    Args:
        enabled: false switches it off.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.enabled:
            trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._parts = trained_parts(trainer.optimizers[0])
        self._since: float | None = None  # None: the first step is not done
        self._paused = 0.0
        self._norms: Tensor | None = None
        self._rates: dict[str, float] = {}

    def _begin(self, trainer: Trainer) -> None:
        self._tokens = self._labels = self._images = self._steps = 0
        self._waited = _waited(trainer)
        self._since = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if is_logged(trainer, trainer.global_step + 1):
            self._rates = learning_rates(optimizer)
            self._norms = squared_gradient_norms(self._parts, pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        is_whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self._since is not None:
            rows = (batch.text, *batch.rows.values())
            self._tokens += sum(row.ids.shape[0] for row in rows)
            self._labels += sum(row.label_positions.shape[0] for row in rows)
            # two streams show the same images
            self._images += max((len(views.size) for views in batch.views.values()), default=0)
            self._steps += is_whole
        if is_whole and is_logged(trainer, trainer.global_step):
            self._log(trainer, pl_module)
        if is_whole and (self._since is None or is_logged(trainer, trainer.global_step)):
            self._begin(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._since is not None:
            self._since += time.perf_counter() - self._paused

    def _log(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, VisionLanguageModule)
        values = {f"lr/{pattern}": rate for pattern, rate in self._rates.items()}
        if self._norms is not None:
            norms = trainer.strategy.reduce(self._norms, reduce_op="sum") if module.is_sharded else self._norms
            assert isinstance(norms, Tensor)
            norms = norms / module.num_replicas if module.is_sharded else norms
            # the first read waits for the device, so that the clock below sees finished steps
            read = torch.cat([norms, norms.sum()[None]]).sqrt().tolist()
            values |= {f"grad_norm/{part}": norm for part, norm in zip([*self._parts, "total"], read, strict=True)}
            self._norms = None
        if self._since is not None and self._steps:
            values |= self._speeds(trainer, module.device)
        if module.device.type == "cuda":
            peak = torch.tensor(torch.cuda.max_memory_allocated(module.device), device=module.device)
            peak = trainer.strategy.reduce(peak, reduce_op="max")  # type: ignore[assignment]
            values["speed/peak_memory_gib"] = peak.item() / 2**30
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)  # where Lightning writes the step's losses

    def _speeds(self, trainer: Trainer, device: torch.device) -> dict[str, float]:
        assert self._since is not None
        seconds = time.perf_counter() - self._since
        mine = [self._tokens, self._labels, self._images, seconds, _waited(trainer) - self._waited]
        total = trainer.strategy.reduce(torch.tensor(mine, dtype=torch.float64, device=device), reduce_op="sum")
        assert isinstance(total, Tensor)
        tokens, labels, images, spent, waited = total.tolist()
        return {
            "speed/tokens_per_s": tokens / seconds,
            "speed/label_tokens_per_s": labels / seconds,
            "speed/images_per_s": images / seconds,
            "speed/steps_per_s": self._steps / seconds,
            "speed/data_wait": waited / spent,
        }


def _waited(trainer: Trainer) -> float:
    """Seconds this process has waited for its loader; 0 for loaders that do not know."""
    return getattr(trainer.train_dataloader, "waited", 0.0)
