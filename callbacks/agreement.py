"""What any rank wants done after a step, known to all of them when the step ends."""

from collections.abc import Callable, Sequence

import torch
from lightning.pytorch import Trainer
from torch import distributed


class Agreement:
    """The ranks ask each other while the last micro-batch of every step is computed.

    They talk over gloo, through the CPU: no device is waited for, and the answer is there when it is needed. A rank
    that has died is noticed here too, at once and under every backend.

    Args:
        wishes: what this rank wants now, a number for each thing; of all ranks the largest counts.
    """

    def __init__(self, wishes: Callable[[], Sequence[int]]) -> None:
        self._wishes = wishes
        self._group: distributed.ProcessGroup | None = None
        self._asked: tuple[torch.Tensor, distributed.Work] | None = None

    def begin(self, trainer: Trainer) -> None:
        """Every rank calls it together, before the first question."""
        self._asked = None
        self._group = distributed.new_group(backend="gloo") if trainer.world_size > 1 else None

    def ask(self) -> None:
        if self._group is not None:
            wishes = torch.tensor(self._wishes())
            work = distributed.all_reduce(wishes, distributed.ReduceOp.MAX, group=self._group, async_op=True)
            assert work is not None
            self._asked = wishes, work

    def answer(self) -> list[int]:
        """What the ranks wanted when they were asked; one alone wants what it wants now."""
        if self._group is None:
            return list(self._wishes())
        assert self._asked is not None, "nobody has asked"
        wishes, work = self._asked
        work.wait()
        self._asked = None
        return wishes.tolist()
