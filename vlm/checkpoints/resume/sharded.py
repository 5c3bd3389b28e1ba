"""Checkpoints of sharded runs: a folder to which every rank adds its rows.

::

    step=500.ckpt/
      state.pt                            the checkpoint, a mark in the place of each sharded tensor
      rank-00001-of-00008.safetensors     that rank's rows of the sharded tensors (those of which it has any)

Tensors are cut along their first dimension in the order of the ranks, so that any number of ranks can read the rows it
needs. Nothing in the folder can run code.
"""

import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from vlm.checkpoints.files.atomic import explain_full_disk
from vlm.checkpoints.files.parts import own_rows
from vlm.checkpoints.files.writing import write_safetensors
from vlm.checkpoints.resume.background import copy_to_host
from vlm.checkpoints.resume.plain import check_plain
from vlm.errors import UserError

STATE = "state.pt"
_MARK = "sharded tensor"
_FORMAT = 1


@dataclass(frozen=True)
class _Rows:
    """This rank's rows of a sharded tensor, copied to the CPU."""

    local: Tensor
    shape: torch.Size
    placements: tuple[Any, ...]

    def to_local(self) -> Tensor:
        return self.local


def copy_shard(checkpoint: Any) -> Any:
    """A copy on the CPU of what this rank holds of a checkpoint, which the two functions below write like itself."""

    def copy(key: str, tensor: DTensor | _Rows) -> _Rows:
        return _Rows(copy_to_host(tensor.to_local()), tensor.shape, tuple(tensor.placements))

    return copy_to_host(_replace(checkpoint, copy))


def write_shard(folder: Path, checkpoint: Any, *, rank: int, world: int) -> None:
    """Writes the rows that this rank holds of every sharded tensor in a checkpoint.

    Raises:
        UserError: the disk is full.
    """
    rows: dict[str, Tensor] = {}

    def collect(key: str, tensor: DTensor | _Rows) -> None:
        assert tensor.placements[-1] == Shard(0), f"{key} is placed as {tensor.placements}"
        if (local := tensor.to_local()).shape[0]:
            rows[key] = local

    _replace(checkpoint, collect)
    write_safetensors(folder / _name(rank, world), rows.items())


def write_state(folder: Path, checkpoint: Any, *, world: int) -> None:
    """Writes everything but the sharded tensors; one rank does.

    Raises:
        UserError: the disk is full, or the state holds something that a resume would refuse to read.
    """
    plain = _replace(checkpoint, lambda key, tensor: {_MARK: key, "shape": list(tensor.shape)})
    check_plain(plain)
    with explain_full_disk(folder), open(folder / STATE, "wb") as file:
        torch.save({"format": _FORMAT, "world": world, "checkpoint": plain}, file)
        file.flush()
        os.fsync(file.fileno())


def read_sharded(folder: str | Path, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """The checkpoint, its sharded tensors cut for this rank of `mesh`; without a mesh they are put together.

    Raises:
        UserError: a file is missing or damaged.
    """
    folder = Path(folder)
    stored = _read_state(folder)
    with _RowFiles(folder, stored["world"]) as rows:

        def restore(key: str, shape: list[int]) -> Tensor:
            if mesh is None:
                return rows.read(key, 0, shape[0], shape)
            own = own_rows(shape[0], mesh)
            local = rows.read(key, own.start, own.stop, shape).to(mesh.device_type)
            stride = torch.empty(shape, device="meta").stride()
            placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
            return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

        return _restore(stored["checkpoint"], restore)


class ShardedFile:
    """A checkpoint whose tensors are put together one at a time, when they are asked for.

    Attributes:
        content: the checkpoint, a mark in the place of each sharded tensor.

    Raises:
        UserError: a file is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        stored = _read_state(Path(folder))
        self.content: dict[str, Any] = stored["checkpoint"]
        self._rows = _RowFiles(Path(folder), stored["world"])

    def read(self, value: Any) -> Tensor:
        """The tensor in the place of a mark; a plain tensor is itself."""
        return _restore(value, lambda key, shape: self._rows.read(key, 0, shape[0], shape))


def cut_like(value: Any, parameter: Tensor) -> Any:
    """This rank's part of a full tensor that belongs to a sharded parameter; everything else as it is."""
    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        stored = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no checkpoint ({STATE} is not there)") from error
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{folder / STATE}: is damaged ({reason}); resume from another checkpoint") from error
    if stored.get("format") != _FORMAT:
        raise UserError(
            f"{folder}: has format {stored.get('format')}, this version reads {_FORMAT}; update this package"
        )
    return stored


class _RowFiles:
    """The files of all ranks, read row by row."""

    def __init__(self, folder: Path, world: int) -> None:
        self.folder = folder
        try:
            self.files = [safetensors.safe_open(folder / _name(rank, world), framework="pt") for rank in range(world)]
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{folder}: is not complete ({error}); resume from another checkpoint") from error
        self.keys = [set(file.keys()) for file in self.files]

    def __enter__(self) -> "_RowFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.files.clear()  # and with them their memory maps

    def read(self, key: str, start: int, stop: int, shape: list[int]) -> Tensor:
        """Rows `start` to `stop` of a tensor of this shape."""
        slices = [file.get_slice(key) for file, keys in zip(self.files, self.keys, strict=True) if key in keys]
        bounds = [0, *itertools.accumulate(part.get_shape()[0] for part in slices)]
        if bounds[-1] != shape[0]:
            raise UserError(f"{self.folder}: has {bounds[-1]} of the {shape[0]} rows of {key}; resume from another one")
        parts = [
            part[max(start - first, 0) : min(stop, last) - first]
            for part, (first, last) in zip(slices, itertools.pairwise(bounds), strict=True)
            if first < stop and start < last
        ]
        if not parts:
            return slices[0][0:0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _name(rank: int, world: int) -> str:
    return f"rank-{rank:05}-of-{world:05}.safetensors"


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    return iter(value.items()) if isinstance(value, dict) else iter(enumerate(value))


def _replace(value: Any, make: Callable[[str, DTensor | _Rows], Any], key: str = "") -> Any:
    """A copy of a tree with `make(path, tensor)` in the place of each sharded tensor."""
    if isinstance(value, DTensor | _Rows):
        return make(key, value)
    if type(value) not in (dict, OrderedDict, list, tuple):
        return value
    made = [(name, _replace(item, make, f"{key}/{name}" if key else str(name))) for name, item in _children(value)]
    return type(value)(made) if isinstance(value, dict) else type(value)(item for _, item in made)


def _restore(value: Any, make: Callable[[str, list[int]], Tensor]) -> Any:
    """The inverse of `_replace`."""
    if type(value) not in (dict, OrderedDict, list, tuple):
        return value
    if isinstance(value, dict) and _MARK in value:
        return make(value[_MARK], value["shape"])
    made = [(name, _restore(item, make)) for name, item in _children(value)]
    return type(value)(made) if isinstance(value, dict) else type(value)(item for _, item in made)
