"""The plan of one stage: what it reads, trains, computes and holds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vlm.building.inherited_surgery import PlannedSurgery
from vlm.building.precision import AUTOCAST, keep_frozen_in, round_weights
from vlm.data import VisionLanguageData
from vlm.planning.downloads import Download, downloads_of
from vlm.planning.machine import Machine
from vlm.planning.memory import Memory, memory_of
from vlm.planning.packs import PackCosts, Packing, Precision, packing_of
from vlm.planning.parameters import PartSize, sizes_of, stored
from vlm.planning.samples import LOOKED_AT, Samples, per_step, samples_of
from vlm.planning.system import Described, described
from vlm.stages import Stage

WHOLE = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


@dataclass(frozen=True)
class Run:
    """What the trainer is told.

    Attributes:
        precision: as Lightning names it.
        max_epochs: None or -1: no limit.
        max_steps: -1: no limit.
        accumulate: micro-batches of a step, 1 where the data decides.
    """

    precision: str = "32-true"
    max_epochs: int | None = 1
    max_steps: int = -1
    accumulate: int = 1


@dataclass(frozen=True)
class StagePlan:
    """What a stage takes.

    Attributes:
        name: system and stage.
        samples: what it is fed with.
        packing: how a step is shared.
        batch: samples of a step.
        steps: of the whole stage; None: the number of samples is not known.
        parts: parameters by part.
        flops: of an average sample, {(region, pass): number}.
        memory: of a rank.
        machine: where.
        save: {what: bytes on the disk}.
        downloads: base weights.
        notes: what was assumed or could not be known.
    """

    name: str
    samples: Samples
    packing: Packing
    batch: float
    steps: int | None
    parts: Mapping[str, PartSize]
    flops: Mapping[tuple[str, str], float]
    memory: Memory
    machine: Machine
    save: Mapping[str, int]
    downloads: Sequence[Download]
    notes: Sequence[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.machine.usable

    @property
    def flops_per_sample(self) -> float:
        return sum(self.flops.values())

    def hours(self, *, per_second: float, utilization: float) -> float | None:
        """Of the whole stage on all devices."""
        if self.steps is None:
            return None
        total = self.flops_per_sample * self.batch * self.steps
        return total / (per_second * utilization * self.machine.devices) / 3600


@dataclass
class Planner:
    """Plans a stage, and variants of it on the same samples.

    Args:
        module: as configured, not built; callbacks have registered their surgery.
        stage: what it trains.
        planned: what earlier stages of a recipe will have done to the network.
    """

    module: Any
    stage: Stage
    data: VisionLanguageData
    run: Run
    looked_at: int = LOOKED_AT
    planned: Sequence[PlannedSurgery] = ()

    def __post_init__(self) -> None:
        self.what: Described = described(self.module, self.stage, self.planned)
        self.samples = samples_of(
            self.what.make().codec,
            self.data,
            system=self.module.system,
            stage=self.stage.name,
            looked_at=self.looked_at,
        )

    def plan(self, machine: Machine, **changes: Any) -> StagePlan:
        """The plan; `changes` to the system as in `Described.make`."""
        return self._plan_of(self.build(machine, **changes), machine)

    def build(self, machine: Machine, **changes: Any) -> PackCosts:
        """The network, ready to be asked what packs cost."""
        network = self.what.build(**changes)
        precision = self._precision(network, machine)
        return PackCosts(network, self.samples, precision)

    def _plan_of(self, costs: PackCosts, machine: Machine) -> StagePlan:
        network, run = costs.module, self.run
        packing = packing_of(self.data, self.samples, devices=machine.devices, accumulate=run.accumulate)
        trained = stored(p for p in network.parameters() if p.requires_grad)
        return StagePlan(
            name=f"{network.system} {self.stage.name}",
            samples=self.samples,
            packing=packing,
            batch=self.batch,
            steps=self._steps(),
            parts=sizes_of(network),
            flops=costs.per_sample(packing.tokens),
            memory=memory_of(network, costs.of(packing.tokens), machine, accumulate=packing.accumulate),
            machine=machine,
            save={"checkpoint": 3 * trained, "artefact": trained},
            downloads=downloads_of(self.what),
            notes=[*self.what.notes, *self._missing_tokenizer(), *self.samples.notes],
        )

    @property
    def batch(self) -> float:
        """Samples of a step."""
        return per_step(self.data, self.samples)

    def _steps(self) -> int | None:
        run, each = self.run, self.samples.steps
        epochs = math.inf if run.max_epochs in (None, -1) else float(run.max_epochs or 0)
        if run.max_steps >= 0 and (each is None or run.max_steps <= epochs * each):
            return run.max_steps
        return None if each is None or math.isinf(epochs) else int(epochs * each)

    def _precision(self, network: Any, machine: Machine) -> Precision:
        if machine.shards > 1:
            round_weights(network, machine.sharing.precision)
            return Precision(weights=machine.sharing.dtype)
        if (dtype := WHOLE.get(self.run.precision)) is not None:
            network.to(dtype)
            return Precision()
        dtype = AUTOCAST.get(self.run.precision)
        if dtype is not None:
            keep_frozen_in(network, dtype)
        return Precision(autocast=dtype)

    def _missing_tokenizer(self) -> list[str]:
        path = self.what.tokenizer_path
        if path is None:
            return []
        return [f"tokenizer: {path} is not on this disk; texts are counted at about five letters a token"]
