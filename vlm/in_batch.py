"""Objectives that compare the samples of a batch with each other: contrast, and matching with hard negatives.

What is compared is part of the objective, so it is published, not chosen by how many devices there are
(`vlm.data.BatchSpec.negatives`). A pack is a published rank:

    negatives: pack    candidates are the samples of the pack; packs of a step may follow each other on one device
    negatives: step    candidates are the samples of all packs; each device has one pack, and they are gathered
"""

import torch
from torch import Tensor, distributed
from torch.autograd.function import FunctionCtx, once_differentiable

from vlm.batch import Batch


def candidates(values: Tensor, batch: Batch, *, gradient: bool = False) -> Tensor:
    """What the samples of a pack are compared with: per-sample [B, ...] as [C, ...].

    With `negatives: pack` these are the values themselves. With `negatives: step` they are those of all packs, without
    a gradient (as published for contrast: a feature is trained where it asks, not where it is a candidate) or with one.

    Args:
        values: of features, ids, or masks such as `Batch.real`; equally many on every rank.
        gradient: into the values of other packs too.
    """
    if batch.negatives != "step":
        return values
    return gather_with_gradient(values) if gradient else gather_detached(values)


def own_places(batch: Batch) -> Tensor:
    """int64[B]: where each sample of the pack stands among its candidates."""
    size = len(batch.real)
    start = batch.pack * size if batch.negatives == "step" else 0
    return torch.arange(start, start + size, device=batch.real.device)


def draw_uniform(batch: Batch, number: int = 1) -> Tensor:
    """float32[B, number] in [0, 1), for choices by chance: a sample draws the same however its step is shared."""
    size = len(batch.real)
    start = 0 if batch.seed is None else batch.pack * size
    generator = torch.Generator().manual_seed(batch.seed or 0)
    return torch.rand(start + size, number, generator=generator)[start:].to(batch.real.device, non_blocking=True)


def gather_detached(values: Tensor) -> Tensor:
    """[B, ...] of each rank as [world * B, ...], in the order of the ranks and without a gradient.

    On one rank too: so several ranks train what one process with all samples trains.
    """
    values = values.detach()
    return _gather(values) if _world() > 1 else values


def gather_with_gradient(values: Tensor) -> Tensor:
    """As `gather_detached`, with a gradient: each rank gets the sum of what all ranks send back to its values."""
    return _Gather.apply(values) if _world() > 1 else values


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor) -> Tensor:
        return _gather(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        own = gradient.new_empty((len(gradient) // _world(), *gradient.shape[1:]))
        distributed.reduce_scatter(own, list(gradient.contiguous().chunk(_world())))
        return own


def _gather(values: Tensor) -> Tensor:
    if values.dtype == torch.bool:  # of which no backend speaks
        return _gather(values.to(torch.uint8)).to(torch.bool)
    everywhere = values.new_empty((_world() * len(values), *values.shape[1:]))
    distributed.all_gather(list(everywhere.chunk(_world())), values.contiguous())
    return everywhere


def _world() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
