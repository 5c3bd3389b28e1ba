"""LoRA, DoRA and QLoRA by YAML."""

import vlm  # noqa: F401  (before lightning)
from lightning.pytorch import Callback, LightningModule, Trainer

from vlm.language import PeftAdapter
from vlm.module import VisionLanguageModule


class LoRAInjection(Callback):
    """Registers `vlm.language.PeftAdapter` with the system, which does the rest: stages that follow and whoever loads
    the artefact need no callback. `stage.train` trains it by the word `adapters`.

    Args:
        rank: width of the low-rank path.
        alpha: its factor, times the rank.
        parts: whose blocks have their linear layers adapted: `language`, `vision`, `both` (these two), or a list of
            parts; None: the language model where no targets are named, else any part.
        targets: which linear layers: regular expressions over full names, or over the ends of names (`q_proj`); None:
            all of them.
        dropout: on the input of A.
        dora: learn the length of each row of the adapted weight besides.
        quantize: parts whose blocks keep the frozen weights of their linear layers in 4 bits (NF4 with double
            quantization), named like `parts`; needs bitsandbytes.
    """

    def __init__(
        self,
        rank: int,
        alpha: float,
        parts: str | list[str] | None = None,
        targets: list[str] | None = None,
        dropout: float = 0.0,
        dora: bool = False,
        quantize: str | list[str] | None = None,
    ) -> None:
        self.surgery = PeftAdapter(
            rank=rank,
            alpha=alpha,
            parts=parts or (),
            targets=targets or (),
            dropout=dropout,
            dora=dora,
            quantize=quantize or (),
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, VisionLanguageModule)
        pl_module.register_surgery(self.surgery)
