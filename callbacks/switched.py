"""Callbacks that come with every run and can be switched off."""

from lightning.pytorch import Callback, LightningModule, Trainer


class SwitchedCallback(Callback):
    """Takes itself out of a trainer where it is not `enabled`.

    Attributes:
        enabled: false switches it off; set by the constructor of the subclass.
    """

    enabled: bool

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.enabled:
            trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
