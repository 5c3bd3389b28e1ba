"""GPUs: how much they hold and how fast they are."""

from dataclasses import dataclass
from typing import Literal

import torch

from vlm.errors import UserError

GIB = 1024**3
Strategy = Literal["ddp", "fsdp2"]


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: for people.
        memory: bytes that a process can have, as the driver reports them.
        flops: peak of dense bfloat16 products with float32 sums, per second; None: not known.
    """

    name: str
    memory: int
    flops: float | None = None


_RTX = Gpu("24 GB (RTX 4090)", int(23.5 * GIB), 165e12)
_A100_40 = Gpu("40 GB (A100)", int(39.4 * GIB), 312e12)
_A100 = Gpu("80 GB (A100)", int(79.1 * GIB), 312e12)
_H100 = Gpu("80 GB (H100)", int(79.1 * GIB), 989e12)
_H200 = Gpu("141 GB (H200)", int(139.8 * GIB), 989e12)
GPUS = {
    "24": _RTX,
    "4090": _RTX,
    "40": _A100_40,
    "80": _A100,
    "a100": _A100,
    "h100": _H100,
    "141": _H200,
    "h200": _H200,
}
"""By class in GB, or by name."""

CONTEXT = int(0.7 * GIB)
"""What CUDA and its libraries take."""
SLACK = 0.04
"""Share of a GPU's memory that the allocator loses between tensors of changing sizes: an assumption."""


def find_gpu(name: str) -> Gpu:
    """A GPU by its class in GB, its name, or a number of GiB.

    Raises:
        UserError: it is none of them.
    """
    if (found := GPUS.get(name.lower().removesuffix("gb").strip())) is not None:
        return found
    try:
        size = float(name.lower().removesuffix("gib"))
    except ValueError:
        size = 0.0
    if not 1 <= size <= 2000:
        raise UserError(f"--gpu {name}: one of {', '.join(GPUS)}, or a number of GiB")
    return Gpu(f"{size:g} GiB", int(size * GIB))


@dataclass(frozen=True)
class Sharing:
    """What `fsdp2` is told (`callbacks.FSDP2Strategy`, `callbacks.MixedPrecisionFSDP`).

    Attributes:
        precision: of `MixedPrecisionFSDP`.
        ranks: that share one copy of the network; None: all.
        reduces_each: gradients are summed over the ranks with each micro-batch, and not once in a step.
        cpu_offload: shards are in the host's memory.
    """

    precision: str = "bf16-mixed"
    ranks: int | None = None
    reduces_each: bool = False
    cpu_offload: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of what is gathered."""
        return torch.float32 if self.precision == "32-true" else torch.bfloat16


@dataclass(frozen=True)
class Machine:
    """Where a stage runs.

    Attributes:
        gpu: of each rank.
        devices: how many.
        strategy: how they share the work.
        sharing: of `fsdp2`.
    """

    gpu: Gpu
    devices: int = 1
    strategy: Strategy = "ddp"
    sharing: Sharing = Sharing()

    @property
    def shards(self) -> int:
        """How many ranks share one copy of the network."""
        return min(self.sharing.ranks or self.devices, self.devices) if self.strategy == "fsdp2" else 1

    @property
    def usable(self) -> int:
        """Bytes for tensors."""
        return int(self.gpu.memory * (1 - SLACK)) - CONTEXT
