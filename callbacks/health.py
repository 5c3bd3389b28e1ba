"""Stops a run that has gone wrong, and says where."""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.progress import say, warn
from callbacks.switched import SwitchedCallback
from vlm.batch import NOT_TERMS, Batch
from vlm.monitoring.nonfinite import MicroBatchRecord, as_json, find_culprits
from vlm.data.loading.trainer_progress import ends_step, is_finished
from vlm.errors import UserError
from vlm.monitoring.checksums import FrozenTensors
from vlm.monitoring.norms import squared_gradient_norms, squared_norms, trained_parts
from vlm.monitoring.over_ranks import exchange, over_ranks
from vlm.module import VisionLanguageModule
from vlm.moving import moving_names
from vlm.seeding import seed_from


@dataclass(frozen=True)
class _Pending:
    """Measured on the device, on its way to this process."""

    step: int
    names: tuple[str, ...]
    values: Tensor
    arrived: torch.cuda.Event | None
    has_pictures: bool
    has_labels: bool
    sizes: tuple[int, int, int]
    """Tokens, label tokens and images of this rank since the start."""

    def read(self) -> dict[str, float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


class Health(SwitchedCallback):
    """Looks at a run every few steps, and stops it with one line when it cannot come to anything.

    - A loss or a gradient norm is not finite: the line names step, term and samples, and
      `<run>/health/step=N.json` has ids, lengths and losses of all packs of that step.
    - A trained part has a gradient of exactly zero for `patience` steps that had labels and, for every part but
      `language`, images.
    - A frozen tensor has changed: checksums of some by lot; at the end of the stage of all of them,
      and their content hashes.
    - Packs without a label in `patience` steps in a row: only a warning.

    Nothing waits for the device: what is measured at a step is read a step later, so a failure is told at most
    `every_n_steps` + 1 steps after it began, the step and the samples in the line being those where it began. Before a
    checkpoint is written, and at the end, everything is looked at once more: a state that is not finite never takes the
    place of a good one.

    Args:
        every_n_steps: optimizer steps between two looks; the first step is always looked at.
        patience: steps before a zero gradient or missing labels count; 0: never.
        num_frozen: tensors of each part whose checksum is compared at a look.
        enabled: false switches all of it off.
    """

    def __init__(self, every_n_steps: int = 10, patience: int = 100, num_frozen: int = 4, enabled: bool = True) -> None:
        if every_n_steps < 1:
            raise UserError(f"health.every_n_steps must be at least 1, found {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.patience = patience
        self.num_frozen = num_frozen
        self.enabled = enabled
        self._parts: dict[str, list[Tensor]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, VisionLanguageModule)
        self._parts = trained_parts(trainer.optimizers[0])
        self._frozen = FrozenTensors(pl_module, moving=moving_names(pl_module))
        self._start = trainer.global_step
        self._packs: list[MicroBatchRecord] = []
        self._pending: _Pending | None = None
        self._norms: dict[str, Tensor] = {}
        self._zero_since: dict[str, int] = {}
        self._first_losses: dict[str, float] | None = None
        self._summarised = False
        self._unlabelled = (0, 0)  # steps in a row, the last of them
        self._sizes = (0, 0, 0)

    # -- what is noted of every step: references and sizes

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # float16 skips steps whose gradients have overflown, and goes on
        if self._is_due(trainer.global_step + 1) and trainer.precision != "16-mixed":
            squares = squared_gradient_norms(self._parts, pl_module.device)
            self._norms = {f"gradient of {part}": square for part, square in zip(self._parts, squares, strict=True)}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, VisionLanguageModule)
        is_whole = ends_step(trainer, batch_idx)
        step = trainer.global_step + (not is_whole)
        self._packs.append(MicroBatchRecord.of(batch, step=step, losses=pl_module.running))
        self._count(step, batch, rank=trainer.global_rank)
        if not is_whole:
            return
        self._read_pending(trainer, pl_module)
        if self._is_due(step):
            self._norms |= {f"loss {term}": value for term, value in pl_module.running.items()}
            self._pending = self._measure(trainer, pl_module, self._norms, batch.counts)
            self._norms = {}

    def _is_due(self, step: int) -> bool:
        return step == self._start + 1 or step % self.every_n_steps == 0

    def _count(self, step: int, batch: Batch, *, rank: int) -> None:
        rows = (batch.text, *batch.rows.values())
        labels = sum(row.label_positions.shape[0] for row in rows)
        images = max((len(views.size) for views in batch.views.values()), default=0)
        sizes = (sum(row.ids.shape[0] for row in rows), labels, images)
        self._sizes = tuple(map(sum, zip(self._sizes, sizes, strict=True)))  # type: ignore[assignment]
        if labels or batch.labels:
            return
        streak, last = self._unlabelled
        if step > last:
            streak = streak + 1 if step == last + 1 else 1
            self._unlabelled = (streak, step)
            if streak == self.patience:
                reason = "a batch smaller than devices x accumulate_grad_batches is filled up with copies"
                warn(f"rank {rank}: packs without any label in {streak} steps up to step {step}; {reason}")

    # -- the look

    def _measure(
        self,
        trainer: Trainer,
        module: VisionLanguageModule,
        extra: Mapping[str, Tensor],
        counts: Mapping[str, float],
    ) -> _Pending:
        """Starts the sums over the ranks and the way to this process; waits for neither on CUDA."""
        device = module.device
        last = [pack for pack, after in itertools.pairwise(self._packs) if pack.step != after.step] + self._packs[-1:]
        losses = [value for pack in last for value in pack.losses.values()]
        bad = (~torch.stack(losses).isfinite()).sum() if losses else torch.zeros((), device=device)
        chosen = self._frozen.draw(self.num_frozen, Random(seed_from(trainer.global_step, "health")))
        measured = {"bad losses": bad, "moved": self._frozen.num_changed(chosen, device=device), **extra}
        values = torch.stack([value.double() for value in measured.values()])
        values = over_ranks(values)
        if module.num_replicas > 1:  # several ranks have the same part of a gradient
            share = [1.0 / module.num_replicas if name.startswith("gradient") else 1.0 for name in measured]
            values = values * torch.tensor(share, dtype=torch.float64).to(device, non_blocking=True)
        arrived = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        trained = any(value for name, value in counts.items() if name not in NOT_TERMS)
        pictures = bool(counts.get("images"))
        return _Pending(trainer.global_step, tuple(measured), values, arrived, pictures, trained, self._sizes)

    def _read_pending(self, trainer: Trainer, module: VisionLanguageModule) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        found = pending.read()
        gradients = {n.removeprefix("gradient of "): v for n, v in found.items() if n.startswith("gradient of ")}
        losses = {name.removeprefix("loss "): value for name, value in found.items() if name.startswith("loss ")}
        not_finite = [name for name, value in found.items() if not math.isfinite(value)]
        if found["bad losses"] or not_finite:
            self._fail_not_finite(trainer, pending.step, not_finite)
        if found["moved"]:
            self._fail_moved(trainer, pending.step, self._frozen.changed())
        self._judge_zeros(pending, gradients)
        self._summarise(pending, losses, {part: math.sqrt(square) for part, square in gradients.items()})
        sound = min(pending.step, trainer.global_step - 1)  # a look before a checkpoint may still need the newest
        self._packs = [pack for pack in self._packs if pack.step > sound]

    def _look_now(self, trainer: Trainer, module: VisionLanguageModule) -> None:
        """Waits for what is under way, then looks at losses and trained weights as they are."""
        self._read_pending(trainer, module)
        weights = squared_norms(self._parts.values(), module.device)
        extra = {f"weights of {part}": square for part, square in zip(self._parts, weights, strict=True)}
        self._pending = self._measure(trainer, module, extra, {})
        self._read_pending(trainer, module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._parts:
            assert isinstance(pl_module, VisionLanguageModule)
            self._look_now(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, VisionLanguageModule)
        self._look_now(trainer, pl_module)
        if is_finished(trainer):
            changed = self._frozen.changed()
            changed += self._frozen.differing(pl_module.frozen_hashes, is_judge=trainer.is_global_zero)
            self._fail_moved(trainer, trainer.global_step, changed)
        self._parts = {}

    # -- verdicts

    def _judge_zeros(self, pending: _Pending, squares: Mapping[str, float]) -> None:
        for part, square in squares.items():
            if square > 0:
                self._zero_since.pop(part, None)
            elif self.patience and pending.has_labels and (part == "language" or pending.has_pictures):
                since = self._zero_since.setdefault(part, pending.step)
                if pending.step - since >= self.patience:
                    raise UserError(
                        f"steps {since} to {pending.step}: the gradient of {part!r}, which the stage trains, is "
                        "exactly zero; the loss does not depend on it; mend what cuts it off, take it out of "
                        "stage.train, or set health.patience to 0 if it has to be so"
                    )

    def _summarise(self, pending: _Pending, losses: Mapping[str, float], norms: Mapping[str, float]) -> None:
        if self._first_losses is None:
            self._first_losses = dict(losses)
        elif losses and not self._summarised:
            self._summarised = True
            moves = [f"{term} {self._first_losses.get(term, 0.0):.4g} -> {end:.4g}" for term, end in losses.items()]
            gradients = [f"{part} {norm:.3g}" for part, norm in norms.items()]
            tokens, labels, images = pending.sizes
            say(
                f"health: steps {self._start + 1} to {pending.step} are sound: loss {', '.join(moves)}; "
                f"gradient norms {', '.join(gradients) or 'not looked at'}; rank 0 had {tokens:,} tokens, "
                f"{labels / tokens:.0%} of them trained, and {images:,} pictures"
            )

    def _fail_not_finite(self, trainer: Trainer, looked: int, names: list[str]) -> None:
        """Every rank comes here together: the sums it was decided on are the same everywhere."""
        everywhere = exchange(as_json(self._packs, rank=trainer.global_rank))
        found = find_culprits([pack for packs in everywhere for pack in packs], looked=looked)
        what = ", ".join([f"loss term {term!r}" for term in found.terms] or names) + " not finite"
        file = Path(trainer.default_root_dir) / "health" / f"step={found.step}.json"
        if trainer.is_global_zero:
            file.parent.mkdir(parents=True, exist_ok=True)
            content = {"step": found.step, "what": what, "packs": found.packs}
            file.write_text(json.dumps(content, indent=1), encoding="utf-8")
        ids = [repr(name) for name in found.sample_ids]
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        raise UserError(
            f"step {found.step}: {what}; sample ids {shown or 'not kept'}; lengths and losses are in {file}; "
            "look at the samples, lower the learning rate, or clip the gradient; no checkpoint was written since"
        )

    def _fail_moved(self, trainer: Trainer, step: int, mine: list[str]) -> None:
        names = sorted({name for found in exchange(mine) for name in found})
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"step {step}: frozen tensors have changed: {names[0]}{more}; a callback or a hook writes to them; "
                "mend that, or name them in stage.train if they are meant to be trained"
            )
