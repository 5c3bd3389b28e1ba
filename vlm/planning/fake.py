"""Tensors with a shape, a dtype and no memory in the place of a system's weights and of a pack."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlm.batch import Batch


def fakes() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def fake_weights(module: nn.Module, *, dtype: torch.dtype | None = None) -> Iterator[set[int]]:
    """Inside, every tensor of `module` is a fake one, and what is trained has a gradient to add to.

    Gives the storages of all of them.

    Args:
        dtype: of the parameters, where it is not their own.
    """
    held = [(child, dict(child._parameters), dict(child._buffers)) for child in module.modules()]
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            kept = dtype if dtype is not None and isinstance(tensor, nn.Parameter) else tensor.dtype
            copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kept, device="cpu")
            if isinstance(tensor, nn.Parameter):
                copy = nn.Parameter(copy, requires_grad=tensor.requires_grad)
                copy.grad = torch.empty_like(copy) if tensor.requires_grad else None
            made[id(tensor)] = copy
        return made[id(tensor)]

    try:
        for child, parameters, buffers in held:
            child._parameters.update({name: fake(p) for name, p in parameters.items() if p is not None})
            child._buffers.update({name: fake(b) for name, b in buffers.items() if b is not None})
        gradients = [tensor.grad for tensor in made.values() if tensor.grad is not None]
        yield {tensor.untyped_storage()._cdata for tensor in (*made.values(), *gradients)}
    finally:
        for child, parameters, buffers in held:
            child._parameters.update(parameters)
            child._buffers.update(buffers)


def fake_batch(batch: Batch) -> Batch:
    """A pack of fake tensors. The bounds of its sequences stay real: attention costs what its true lengths say."""
    return _fake(batch)


def _fake(value: Any, name: str = "") -> Any:
    if isinstance(value, Tensor):
        return value if name.startswith("cu_seqlens") else torch.empty(value.shape, dtype=value.dtype)
    if isinstance(value, dict):
        return {key: _fake(item) for key, item in value.items()}
    if isinstance(value, tuple) and not value:
        return value
    if is_dataclass(value) and not isinstance(value, type):
        tensors = {f.name: _fake(getattr(value, f.name), f.name) for f in fields(value)}
        return replace(value, **tensors)
    return value
