"""What a network consists of, and what its tensors take: asked of the tensors themselves."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from vlm.building.blocks import stacked_blocks
from vlm.language.quantized import packed_bytes
from vlm.stages import AdamW


@dataclass(frozen=True)
class PartSize:
    """One part of a system.

    Attributes:
        trained: parameters that take gradients; one that has several names counts once.
        frozen: all other parameters.
        weights: bytes of parameters and buffers as they are kept.
        gradients: bytes of gradients.
    """

    trained: int
    frozen: int
    weights: int
    gradients: int


def sizes_of(module: Any) -> dict[str, PartSize]:
    """{part: its size} of a built system; what is tied belongs to the first part that has it."""
    seen: set[int] = set()
    sizes = {}
    for name, part in _parts(module):
        parameters = [p for p in part.parameters() if id(p) not in seen]
        seen |= {id(p) for p in parameters}
        trained = [p for p in parameters if p.requires_grad]
        sizes[name] = PartSize(
            trained=sum(p.numel() for p in trained),
            frozen=sum(p.numel() for p in parameters if not p.requires_grad),
            weights=stored(parameters) + stored(part.buffers()),
            gradients=stored(trained),
        )
    return sizes


def _parts(module: Any) -> Iterable[tuple[str, nn.Module]]:
    yield from module.named_children()
    rest = nn.Module()
    rest._parameters, rest._buffers = dict(module._parameters), dict(module._buffers)
    if rest._parameters or rest._buffers:
        yield "own", rest


def stored(tensors: Iterable[Tensor]) -> int:
    """Bytes; of an empty place for a weight in 4 bits, those of the weight."""
    return sum(
        packed_bytes(t.numel()) if getattr(t, "stays_empty", False) else t.numel() * t.element_size() for t in tensors
    )


def optimizer_bytes(module: Any, optimizer: AdamW) -> int:
    """Of the moments of what is trained, in a GPU's memory."""
    kind = optimizer.kind
    if kind == "paged_adamw_8bit":  # moved to the host when there is no room
        return 0
    trained = [p for p in module.parameters() if p.requires_grad]
    if kind == "adamw":
        return 2 * stored(trained)
    return sum(
        2 * p.numel() * 4 if p.numel() < _WHOLE else 2 * (p.numel() + -(-p.numel() // _BLOCK) * 4) for p in trained
    )


_WHOLE, _BLOCK = 4096, 256
"""Of bitsandbytes: smaller tensors have moments in float32; elements of a block share a factor in float32."""


@dataclass(frozen=True)
class Units:
    """How FSDP2 cuts a network: sizes in numbers of parameters.

    Attributes:
        two: of two that are there at once, one after the other: blocks, an embedding table, a head.
        two_trained: the same of what is trained.
        root: what is in no unit of its own.
    """

    two: int
    two_trained: int
    root: int


def units_of(module: Any) -> Units:
    """The units of a built system, as `callbacks.MixedPrecisionFSDP` makes them."""
    tables = [
        layer
        for part in module.children()
        if hasattr(part, "get_output_embeddings")
        for layer in (part.get_input_embeddings(), part.get_output_embeddings())
        if layer is not None
    ]
    found = {id(unit) for unit in (*(block for _, block in stacked_blocks(module)), *tables)}
    units = [unit for unit in module.modules() if id(unit) in found]  # as they run
    counts = [sum(p.numel() for p in unit.parameters()) for unit in units]
    trained = [sum(p.numel() for p in unit.parameters() if p.requires_grad) for unit in units]
    held = {id(p) for unit in units for p in unit.parameters()}
    root = sum(p.numel() for p in module.parameters() if id(p) not in held)
    return Units(_two_in_a_row(counts), _two_in_a_row(trained), root)


def _two_in_a_row(sizes: Sequence[int]) -> int:
    return max((a + b for a, b in pairwise([*sizes, 0])), default=0)
