"""Deep stacks of equal blocks are run with a few of them: each block more costs what the one before it did."""

from collections.abc import Callable, Iterator, Mapping
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

    def line(a: Mapping[Any, int], b: Mapping[Any, int]) -> dict[Any, int]:
        return {k: max(0, round(a.get(k, 0) + way * (b.get(k, 0) - a.get(k, 0)))) for k in {**a, **b}}

    # moment by moment: which one is the worst may change on the way
    moments = {m: line(first.moments.get(m, {}), alive) for m, alive in second.moments.items()}
    return PackCost(line(first.flops, second.flops), moments, line(first.kept, second.kept))


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
