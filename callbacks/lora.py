"""LoRA and DoRA by YAML."""

import vlm  # noqa: F401  (before lightning)
from lightning.pytorch import Callback, LightningModule, Trainer

from vlm.language import PeftAdapter
from vlm.module import VisionLanguageModule


class LoRAInjection(Callback):
    """Registers `vlm.language.PeftAdapter` with the system, which does the rest: stages that follow and whoever loads
    the artefact need no callback. `stage.train` trains it by globs such as `language.*.lora_*`.

    Args:
        rank: width of the low-rank path.
        alpha: its factor, times the rank.
        targets: regular expressions over full names of linear layers; None: every one in the language model's blocks.
        dropout: on the input of A.
        dora: learn the length of each row of the adapted weight besides.
    """

    def __init__(
        self, rank: int, alpha: float, targets: list[str] | None = None, dropout: float = 0.0, dora: bool = False
    ) -> None:
        chosen = {} if targets is None else {"targets": targets}
        self.surgery = PeftAdapter(rank=rank, alpha=alpha, dropout=dropout, dora=dora, **chosen)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, VisionLanguageModule)
        pl_module.register_surgery(self.surgery)
