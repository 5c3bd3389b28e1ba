"""Frozen weights kept in the type that the network computes in."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from vlm.building.network import tie
from vlm.errors import UserError
from vlm.language.tokens import ExtendedHead
from vlm.moving import moving_names

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""{precision of a trainer: the type that its autocast computes in}."""

_ROUNDED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weights autocast rounds before each use."""


def compute_dtype(module: Any) -> torch.dtype | None:
    """What autocast computes in, the trainer's or, without one, the network's own; None where it does not cast."""
    trainer = module._trainer
    return module.computes_in if trainer is None else AUTOCAST.get(str(trainer.precision))


def keep_frozen_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Has frozen weights of linear layers and convolutions take half of the memory, and computes the same numbers.

    Autocast rounds them before each use, so here they are rounded once. Norms, tables of embeddings and of positions,
    which it computes with in float32, stay as they are, and so does what is trained or moves, and a head whose rows new
    tokens start from.

    Args:
        module: its parameters on the meta device, what is trained decided.
    """
    layers = [getattr(child, "base_layer", child) for child in module.modules()]  # of an adapter, what it adapts
    moving = moving_names(module)
    kept = {id(p) for name, p in module.named_parameters() if p.requires_grad or name in moving}
    for layer in layers:
        if not isinstance(layer, _ROUNDED) or isinstance(layer, ExtendedHead):
            kept |= {id(parameter) for parameter in layer._parameters.values()}
    for layer in layers:
        if isinstance(layer, _ROUNDED):
            for name, parameter in layer._parameters.items():
                if parameter is None or getattr(parameter, "stays_empty", False):  # kept in a form of its own
                    continue
                if id(parameter) not in kept and parameter.is_floating_point():
                    layer._parameters[name] = nn.Parameter(parameter.to(dtype), requires_grad=False)


def round_weights(module: Any, precision: str) -> None:
    """Keeps weights of a sharded network in the type that they are gathered in, as far as `precision` says.

    Args:
        module: its parameters on the meta device, what is trained decided.
        precision: `32-true`: nothing; `bf16-mixed`: frozen weights of linear layers and convolutions; `bf16-true`: what
            is trained too.
    """
    if precision == "32-true":
        return
    keep_frozen_in(module, torch.bfloat16)
    if precision == "bf16-true":
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.to(torch.bfloat16)
    tie(module, module.ties)


def check_precision(module: Any) -> None:
    """Refuses another trainer that would compute in another type than a network was built for.

    Raises:
        UserError: it would.
    """
    if module.frozen_dtype is not None and module._trainer is not None and compute_dtype(module) != module.frozen_dtype:
        built = next(name for name, dtype in AUTOCAST.items() if dtype is module.frozen_dtype)
        raise UserError(
            f"trainer.precision: {module._trainer.precision}: this network was built under {built} and keeps its "
            "frozen weights in that type; use the same precision, or load it anew with vlm.load"
        )


def autocast(module: Any) -> AbstractContextManager[None]:
    """Computes as the trainer does, for a network that keeps its frozen weights in that type; else changes nothing."""
    if module.frozen_dtype is None:
        return nullcontext()
    return torch.autocast(next(module.parameters()).device.type, module.frozen_dtype)  # type: ignore[return-value]
