"""What a rank needs, part by part."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlm.planning.machine import Machine
from vlm.planning.parameters import optimizer_bytes, sizes_of, units_of
from vlm.planning.regions import HEAD, LOSS
from vlm.planning.step import COPIES, PASSING, PackCost
from vlm.stages import AdamW


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at the worst moment of a step.

    Attributes:
        fixed: {what: bytes} that is there whatever the pack: weights, gradients, optimizer, copies for sharding.
        pack: {what: bytes} of the pack: activations by part, logits, what the backward pass makes.
        host: {what: bytes} in the host's memory.
    """

    fixed: Mapping[str, int]
    pack: Mapping[str, int]
    host: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.fixed.values()) + sum(self.pack.values())


def memory_of(
    module: Any, cost: PackCost, machine: Machine, optimizer: AdamW | None = None, *, accumulate: int = 1
) -> Memory:
    """What a rank needs for a step.

    Args:
        module: built on the meta device.
        cost: of its heaviest pack.
        optimizer: in the place of the stage's own.
        accumulate: micro-batches of the step.
    """
    sizes = sizes_of(module).values()
    weights, gradients = sum(size.weights for size in sizes), sum(size.gradients for size in sizes)
    moments = optimizer_bytes(module, optimizer or module.stage.optimizer)
    averages = {} if module.averages is None else {"moving averages": 4 * sum(size.trained for size in sizes)}
    own = {"weights": weights, "gradients": gradients, "optimizer": moments, **averages}
    if machine.shards == 1:
        buckets = {"DDP's buckets": gradients} if machine.devices > 1 else {}
        return Memory(own | buckets, _by_part(cost, sharded=False))
    shards = {part: -(-size // machine.shards) for part, size in own.items()}
    sharing, units, each = machine.sharing, units_of(module), machine.sharing.dtype.itemsize
    # two units are there at once, the next one is fetched while one runs; gradients are summed in float32
    fixed = {"gathered": each * (units.root + units.two) + (each + 4) * units.two_trained}
    if accumulate > 1 and not sharing.reduces_each:
        fixed["gradients not yet shared"] = 4 * sum(size.trained for size in sizes)
    pack = _by_part(cost, sharded=True)
    return Memory(fixed, pack, host=shards) if sharing.cpu_offload else Memory(shards | fixed, pack)


def _by_part(cost: PackCost, *, sharded: bool) -> dict[str, int]:
    pack: dict[str, int] = {}
    for kind, size in cost.alive.items():
        if kind == COPIES:
            if not sharded:
                pack["weights in the compute dtype"] = size
        elif kind in (HEAD, LOSS):
            pack["logits"] = pack.get("logits", 0) + size
        elif kind == PASSING:
            pack["backward pass"] = size
        else:
            pack[f"activations of {kind}"] = size
    return pack
