"""The blocks of a network; their activations can be computed again in the backward pass instead of being kept.

A block then keeps its input alone, which is what lets a long row pass through a large network. transformers' own switch
acts in train mode only; a frozen language model is in eval mode, and yet the gradient of a connector below it passes
through. So it is decided here, for every network alike, by whether a gradient is wanted at all.
"""

import functools
from collections.abc import Iterator
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlm.errors import UserError


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


def recompute_blocks(network: nn.Module, *, every: int) -> None:
    """Makes every n-th block of `network` run again in the backward pass; call it after surgery and before sharding.

    Blocks stay what they are: their classes, their names, their hooks. `fully_shard` hooks stand around both runs, so
    that a block's parameters are gathered once for the backward pass.
    """
    for _, block in list(stacked_blocks(network))[::every]:
        block.forward = MethodType(_recomputed, block)  # a method, so that a copy of the block runs the copy


def is_recomputed(block: nn.Module) -> bool:
    """Whether `recompute_blocks` was asked for this block."""
    return getattr(vars(block).get("forward"), "__func__", None) is _recomputed


def recomputed_parts(module: Any) -> dict[str, int]:
    """{part: n}, where every n-th block runs again: as its description says, or the stage in its place.

    Raises:
        UserError: a number below 0, or a pattern of `stage.recompute` that fits no part with blocks.
    """
    words = {part: getattr(module.arguments.get(part), "checkpointing", False) for part, _ in module.named_children()}
    blocks = {part for part, network in module.named_children() if any(True for _ in stacked_blocks(network))}
    for pattern, word in module.stage.recompute.items() if module.stage is not None else ():
        fitting = [part for part in words if part in blocks and fnmatchcase(part, pattern)]
        if not fitting:
            raise UserError(
                f"stage.recompute: {pattern!r} fits no part with blocks; these are {', '.join(sorted(blocks))}"
            )
        words.update(dict.fromkeys(fitting, word))
    for part, word in words.items():
        if word < 0:
            raise UserError(f"recomputation of {part}: true, false, or n for every n-th block; found {word}")
    return {part: int(word) for part, word in words.items() if word}


def run_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A block as its class says, or compiled (`vlm.building.compiled`)."""
    compiled = vars(block).get("compiled")
    if compiled is None or not (torch.is_grad_enabled() or vars(block)["compiled_without_gradients"]):
        return type(block).forward(block, *args, **kwargs)
    return compiled(block, *args, **kwargs)


def _recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(run_block, block, **kwargs)
    if not torch.is_grad_enabled():
        return forward(*args)
    # the same dropout masks and autocast both times; nothing runs again where no gradient arrives
    return checkpoint(forward, *args, use_reentrant=False)
