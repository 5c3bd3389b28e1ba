"""Out of memory, and what to change."""

import vlm  # noqa: F401  (before lightning)
from lightning.pytorch import Callback, LightningModule, Trainer

from vlm.errors import is_out_of_memory
from vlm.module import VisionLanguageModule
from vlm.monitoring.out_of_memory import suggest_smaller


class OutOfMemory(Callback):
    """Adds to the error of a device without memory which settings of this run would take less of it."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if is_out_of_memory(exception):
            assert isinstance(pl_module, VisionLanguageModule)
            exception.add_note(suggest_smaller(trainer, pl_module))
