"""Writes `docs/sharding_plan.md`: what a rank holds of each system at paper size, cut for 8 and for 64 ranks.

python -m benchmarks.sharding_table

No arithmetic of its own: every network is built on the meta device and cut by `callbacks.MixedPrecisionFSDP` over
torch's fake process group, which has ranks and sends nothing; then the tensors of a rank are counted.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cli  # before torch: the package prepares what torch and lightning share
import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from callbacks import MixedPrecisionFSDP
from vlm.commands.plan import planners_of
from vlm.planning.machine import GIB
from vlm.planning.stage import Planner
from vlm.recipes.catalogue import systems

OUT = Path(__file__).parents[1] / "docs" / "sharding_plan.md"
WORLDS = (8, 64)
TEXT = """# What a rank holds

Made by `python -m benchmarks.sharding_table`: of each recipe the stage that trains most, at paper size, on the meta
device, cut by `callbacks.MixedPrecisionFSDP` (`bf16-mixed`) over 8 and over 64 ranks of torch's fake process group, and
counted. GiB of the rank that holds most, and in brackets by how much that is more than an even share: tables with fewer
rows than there are ranks lie on the first of them. With `ranks_per_shard_group: 8` any number of nodes of 8 has the
columns of 8 ranks. Units that are gathered, activations and the whole gradient of an accumulation come on top
(`vlm plan --devices 8 --trainer.strategy=fsdp2`, see [sharding.md](sharding.md)).

- weights: trained ones in float32, frozen ones of linear layers and convolutions in bfloat16
- states: gradients and AdamW's two moments of what is trained
- unit: the largest that is gathered at once, in bfloat16

"""


@dataclass(frozen=True)
class Share:
    """Bytes of one rank.

    Attributes:
        weights: of all parameters.
        states: gradients and moments.
        even_weights: what it would be if every tensor could be cut evenly; likewise `even_states`.
        units: how many are gathered by themselves.
        largest: of them, gathered.
    """

    weights: int
    states: int
    even_weights: float
    even_states: float
    units: int
    largest: int


@contextmanager
def fake_ranks(world: int) -> Iterator[DeviceMesh]:
    """A mesh of so many ranks, seen by the first, which holds most of every tensor."""
    distributed.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
    finally:
        distributed.destroy_process_group()


def share_of(module: Any, mesh: DeviceMesh) -> Share:
    """What a rank holds of a system that is built on the meta device, and is cut here."""
    MixedPrecisionFSDP().shard(module, mesh)
    held, whole, states, even = 0, 0, 0, 0
    for parameter in module.parameters():
        assert isinstance(parameter, DTensor), "something is not cut"
        mine, everything = parameter.to_local().nbytes, parameter.numel() * parameter.element_size()
        held, whole = held + mine, whole + everything
        if parameter.requires_grad:
            states, even = states + 3 * mine, even + 3 * everything
    units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
    return Share(
        weights=held,
        states=states,
        even_weights=whole / mesh.size(),
        even_states=even / mesh.size(),
        units=len(units),
        largest=max(2 * _own(unit) for unit in units),
    )


def _own(unit: Any) -> int:
    """Parameters of a unit that are in none below it."""
    below = {id(p) for m in unit.modules() if m is not unit and isinstance(m, FSDPModule) for p in m.parameters()}
    return sum(p.numel() for p in unit.parameters() if id(p) not in below)


def heaviest_of(system: str) -> tuple[Planner, int, int]:
    """The stage of a recipe that trains most, the first of several; how many parameters it trains and has."""
    stages = []
    options = argparse.Namespace(recipe=system, stage=None, demo=False, samples=1)
    for _, planner in planners_of(options, describe=cli._describe):
        parameters = list(planner.what.build().parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        stages.append((planner, trained, sum(p.numel() for p in parameters)))
    return max(stages, key=lambda stage: stage[1])


def main() -> None:
    torch.set_num_threads(1)
    columns = "".join(f" weights, {world} | states, {world} |" for world in WORLDS)
    rows = [f"| | stage | parameters | trained |{columns} units | unit |", "|---" * (6 + 2 * len(WORLDS)) + "|"]
    for system in systems():
        planner, trained, every = heaviest_of(system)
        cells = [system, planner.stage.name, f"{every / 1e6:,.0f} M", f"{trained / 1e6:,.0f} M"]
        for world in WORLDS:
            with fake_ranks(world) as mesh:
                share = share_of(planner.what.build(), mesh)
            cells += [
                f"{held / GIB:.2f} ({held / even - 1:+.1%})"
                for held, even in ((share.weights, share.even_weights), (share.states, share.even_states))
            ]
        rows.append(f"| {' | '.join(cells)} | {share.units} | {share.largest / GIB:.2f} |")
        print(rows[-1], flush=True)
    OUT.write_text(TEXT + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
