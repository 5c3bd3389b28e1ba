"""A stage as its configuration describes it, before any network is built."""

from collections.abc import Callable
from typing import Any, NamedTuple

from vlm.codec import Codec
from vlm.data.modules.base import VisionLanguageData
from vlm.module import VisionLanguageModule
from vlm.stages import Stage


class StageView(NamedTuple):
    """What the tools that look at a stage need of it.

    Attributes:
        module: not built; callbacks have registered their surgery.
        trains: what is trained, and how.
        data: where it learns from.
        trainer: the options of the trainer.
    """

    module: VisionLanguageModule
    trains: Stage
    data: VisionLanguageData
    trainer: Any

    @property
    def system(self) -> str:
        return self.module.system

    @property
    def stage(self) -> str:
        return self.trains.name

    @property
    def codec(self) -> Codec:
        return self.module.codec


StageParser = Callable[..., StageView]
"""Options of `vlm fit` as a stage, `on_gpu` or on this machine; no network is built and no weights are read."""
