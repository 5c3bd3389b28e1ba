"""What to change where a stage does not fit, and what it would need then, by the same arithmetic."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from vlm.language import PeftAdapter
from vlm.planning.machine import GIB, Machine
from vlm.planning.memory import memory_of
from vlm.planning.packs import PackCosts
from vlm.planning.stage import Planner, StagePlan
from vlm.stages import AdamW, Stage, Trained

LORA = PeftAdapter(rank=64, alpha=128, dropout=0.05, parts="language")
QLORA = dataclasses.replace(LORA, quantize="language")
"""As in `configs/finetune/`."""
_MOST_DEVICES = 64
_EACH = "reduce_gradients: micro_batch"


class Change(NamedTuple):
    """Something to change.

    Attributes:
        name: as it is written.
        costs: of the network that it makes.
        machine: where that runs.
        optimizer: of what is trained.
    """

    name: str
    costs: PackCosts
    machine: Machine
    optimizer: AdamW

    def total(self, tokens: int) -> int:
        """Bytes of a rank with packs of so many tokens, of which a step has several."""
        return memory_of(self.costs.module, self.costs.of(tokens), self.machine, self.optimizer, accumulate=2).total


def advise(planner: Planner, plan: StagePlan) -> list[str]:
    """A line for each change that makes a stage fit, or for what it would lack yet; none where it fits.

    Every change keeps the published batch; each line gives the largest packs that fit with it.
    """
    if plan.fits:
        return []
    lines = [f"to fit     (each keeps the step of {plan.batch:,.0f} samples)"]
    return [*lines, *(f"  {change.name:<48} {_needs(planner, change)}" for change in changes(planner, plan))]


def changes(planner: Planner, plan: StagePlan) -> Iterator[Change]:
    """What can be changed, one thing after another; recomputation stays on from where it is switched on."""
    machine, stage = plan.machine, planner.what.stage
    recomputed, note = _recomputing(planner), ""
    costs = planner.build(machine, **recomputed)
    if recomputed:
        note = ", stage.recompute: {language: true}"
    yield Change(f"micro-batches{note}", costs, machine, stage.optimizer)
    if stage.optimizer.kind == "adamw" and not _is_sharded(machine):
        optimizer = dataclasses.replace(stage.optimizer, kind="adamw_8bit")
        yield Change(f"stage.optimizer.kind: adamw_8bit{note}", costs, machine, optimizer)
    if plan.parts["language"].trained:
        for name, adapter in (("lora", LORA), ("qlora", QLORA)):
            if name == "qlora" and _is_sharded(machine):
                continue
            adapters = planner.build(machine, **recomputed, stage=adapted(stage), surgery=[adapter])
            yield Change(f"configs/finetune/{name}.yaml{note}", adapters, machine, stage.optimizer)
    each = dataclasses.replace(machine.sharing, reduces_each=True)
    if _is_sharded(machine) and not machine.sharing.cpu_offload:
        in_host = dataclasses.replace(machine, sharing=dataclasses.replace(each, cpu_offload=True))
        yield Change(f"cpu_offload: true, {_EACH}{note}", costs, in_host, stage.optimizer)
    shared = dataclasses.replace(machine, devices=max(2, machine.devices), strategy="fsdp2", sharing=each)
    costs = planner.build(shared, **recomputed)
    while shared.devices < _MOST_DEVICES and not largest_pack(planner, Change("", costs, shared, stage.optimizer)):
        shared = dataclasses.replace(shared, devices=2 * shared.devices)
    yield Change(f"fsdp2, {_EACH}, on {shared.devices} devices{note}", costs, shared, stage.optimizer)


def adapted(stage: Stage) -> Stage:
    """The stage with adapters in the place of all that it trains, as `configs/finetune/` has it."""
    return dataclasses.replace(stage, train={"adapters": Trained(lr=2e-4)})


def _is_sharded(machine: Machine) -> bool:
    return machine.shards > 1


def _recomputing(planner: Planner) -> dict[str, Any]:
    """The language model with recomputation, where it has none yet."""
    language = planner.what.arguments.get("language")
    if getattr(language, "checkpointing", True):
        return {}
    return {"language": dataclasses.replace(language, checkpointing=True)}  # type: ignore[type-var]


def _needs(planner: Planner, change: Change) -> str:
    longest, mean = _longest(planner), sum(planner.samples.tokens) / len(planner.samples.items)
    most = largest_pack(planner, change)
    if not most:
        return f"{change.total(longest) / GIB:,.1f} GiB with the longest sample alone: too much"
    return f"{change.total(most) / GIB:,.1f} GiB with data.max_tokens: {most:,} ({most / mean:,.1f} samples a pack)"


def _longest(planner: Planner) -> int:
    return max(*planner.samples.tokens, planner.samples.longest)


def largest_pack(planner: Planner, change: Change) -> int:
    """Tokens of the largest pack that fits, at most those of a device's share of the step; 0: none does."""
    longest = _longest(planner)
    if change.total(longest) > change.machine.usable:
        return 0
    mean = sum(planner.samples.tokens) / len(planner.samples.items)
    low, high = longest, max(longest, round(mean * planner.batch / change.machine.devices)) + 1
    while high - low > 100:
        middle = (low + high) // 2
        low, high = (middle, high) if change.total(middle) <= change.machine.usable else (low, middle)
    return low
