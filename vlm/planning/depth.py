"""Deep stacks of equal blocks are run with a few of them: each block more costs what the one before it did."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vlm.building.blocks import is_recomputed
from vlm.planning.step import PackCost

_FEW = 2
"""Blocks that are run, and twice as many; even numbers, for models that alternate two kinds of attention."""


def at_full_depth(module: Any, run: Callable[[], PackCost]) -> PackCost:
    """What `run` would give on the whole network.

    Args:
        run: runs a pack through `module`, whose language model has fewer blocks meanwhile.
    """
    stack = _deep_stack(module)
    if stack is None:
        return run()
    few = _FEW * _period(stack)
    with _shortened(stack, few):
        first = run()
    with _shortened(stack, 2 * few):
        second = run()
    return along(first, second, (len(stack) - few) / few)


def along(first: PackCost, second: PackCost, way: float) -> PackCost:
    """The cost on the line through two others: at 0 the first, at 1 the second."""
    return summed((1 - way, first), (way, second))


def summed(*weighted: tuple[float, PackCost]) -> PackCost:
    """Costs times factors that are 1 together; nothing is below 0.

    Moment by moment, because which one is the worst may change on the way.
    """

    def total(read: Callable[[PackCost], Any]) -> dict[Any, int]:
        found = [(factor, read(cost)) for factor, cost in weighted]
        keys = dict.fromkeys(key for _, values in found for key in values)
        return {k: max(0, round(sum(factor * values.get(k, 0) for factor, values in found))) for k in keys}

    def at(moment: tuple[str, bool]) -> dict[Any, int]:
        return total(lambda cost: cost.moments.get(moment, {}))

    moments = {moment: at(moment) for moment in weighted[-1][1].moments}
    logits, at_once = (
        max(0, round(sum(factor * getattr(cost, name) for factor, cost in weighted))) for name in ("logits", "at_once")
    )
    return PackCost(total(lambda cost: cost.flops), moments, total(lambda cost: cost.kept), logits, at_once)


def _deep_stack(module: Any) -> nn.ModuleList | None:
    """The blocks of the language model, if there are many and all are alike."""
    for part in module.children():
        stack = getattr(part.get_decoder(), "layers", None) if isinstance(part, PreTrainedModel) else None
        if isinstance(stack, nn.ModuleList) and len({_kind(block) for block in stack}) == 1:
            return stack if len(stack) > 2 * _FEW * _period(stack) else None
    return None


def _period(stack: nn.ModuleList) -> int:
    """After how many blocks it begins again: n, where every n-th one is recomputed."""
    marked = [at for at, block in enumerate(stack) if is_recomputed(block)]
    return marked[1] - marked[0] if len(marked) > 1 else 1


def _kind(block: nn.Module) -> tuple[Any, ...]:
    tensors = ((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters())
    return type(block), block.training, *tensors


@contextmanager
def _shortened(stack: nn.ModuleList, depth: int) -> Iterator[None]:
    blocks = stack._modules
    stack._modules = dict(list(blocks.items())[:depth])
    try:
        yield
    finally:
        stack._modules = blocks
