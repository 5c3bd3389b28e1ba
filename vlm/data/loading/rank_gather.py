"""What the ranks tell each other about the samples of a step that they could not read."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch import distributed

Gather = Callable[[Any], list[Any]]
"""Takes this rank's value, gives those of all ranks; every rank calls it."""

_WAIT = timedelta(hours=1)  # for a rank that reads its images slowly


def gather_over_ranks() -> Gather | None:
    """How to ask all ranks of this training, through the CPU: asking must not wait for what the device does.

    All ranks call it together. None where there is one.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return None
    group = distributed.new_group(backend="gloo", timeout=_WAIT)

    def gather(value: Any) -> list[Any]:
        everywhere: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everywhere, value, group=group)
        return everywhere

    return gather
