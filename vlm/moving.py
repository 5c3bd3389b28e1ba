"""Tensors that training changes without a gradient: momentum copies, queues, moving averages.

A system names its own in `moving` and `copies`, and writes them in `on_step_start` and `on_step_end`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlm.stages import matches


def moving_names(module: Any) -> set[str]:
    """Names of the parameters and stored buffers that a system moves itself, aliases left out."""
    names = module.state_dict().keys() - module.ties.keys()
    return {name for name in names if any(matches(pattern, name) for pattern in module.moving)}


def check_moving(module: Any) -> set[str]:
    """`moving_names` of a system, whose declarations have to name tensors that it has."""
    names = module.state_dict().keys()
    idle = [pattern for pattern in (*module.moving, *module.copies) if not any(matches(pattern, n) for n in names)]
    assert not idle, f"{type(module).__name__}: {idle} of `moving` or `copies` name no tensor"
    lost = copied_names(names - module.ties.keys(), module.copies).values() - names
    assert not lost, f"{type(module).__name__}: `copies` of {sorted(lost)}, which are not there"
    return moving_names(module)


def changing_names(module: Any) -> set[str]:
    """Names of all tensors that training changes: what checkpoints and artefacts hold."""
    return module.trained_names() | moving_names(module)


def copied_names(names: Iterable[str], copies: Mapping[str, str]) -> dict[str, str]:
    """{tensor: the tensor that it is a copy of}, of those among `names` that lie below a prefix of `copies`."""
    return {
        name: origin + name[len(copy) :] for name in names for copy, origin in copies.items() if matches(copy, name)
    }


def copied_layers(module: nn.Module) -> dict[str, str]:
    """{tensor: the tensor that it starts as a copy of}, of layers that surgery puts beside another (`starts_as`)."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        f"{path}.{name}": names[id(layer.starts_as.get_parameter(name))]
        for path, child in module.named_modules()
        # of an adapter, what it lies over
        if isinstance(getattr(layer := getattr(child, "base_layer", child), "starts_as", None), nn.Module)
        for name, _ in child.named_parameters(recurse=False)
    }


def update_copies(module: Any, momentum: float) -> None:
    """`copy = momentum * copy + (1 - momentum) * origin` for every parameter of a system's `copies`.

    Called in `on_step_start` (He et al., 2020: momentum contrast).
    """
    parameters = dict(module.named_parameters())
    pairs = copied_names(parameters, module.copies)
    assert not module.is_sharded or all(isinstance(parameters[name], DTensor) for name in pairs), (
        "momentum copies are updated while their system is gathered, where it would be lost; do it in `on_step_start`"
    )
    move_towards((parameters[n] for n in pairs), (parameters[n] for n in pairs.values()), share=1 - momentum)


@torch.no_grad()
def move_towards(tensors: Iterable[Tensor], goals: Iterable[Tensor], *, share: float) -> None:
    """Moves each tensor a share of the way to its goal; of sharded ones each rank moves its own part."""
    mine = [_local(tensor) for tensor in tensors]
    if mine:
        torch._foreach_lerp_(mine, [_local(goal) for goal in goals], share)


@torch.no_grad()
def exchange(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> None:
    """Puts the values of each pair in the place of one another."""
    for tensor, other in zip(tensors, others, strict=True):
        mine, theirs = _local(tensor), _local(other)
        held = mine.clone()
        mine.copy_(theirs)
        theirs.copy_(held)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
