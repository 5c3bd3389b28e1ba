"""A stage as its configuration describes it, before any network is built."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vlm.codec import Codec
from vlm.data.modules.base import VisionLanguageData


class StageView(NamedTuple):
    """What the tools that look at data need of a stage."""

    system: str
    stage: str
    codec: Codec
    data: VisionLanguageData


StageParser = Callable[[Sequence[str]], StageView]
"""Options of `vlm fit` as a stage; no network is built and no weights are read."""
