"""How fast a stage trains, what its time goes into, and how its parts move."""

import resource
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.log_cadence import is_logged
from callbacks.switched import SwitchedCallback
from vlm.batch import Batch
from vlm.data.loading.trainer_progress import ends_step
from vlm.module import VisionLanguageModule
from vlm.monitoring.figures import figures_of, names_of_sums
from vlm.monitoring.flops import CountedFlops, FlopRates, is_compiled
from vlm.monitoring.norms import learning_rates, squared_gradient_norms, trained_parts
from vlm.monitoring.over_ranks import over_ranks
from vlm.monitoring.peak import matmul_peak
from vlm.monitoring.run_report import machine_of, speed_table, write_report
from vlm.monitoring.spans import OPTIMIZER, Spans
from vlm.planning.regions import BETWEEN, LOSS, networks_of


class ThroughputMonitor(SwitchedCallback):
    """Writes speed, utilization, rates and gradient norms to the loggers at the steps that are logged.

    Means over the steps since the last time, validation left out, over all ranks::

        speed/tokens_per_s        tokens of all rows, pictures' tokens included
        speed/label_tokens_per_s  tokens that are trained
        speed/images_per_s
        speed/steps_per_s
        speed/data_wait           share of the time spent waiting for the loader: near 0 unless the data is too slow
        speed/peak_memory_gib     of the fullest device so far (CUDA)
        speed/hours_left          of the stage at this speed
        time/<part>               share of the time that a part takes, forward and backward; `optimizer`: the update;
                                  `row`: what lies between the parts; `loss`: behind the vocabulary projection (`head`)
        mfu/<part>, mfu/total     operations that a part needs over those that its device could have done meanwhile
        lr/<pattern>              of a pattern of `stage.train`; with layer-wise decay, of its top layers
        grad_norm/<part>          of the step that is logged, before clipping
        grad_norm/total           of all parts together

    Operations are counted in the packs of the first step as they run, and go with what each part is given later. The
    peak is that of a product of square matrices, measured on the device in the type that most is computed in. On CUDA
    times are events that are read when the device has passed them: between logged steps the host never waits. The first
    step of a start, in which workers begin and kernels are chosen, does not count, nor does the second where blocks are
    compiled.

    When a start ends, as planned, stopped or by an error, `report.md` in the run folder gets a section about it.

    Args:
        enabled: false switches it off.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._spans: Spans | None = None  # while a training runs

    # -- one pack after another

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, VisionLanguageModule)
        self._parts = trained_parts(trainer.optimizers[0])
        self._norms: Tensor | None = None
        self._rates: dict[str, float] = {}
        self._flops = FlopRates()
        self._counted: CountedFlops | None = None  # while a pack is counted
        regions = [*(name for name, _ in networks_of(pl_module)), BETWEEN, LOSS, OPTIMIZER]
        self._names = names_of_sums(list(dict.fromkeys(regions)))
        self._total = dict.fromkeys(self._names, 0.0)  # of all ranks
        self._done = 0  # optimizer steps
        self._warmups = 2 if is_compiled(pl_module) else 1
        self._counts_next = True
        self._paused = 0.0
        self._began_at, self._first_step = datetime.now(), trainer.global_step
        self._spans = Spans(pl_module, pl_module.device)
        self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        assert self._spans is not None
        self._sums: Counter[str] = Counter()  # of this rank since the last time
        self._units: Counter[str] = Counter()  # what its regions were given
        self._spans.restart()
        self._waited = _waited(trainer)
        self._since = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        assert self._spans is not None
        self._given = Counter(self._spans.units)
        if self._counts_next:
            self._counted = CountedFlops(pl_module)
            self._counted.__enter__()
        self._spans.begin_pack()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        assert self._spans is not None
        self._spans.begin_backward()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._spans is not None
        self._spans.end_backward()
        if self._counted is not None:
            self._counted.__exit__(None, None, None)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert self._spans is not None
        self._spans.begin_optimizer()
        if is_logged(trainer, trainer.global_step + 1):
            self._rates = learning_rates(optimizer)
            self._norms = squared_gradient_norms(self._parts, pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert self._spans is not None
        self._spans.end_pack()
        is_whole = ends_step(trainer, batch_idx)
        self._add(batch)
        self._done += is_whole
        self._sums["steps"] += is_whole
        # all packs of the first step, and one where a part has come that none of them had
        self._counts_next = self._done == 0 or not self._flops.knows(self._spans.units)
        is_due = is_whole and is_logged(trainer, trainer.global_step)
        if is_due:
            self._log(trainer, pl_module)
        if is_due or (is_whole and self._done <= self._warmups):
            self._begin(trainer)

    def _add(self, batch: Batch) -> None:
        assert self._spans is not None
        rows = (batch.text, *batch.rows.values())
        tokens = sum(row.ids.shape[0] for row in rows)
        units = self._spans.units
        units.update({BETWEEN: tokens, LOSS: tokens})
        units = units - self._given
        if self._counted is not None:
            self._flops.add(self._counted, units)
            self._counted = None
        self._sums["tokens"] += tokens
        self._sums["labels"] += sum(row.label_positions.shape[0] for row in rows)
        # two streams show the same images
        self._sums["images"] += max((len(views.size) for views in batch.views.values()), default=0)
        self._units.update(units)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._spans is not None and not trainer.sanity_checking:
            self._since += time.perf_counter() - self._paused

    # -- what is said of them

    def _log(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, VisionLanguageModule)
        values = {f"lr/{pattern}": rate for pattern, rate in self._rates.items()}
        if self._norms is not None:
            norms = over_ranks(self._norms) / module.num_replicas if module.is_sharded else self._norms
            # the first read waits for the device, so that the clock below sees finished steps
            read = torch.cat([norms, norms.sum()[None]]).sqrt().tolist()
            values |= {f"grad_norm/{part}": norm for part, norm in zip([*self._parts, "total"], read, strict=True)}
            self._norms = None
        if self._done > self._warmups and self._sums["steps"]:
            sums = self._over_ranks(trainer, module.device)
            values |= figures_of(sums, world=trainer.world_size)
            left = module.total_steps() - trainer.global_step
            values["speed/hours_left"] = left / values["speed/steps_per_s"] / 3600
            self._total = {name: value + sums[name] for name, value in self._total.items()}
        if module.device.type == "cuda":
            peak = torch.tensor(torch.cuda.max_memory_allocated(module.device), device=module.device)
            peak = trainer.strategy.reduce(peak, reduce_op="max")  # type: ignore[assignment]
            values["speed/peak_memory_gib"] = peak.item() / 2**30
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)  # where Lightning writes the step's losses

    def _over_ranks(self, trainer: Trainer, device: torch.device) -> dict[str, float]:
        """The sums of the steps since the last time; every rank calls it."""
        assert self._spans is not None
        sums: dict[str, float] = dict(self._sums)
        sums["wall"] = time.perf_counter() - self._since
        sums["waited"] = _waited(trainer) - self._waited
        sums |= {f"flops/{region}/{when}": count for (region, when), count in self._flops.of(self._units).items()}
        dtype = self._flops.dtype
        sums["possible"] = sums["wall"] * matmul_peak(device, dtype) if dtype is not None else 0.0
        sums |= {f"time/{region}": seconds for region, seconds in self._spans.collect().items()}
        mine = torch.tensor([sums.get(name, 0.0) for name in self._names], dtype=torch.float64, device=device)
        return dict(zip(self._names, over_ranks(mine).tolist(), strict=True))

    # -- the end of a start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module, "all done")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._spans is not None:
            if self._counted is not None:
                self._counted.__exit__(None, None, None)
            self._end(trainer, pl_module, f"ended by {type(exception).__name__}")

    def _end(self, trainer: Trainer, module: LightningModule, how: str) -> None:
        assert isinstance(module, VisionLanguageModule)
        assert self._spans is not None
        self._spans.close()
        self._spans = None
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        total, step = module.total_steps(), trainer.global_step
        if how == "all done" and step < total:
            how = "stopped"
        write_report(
            Path(trainer.default_root_dir),
            title=f"{self._began_at:%Y-%m-%d %H:%M}: steps {self._first_step + 1:,} to {step:,} of {total:,}, {how}",
            facts=self._facts(trainer, module),
            speed=speed_table(self._total, world=trainer.world_size),
        )

    def _facts(self, trainer: Trainer, module: VisionLanguageModule) -> list[tuple[str, str]]:
        device, sums = module.device, self._total
        facts = [
            ("machine", machine_of(device)),
            ("devices", f"{trainer.world_size}, {type(trainer.strategy).__name__}, {trainer.precision}"),
            ("took", str(datetime.now() - self._began_at).split(".")[0]),
        ]
        if sums["steps"]:
            found = figures_of(sums, world=trainer.world_size)
            rates = ("steps", "tokens", "label_tokens", "images")
            facts += [(f"{name.replace('_', ' ')} a second", f"{found[f'speed/{name}_per_s']:,.4g}") for name in rates]
            facts.append(("waiting for data", f"{found['speed/data_wait']:.1%} of the time"))
        if sums["possible"]:
            peak = sums["possible"] / sums["wall"] / 1e12
            dtype = str(self._flops.dtype).removeprefix("torch.")
            facts.append(("peak, measured", f"{peak:,.4g} TFLOP/s of a device in {dtype}"))
        facts.append(("memory at most", _memory(device)))
        return facts


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:,.1f} GiB of tensors on the first device"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:,.2f} GiB of the first process"


def _waited(trainer: Trainer) -> float:
    """Seconds this process has waited for its loader; 0 for loaders that do not know."""
    return getattr(trainer.train_dataloader, "waited", 0.0)
