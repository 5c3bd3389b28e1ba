"""Blocks compiled by torch."""

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from callbacks.progress import say
from vlm.building.compiled import compile_blocks
from vlm.errors import UserError
from vlm.module import VisionLanguageModule


class CompiledBlocks(Callback):
    """Has every block of some parts run compiled in training; checkpoints, names and answers stay as they are.

    The first steps take a minute or so longer: one runs uncompiled where `ThroughputMonitor` counts its operations, and
    the next one compiles. Sums are taken in another order, so losses differ in their last bits from those of a run
    without it.

    Args:
        parts: those whose blocks are compiled.
        backend: of torch.compile.
    """

    def __init__(self, parts: Sequence[str] = ("language",), backend: str = "inductor") -> None:
        self.parts = list(parts)
        self.backend = backend

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, VisionLanguageModule):
            raise UserError(f"CompiledBlocks compiles the systems of this package, not {type(pl_module).__name__}")
        pl_module.compile_network = self._compile

    def _compile(self, network: nn.Module) -> None:
        counts = compile_blocks(network, parts=self.parts, backend=self.backend)
        say(f"compiled by {self.backend}: " + ", ".join(f"{count} blocks of {part}" for part, count in counts.items()))
