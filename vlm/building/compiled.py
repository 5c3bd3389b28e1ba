"""Blocks compiled by torch, each for itself: their norms, activations and sums become few kernels."""

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch

from vlm.building.blocks import is_recomputed, run_block, stacked_blocks
from vlm.errors import UserError
from vlm.vision import TowerDescription

_VERSIONS = 32
"""Of the code of one class of blocks: in a tower and a language model, frozen and trained, with and without images."""


def compile_blocks(module: Any, *, parts: Iterable[str], backend: str) -> dict[str, int]:
    """Has the blocks of some parts run compiled, recomputed ones too; call it before sharding.

    Blocks stay what they are: their classes, their names, their hooks. All blocks of a class share their code, for rows
    of any length. Attention over packed rows stays one call between compiled pieces (`vlm.language.attention`). Blocks
    of towers run compiled always, others only where a gradient is wanted: answers, whose rows grow token by token, are
    searched for as before.

    Returns:
        {part: number of its blocks}.

    Raises:
        UserError: a part without blocks, or weights that are kept in 4 bits.
    """
    known: dict[str, list[Any]] = {part: [b for _, b in stacked_blocks(net)] for part, net in module.named_children()}
    known = {part: blocks for part, blocks in known.items() if blocks}
    for part in parts:
        if part not in known:
            raise UserError(f"callbacks.CompiledBlocks: {part!r} has no blocks; these parts do: {', '.join(known)}")
        if any(getattr(p, "stays_empty", False) for p in module.get_submodule(part).parameters()):
            raise UserError(
                f"callbacks.CompiledBlocks: {part} keeps weights in 4 bits, which torch does not compile; leave it out"
            )
    torch._dynamo.config.recompile_limit = _VERSIONS
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else torch goes on uncompiled, without a word
    compiled: dict[Callable, Callable] = {}
    for part in parts:
        for block in known[part]:
            forward = type(block).forward
            if forward not in compiled:
                compiled[forward] = torch.compile(forward, dynamic=True, backend=backend)
            block.compiled = compiled[forward]
            block.compiled_without_gradients = isinstance(module.arguments.get(part), TowerDescription)
            if not is_recomputed(block):
                block.forward = MethodType(run_block, block)  # a method, so that a copy of the block runs the copy
    return {part: len(known[part]) for part in parts}
