"""The blocks of a network; their activations can be computed again in the backward pass instead of being kept.

A block then keeps its input alone, which is what lets a long row pass through a large network. transformers' own switch
acts in train mode only; a frozen language model is in eval mode, and yet the gradient of a connector below it passes
through. So it is decided here, for every network alike, by whether a gradient is wanted at all.
"""

import functools
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def stacked_blocks(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, block) of the outermost stacks. timm's are `Sequential`; plain layers in a row are no blocks."""
    members = list(module.named_children())
    is_stack = isinstance(module, (nn.ModuleList, nn.Sequential)) and all(list(m.children()) for _, m in members)
    for name, member in members:
        inner = f"{path}.{name}" if path else name
        if not is_stack:
            yield from stacked_blocks(member, inner)
        elif any(True for _ in member.parameters()):
            yield inner, member


def recompute_blocks(network: nn.Module) -> None:
    """Makes every block of `network` run again in the backward pass; call it after surgery and before sharding.

    Blocks stay what they are: their classes, their names, their hooks. `fully_shard` hooks stand around both runs, so
    that a block's parameters are gathered once for the backward pass.
    """
    for _, block in stacked_blocks(network):
        block.forward = MethodType(_recomputed, block)  # a method, so that a copy of the block runs the copy


def _recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(block).forward, block, **kwargs)
    if not torch.is_grad_enabled():
        return forward(*args)
    # the same dropout masks and autocast both times; nothing runs again where no gradient arrives
    return checkpoint(forward, *args, use_reentrant=False)
