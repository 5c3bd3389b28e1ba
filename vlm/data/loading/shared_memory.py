"""One step's tensors from a worker to the trainer in one piece of shared memory.

PyTorch sends every tensor through its own file descriptor. A step of 32 packs with 25 tensors each, two steps ahead on
eight workers, takes 12,800 of them, and the usual limit of a process is 1,024.
"""

import io
import pickle
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_ALIGN = 64


@dataclass(frozen=True)
class SharedTensors:
    """Attributes:

    content: pickle of everything but the tensors.
    places: per tensor (first byte in `data`, dtype, shape).
    data: uint8[bytes], shared.
    """

    content: bytes
    places: tuple[tuple[int, torch.dtype, tuple[int, ...]], ...]
    data: Tensor

    def pin_memory(self) -> "SharedTensors":
        """The same in memory that a GPU fetches by itself; torch's loader calls it on a thread of its own."""
        return replace(self, data=self.data.pin_memory())


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value.contiguous())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, parcel: SharedTensors) -> None:
        super().__init__(io.BytesIO(parcel.content))
        self.parcel = parcel

    def persistent_load(self, index: int) -> Tensor:
        start, dtype, shape = self.parcel.places[index]
        size = torch.Size(shape).numel() * dtype.itemsize
        return self.parcel.data[start : start + size].view(dtype).view(shape)


def to_shared(value: Any) -> SharedTensors:
    """Copies all CPU tensors inside `value` into one shared tensor."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    places, size = [], 0
    for tensor in pickler.tensors:
        places.append((size, tensor.dtype, tuple(tensor.shape)))
        size += -(-tensor.nbytes // _ALIGN) * _ALIGN
    data = torch.empty(size, dtype=torch.uint8).share_memory_()
    for tensor, (start, _, _) in zip(pickler.tensors, places, strict=True):
        data[start : start + tensor.nbytes] = tensor.view(-1).view(torch.uint8)
    return SharedTensors(file.getvalue(), tuple(places), data)


def from_shared(parcel: SharedTensors) -> Any:
    """What `wrap` was given; its tensors are views of the parcel's memory."""
    return _Unpickler(parcel).load()
