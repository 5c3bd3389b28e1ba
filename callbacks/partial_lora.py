"""Partial LoRA by YAML."""

import vlm  # noqa: F401  (before lightning)
from lightning.pytorch import Callback, LightningModule, Trainer

from vlm.language import PartialLoRA
from vlm.module import VisionLanguageModule


class PartialLoRAInjection(Callback):
    """Registers `vlm.language.PartialLoRA` with the system, which does the rest: stages that follow and whoever loads
    the artefact need no callback. `stage.train` trains it by globs such as `language.*.Plora_*`.

    Args:
        rank: width of the low-rank path.
        scale: factor on it (alpha / rank).
        targets: regular expressions over full names of linear layers; None: every one in the language model's blocks.
        dropout: on the input of A.
    """

    def __init__(self, rank: int, scale: float = 1.0, targets: list[str] | None = None, dropout: float = 0.0) -> None:
        chosen = {} if targets is None else {"targets": targets}
        self.surgery = PartialLoRA(rank=rank, scale=scale, dropout=dropout, **chosen)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, VisionLanguageModule)
        pl_module.register_surgery(self.surgery)
