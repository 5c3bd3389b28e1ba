"""What makes the host wait for a GPU, found without one.

A system whose tensors lie on the meta device cannot give a value to Python, so a forward and backward pass that runs
there reads none (`no_copies` finds what travels). A run on the CPU notes every read (`HostReads`).
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "cpu", "numpy")
} | {torch.equal, torch.nonzero, Tensor.nonzero, torch.unique, Tensor.unique, torch.masked_select, torch.is_nonzero}
_MAKES = {torch.tensor, torch.as_tensor, Tensor.new_tensor}
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class HostReads(TorchFunctionMode):
    """Inside, notes in `found` where Python asks a tensor for a value: the calls that led there, the last one first."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS or (func in (Tensor.__getitem__, Tensor.__setitem__) and _masks(args[1])):
            calls = reversed(traceback.extract_stack(limit=7)[:-1])
            self.found.append(" < ".join(f"{call.filename}:{call.lineno}" for call in calls))
        return func(*args, **(kwargs or {}))


def _masks(index: Any) -> bool:
    """Whether the host has to count what an index chooses."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


class _Copies(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _COPIES and out.is_meta:
            given = [tensor for tensor in tree_leaves(args) if isinstance(tensor, Tensor)]
            waits = not (
                (kwargs or {}).get("non_blocking") or (func is torch.ops.aten.copy_.default and args[2:] == (True,))
            )
            assert not waits or all(tensor.is_meta for tensor in given), "the host waits until a copy has arrived"
        return out


class _Made(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        assert func not in _MAKES or not out.is_meta, f"{func.__name__} waits until a number has arrived"
        return out


@contextmanager
def no_copies() -> Iterator[None]:
    """Inside, what goes from the host to the meta device, and the host would wait for, fails the test."""
    with _Copies(), _Made():
        yield
