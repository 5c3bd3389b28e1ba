"""Moving averages of the trained weights."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.progress import say
from vlm.building.weight_sources import is_resuming
from vlm.checkpoints.artefact import read_artefact
from vlm.checkpoints.files.parts import assign
from vlm.checkpoints.resume.moments import named_parameters
from vlm.data.loading.trainer_progress import ends_step
from vlm.errors import UserError
from vlm.module import VisionLanguageModule
from vlm.moving import exchange, move_towards


class EMA(Callback):
    """Keeps float32 moving averages of the trained weights and hands on these.

    After every optimizer step `average = decay * average + (1 - decay) * weight`, from the weights the stage starts
    with. Validation and the artefact take the averages, as CogVLM's published weights are averages; training goes on
    with the weights themselves. Resume checkpoints hold both. So does the artefact of a stage with `keep_optimizer`,
    for one that `continues` it; a stage that `follows` it starts from the averages.

    Args:
        decay: share of the average that stays at each step; CogVLM does not print its own.
    """

    keeps_averages = True
    """Told to whoever counts memory."""

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"callbacks.EMA: decay must be at least 0 and below 1, found {decay}")
        self.decay = decay
        self._in_use = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            assert isinstance(pl_module, VisionLanguageModule)
            pl_module.averages = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, VisionLanguageModule)
        averages = self._averages(pl_module)
        if other := [name for name, average in averages.items() if average.dtype != torch.float32]:
            raise UserError(
                f"callbacks.EMA averages float32 weights, {other[0]} is not; use trainer.precision: bf16-mixed"
            )
        assert pl_module.stage is not None
        if pl_module.stage.continues is not None and not is_resuming(pl_module):
            for name, average in read_artefact(pl_module.stage.continues).items():
                if name in averages:
                    assign(averages[name], average)
        say(f"validation and the artefact take moving averages of {len(averages):,} tensors, decay {self.decay:g}")

    def _averages(self, module: VisionLanguageModule) -> dict[str, torch.Tensor]:
        """Begins them where the weights are, unless a checkpoint has brought them already."""
        assert module.averages is not None
        if not module.averages:
            trained = ((name, weight) for name, weight in module.named_parameters() if weight.requires_grad)
            module.averages |= {name: weight.detach().clone() for name, weight in trained}
        return module.averages

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not ends_step(trainer, batch_idx):
            return
        assert isinstance(pl_module, VisionLanguageModule)
        averages, weights = self._averages(pl_module), dict(named_parameters(trainer.optimizers[0]))
        move_towards(averages.values(), (weights[name] for name in averages), share=1 - self.decay)

    # -- validation takes the averages

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._use(pl_module, True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._use(pl_module, False)

    on_test_start = on_validation_start
    on_test_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._use(pl_module, False)

    def _use(self, module: LightningModule, wanted: bool) -> None:
        assert isinstance(module, VisionLanguageModule)
        if not module.averages or wanted == self._in_use:
            return
        # the state dict: what a sharded system has gathered is given up, and the ranks' own parts are seen
        weights = module.state_dict()
        exchange((weights[name] for name in module.averages), module.averages.values())
        self._in_use = wanted

    # -- checkpoints

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert not self._in_use, "a checkpoint in the middle of a validation, which runs with the averages"

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, VisionLanguageModule)
        stored, averages = checkpoint.get("averages", {}), self._averages(pl_module)
        for name in stored.keys() & averages.keys():
            averages[name].copy_(stored[name])
