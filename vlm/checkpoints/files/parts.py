"""Tensors of which every rank has a part."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def gather(tensor: Tensor) -> Tensor:
    """The whole tensor, of whose parts every rank has one; any other tensor is itself."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copies a full tensor into `target`; of a sharded one each rank keeps its part."""
    if isinstance(target, DTensor):
        target.to_local().copy_(value[own_rows(len(value), target.device_mesh)])
    else:
        target.copy_(value)


def own_rows(count: int, mesh: DeviceMesh) -> slice:
    """Those of `count` rows that this rank keeps: cut as by `torch.chunk` over the last dimension of `mesh`."""
    shards = mesh.ndim - 1  # copies along a first dimension are the same
    each = -(-count // mesh.size(shards))
    start = min(mesh.get_local_rank(shards) * each, count)
    return slice(start, min(start + each, count))
