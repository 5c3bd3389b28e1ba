"""What a pack costs: the system's own forward and backward pass under fake tensors, which have shapes and no memory.

No formula knows any architecture: every operator that would run is seen. Products of matrices, convolutions and
attention are counted by torch's own formulas, and every tensor is watched from its first to its last use. Attention is
planned as a GPU computes it, by the variable-length kernel.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlm import functional
from vlm.batch import Batch
from vlm.language.attention import planned_for_a_gpu
from vlm.planning.fake import fake_batch, fake_weights, fakes
from vlm.planning.operators import adds_in_place, count_flops, is_cast, is_choice
from vlm.planning.regions import Pass, Regions, pass_of

COPIES, PASSING = "copies", "passing"
"""Kinds of memory beside the regions': weights in the compute dtype, and what the backward pass makes and drops."""
_ROUNDED = 512  # bytes that CUDA's allocator rounds up to


@dataclass(frozen=True)
class PackCost:
    """What one pack costs on one device.

    Attributes:
        flops: {(region, pass): floating-point operations}; a multiplication and an addition are two.
        moments: {(region, whether in the backward pass): what was alive when most was, while the region ran}, each
            {region, `COPIES` or `PASSING`: bytes}. Weights and gradients are not among it.
        kept: {region or `COPIES`: bytes} that the forward pass leaves for the backward pass.
        logits: over the vocabulary, of all labels.
        at_once: how many of them were there at once.
    """

    flops: Mapping[tuple[str, Pass], int]
    moments: Mapping[tuple[str, bool], Mapping[str, int]]
    kept: Mapping[str, int]
    logits: int = 0
    at_once: int = 0

    @property
    def alive(self) -> Mapping[str, int]:
        """What is alive at the worst moment."""
        return max(self.moments.values(), key=lambda alive: sum(alive.values()))

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())


def cost_of_pack(
    module: Any,
    batch: Batch,
    *,
    autocast: torch.dtype | None = None,
    weights: torch.dtype | None = None,
    most_logits: int | None = None,
) -> PackCost:
    """Runs a pack forward and backward.

    Args:
        module: built on the meta device (`vlm.planning.system`); nothing of it is changed.
        batch: real, on the CPU.
        autocast: its dtype; None: everything in the dtype of the weights.
        weights: their dtype, where it is not their own.
        most_logits: in the place of `vlm.functional.MOST_LOGITS`.
    """
    with (
        fakes(),
        fake_weights(module, dtype=weights) as resident,
        planned_for_a_gpu(),
        _at_once(most_logits),
        Regions(module) as regions,
    ):
        pack = fake_batch(batch)
        with _Watch(resident, regions.now) as watch:
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                loss = module.training_step(pack, 0)
            kept = dict(watch.sums)
            if loss.requires_grad:
                loss.backward()
            del loss
    module.running = {}
    choices = max(watch.scores, key=lambda n: sum(watch.scores[n]), default=0)
    logits = watch.scores[choices] or [0]
    return PackCost(dict(watch.flops), watch.moments, kept, sum(logits), max(logits))


@contextmanager
def _at_once(logits: int | None) -> Iterator[None]:
    """Inside, so many are there at once in training."""
    before = functional.MOST_LOGITS
    functional.MOST_LOGITS = before if logits is None else logits
    try:
        yield
    finally:
        functional.MOST_LOGITS = before


class _Watch(TorchDispatchMode):
    """Counts operators, and what is alive.

    Args:
        resident: storages that are there before and after.
        region: where the present operator belongs.
    """

    def __init__(self, resident: set[int], region: Callable[[], str]) -> None:
        super().__init__()
        self.resident = resident
        self.region = region
        self.flops: Counter[tuple[str, Pass]] = Counter()
        self.scores: dict[int, list[int]] = defaultdict(list)  # {choices: scores of each call that compares them}
        self.live: dict[int, tuple[int, str]] = {}  # {storage: bytes, kind}
        self.sums: Counter[str] = Counter()
        self.bytes = 0
        self.most: dict[tuple[str, bool], int] = {}
        self.moments: dict[tuple[str, bool], dict[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        when = pass_of(func)
        if when == "backward" and adds_in_place(func, args):
            out = args[0].add_(args[1])
        else:
            out = func(*args, **(kwargs or {}))
        if not isinstance(out, (Tensor, tuple, list)):  # sizes and devices that are asked for
            return out
        if count := count_flops(func, args, kwargs or {}, out):
            self.flops[self.region(), when] += count
        if when == "forward" and is_choice(func):
            self.scores[args[0].shape[-1]].append(args[0].numel())
        kind = ""
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                kind = kind or self._kind(func, args)
                self._note(tensor.untyped_storage(), kind)
        moment = self.region(), when != "forward"
        if self.bytes > self.most.get(moment, -1):
            self.most[moment], self.moments[moment] = self.bytes, dict(self.sums)
        return out

    def _kind(self, func: Any, args: Any) -> str:
        if is_cast(func) and args[0].untyped_storage()._cdata in self.resident:
            return COPIES
        return self.region() if pass_of(func) == "forward" else PASSING

    def _note(self, storage: Any, kind: str) -> None:
        key = storage._cdata
        if key in self.resident or key in self.live:
            return
        size = -(-storage.nbytes() // _ROUNDED) * _ROUNDED
        self.live[key] = size, kind
        self.sums[kind] += size
        self.bytes += size
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        size, kind = self.live.pop(key)
        self.sums[kind] -= size
        self.bytes -= size
