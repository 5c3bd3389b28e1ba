"""Short runs of the small systems on packs that a test chooses, under any strategy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from callbacks import MixedPrecisionFSDP
from tests.support.samples import samples
from vlm.batch import Batch
from vlm.codec import step_counts
from vlm.data.sources.base import Source
from vlm.module import VisionLanguageModule
from vlm.sample import Sample

Steps = Sequence[Sequence[Sequence[int]]]
"""Per optimizer step its packs, per pack the indices of its samples in `tests.support.samples.samples`."""


class Recorder(L.Callback):
    """What every optimizer step saw, in full tensors on every rank."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.clipped: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(_gradients(pl_module))

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if len(self.clipped) < len(self.gradients):
            self.clipped.append(_gradients(pl_module))

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self._read_loss(trainer)  # of the step before: the module logs after its callbacks have run

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        self._read_loss(trainer)

    def _read_loss(self, trainer: Any) -> None:
        if len(self.gradients) > len(self.losses):
            self.losses.append(trainer.callback_metrics["train/loss"].item())


def _gradients(module: VisionLanguageModule) -> dict[str, Tensor]:
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return {name: full(p.grad) if p.grad is not None else torch.zeros(p.shape) for name, p in trained.items()}


def full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def weights(module: VisionLanguageModule) -> dict[str, Tensor]:
    return {name: full(tensor) for name, tensor in module.state_dict().items()}


def packs(module: VisionLanguageModule, folder: Path, steps: Steps, *, world: int = 1, rank: int = 0) -> DataLoader:
    """Loads the packs of one rank, in order."""
    made: list[Batch] = []
    pool = samples(folder)
    for step in steps:
        items = [[module.codec.encode(pool[i]) for i in pack] for pack in step]
        counts = step_counts([item for pack in items for item in pack])
        made += [module.codec.collate(pack, counts=counts, packs=len(step)) for pack in items[rank::world]]
    return DataLoader(made, batch_size=None, collate_fn=_as_it_is)  # type: ignore[arg-type]


def _as_it_is(batch: Batch) -> Batch:
    return batch


def trainer(folder: Path, *, world: int = 1, fsdp: str | MixedPrecisionFSDP | None = None, **options: Any) -> L.Trainer:
    """One process without `fsdp`; with it, or the precision of one, fully sharded over `world` ranks."""
    callbacks = list(options.pop("callbacks", ()))
    if fsdp is not None:
        options.setdefault("strategy", "fsdp2")
        callbacks.append(MixedPrecisionFSDP(fsdp) if isinstance(fsdp, str) else fsdp)
    defaults = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
        "max_steps": -1,
    }
    return L.Trainer(
        accelerator="cpu",
        devices=world,
        default_root_dir=folder,
        callbacks=callbacks,
        use_distributed_sampler=False,
        enable_model_summary=False,
        **(defaults | options),
    )


class ListSource(Source):
    """Samples that are made already."""

    name = "list"

    def __init__(self, items: Sequence[Sample]) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        return self.items[index]

    def has_image(self, index: int) -> bool:
        return bool(self.items[index].images)
