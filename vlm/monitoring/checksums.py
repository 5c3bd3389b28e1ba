"""Whether tensors that nothing trains are still what they were."""

from collections.abc import Collection, Mapping, Sequence
from random import Random

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlm.checkpoints.files.identity import CHANGED, hash_tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FrozenTensors:
    """Parameters without gradients, and stored buffers of modules in eval mode, with a checksum of each.

    A checksum is the exact sum of a tensor's bits as integers: one pass on the device, the same in any order. Of a
    sharded tensor every rank sums its own part.

    Args:
        moving: names of tensors without gradients that are meant to change.
    """

    def __init__(self, module: nn.Module, *, moving: Collection[str] = ()) -> None:
        training = {path: child.training for path, child in module.named_modules()}
        self.tensors: dict[str, Tensor] = {
            name: tensor
            for name, tensor in module.state_dict(keep_vars=True).items()
            if not tensor.requires_grad
            and name not in moving
            and (isinstance(tensor, nn.Parameter) or not training.get(name.rpartition(".")[0], True))
        }
        self._sums = {name: checksum(tensor) for name, tensor in self.tensors.items()}

    def draw(self, count: int, random: Random) -> list[str]:
        """Names of at most `count` tensors of each part."""
        parts: dict[str, list[str]] = {}
        for name in self.tensors:
            parts.setdefault(name.split(".")[0], []).append(name)
        return [name for names in parts.values() for name in random.sample(names, min(count, len(names)))]

    def num_changed(self, names: Sequence[str], *, device: torch.device) -> Tensor:
        """int64[]: how many of them differ from the start; stays on the device."""
        if not names:
            return torch.zeros((), dtype=torch.int64, device=device)
        now = torch.stack([checksum(self.tensors[name]) for name in names])
        return (now != torch.stack([self._sums[name] for name in names])).sum()

    def changed(self) -> list[str]:
        """Names of all that differ from the start."""
        return [name for name, tensor in self.tensors.items() if not torch.equal(checksum(tensor), self._sums[name])]

    def differing(self, hashes: Mapping[str, str], *, is_judge: bool = True) -> list[str]:
        """Names of those whose content is not the one of `hashes`.

        What is kept in another type than float32, in which hashes are taken, or was changed after it was read, has its
        checksum alone.

        Args:
            is_judge: compare here. All ranks call it, since shards are gathered; one of them is enough to compare.
        """
        names = []
        for name, tensor in self.tensors.items():
            if name in hashes and tensor.dtype == torch.float32 and not hashes[name].startswith(CHANGED):
                full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if is_judge and hash_tensor(full.detach().cpu()) != hashes[name]:
                    names.append(name)
        return names


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """int64[]: sum of the bits of this rank's part, as integers of the element's width."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    return local.contiguous().view(_INTEGERS[local.element_size()]).sum(dtype=torch.int64)
