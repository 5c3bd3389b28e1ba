"""The loader assembles one optimizer step at a time and hands it out pack by pack.

    draws of the step (seed, epoch, step)  ->  every rank encodes its share of them (text only)
      ->  the ranks tell each other how large the samples are, some steps ahead
      ->  counts of the whole step, its packs (balanced by true token count where samples never meet)
      ->  each rank sends what it has encoded to the rank that was dealt it
      ->  this rank decodes the images of its own packs: pack p is micro-batch p // world of rank p % world

So the samples of a step, their random choices and the denominators of its loss are the same however many devices and
micro-batches share it, and what a rank does for a step does not grow with the number of ranks. A rank that has nobody
to ask encodes all of the step itself; the packs are the same.

Where bad samples may be left out (`max_bad_samples`), an image that cannot be decoded is met by one rank alone. So the
ranks tell each other, step by step, which samples they could not read; if there are any, all of them make the step
again without these. The step is then the one that it would be if these samples were not in the plan.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from vlm.batch import Batch
from vlm.data.loading.encoder import Encoder
from vlm.data.loading.opaque import OpaqueBatch
from vlm.data.loading.rank_gather import Gather
from vlm.data.loading.shared_memory import SharedTensors, from_shared
from vlm.data.loading.step_dataset import Measured, Step, StepDataset, StepPacks
from vlm.data.loading.step_sampler import Asking, Plan, StepSampler
from vlm.data.loading.workers import worker_context
from vlm.data.sampling.packs import Packing
from vlm.data.wrappers.quarantine import LeftOut
from vlm.errors import SampleError, UserError


class LoopPosition(Protocol):
    """What the loader asks of, and tells, the loop that trains on its packs."""

    def trained(self) -> int:
        """Packs of this epoch that have been trained on."""

    def begin_epoch(self, packs: int) -> None:
        """The epoch that starts has this many packs."""

    def resume(self, packs: int, *, total: int, mid_step: bool) -> None:
        """The loader continues after `packs` of the epoch's `total`, at the start of a step."""


class StepLoader(DataLoader):
    """Packs of this rank, `accumulate` to a step.

    The state counts whole optimizer steps, so a run resumes under another number of devices or another `accumulate`
    with the right step. A checkpoint written in the middle of an accumulation window (a time interval, an exception)
    restarts its window: its gradients were never stored, so all its micro-batches have to be computed again.

    Iterating a complete epoch again yields nothing until `sampler.set_epoch` names another one.

    Args:
        plan: the steps of each epoch.
        world: data-parallel ranks; `rank` is this one.
        accumulate: micro-batches to a step.
        packing: what a pack may hold.
        fixed: every pass is the same, from the start (validation).
        identity: what must not change between a checkpoint and its resume, by the name of the setting.
        progress: the loop to keep in step with; without one, packs count as trained when handed out.
        sealed: packs arrive as `OpaqueBatch`, for a Lightning loop.
        max_bad_samples: different bad samples that are noted and left out of their steps; one more is an error.
        gather: how the ranks tell each other about the samples of a step; without it a rank encodes all of them, and
            where `world` is more than 1 no bad ones can be left out.

    Attributes:
        left_out: every time that a bad sample was left out of a step, in order; packs that are still to be trained on
            included.
        waited: seconds spent until the next step's packs were there, since the loader was made.
    """

    sampler: StepSampler
    dataset: StepDataset

    def __init__(
        self,
        encoder: Encoder,
        *,
        plan: Plan,
        world: int = 1,
        rank: int = 0,
        accumulate: int = 1,
        packing: Packing = Packing(),  # noqa: B008  (frozen)
        num_workers: int = 0,
        fixed: bool = False,
        identity: Mapping[str, Any] | None = None,
        progress: LoopPosition | None = None,
        sealed: bool = False,
        max_bad_samples: int = 0,
        gather: Gather | None = None,
    ) -> None:
        assert max_bad_samples == 0 or world == 1 or gather is not None, "the ranks have to agree on what is left out"
        self.max_bad_samples = max_bad_samples
        self.left_out: list[LeftOut] = []
        self.accumulate = accumulate
        self.identity = dict(identity or {})
        self.progress = progress
        self.sealed = sealed
        self.waited = 0.0
        super().__init__(
            StepDataset(
                encoder,
                world=world,
                rank=rank,
                accumulate=accumulate,
                packing=packing,
                tolerant=max_bad_samples > 0,
            ),
            batch_size=None,
            sampler=StepSampler(plan, accumulate=accumulate, fixed=fixed),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=worker_context(num_workers, encoder.codec),
            generator=torch.Generator(),  # the global one is the model's: its stream must not depend on the loader
        )

        if gather is None and world == 1 and accumulate > 1 and num_workers:
            gather = Gather.alone()  # alone too, so that the packs of a step need not travel together
        if gather is not None:
            under_way = num_workers * (self.prefetch_factor or 0)
            self.sampler.asking = Asking(self.sampler, self.dataset, gather, ahead=under_way + 2)

    def __len__(self) -> int:
        """Packs of this rank in the whole epoch, also when part of it has been seen."""
        return len(self.sampler) * self.accumulate

    def __iter__(self) -> Iterator[Batch | OpaqueBatch]:  # type: ignore[override]
        # a generator: Lightning asks for the iterator before it sets the epoch, and nothing runs until the first `next`
        sampler = self.sampler
        if self.progress is not None:
            self.progress.begin_epoch(len(self))
        sampler.packs_seen = 0 if sampler.fixed else sampler.packs_seen // self.accumulate * self.accumulate
        if sampler.asking is not None:
            sampler.asking.clear()
        for item in self._timed(super().__iter__()):
            made = from_shared(item) if isinstance(item, SharedTensors) else item
            if made is None:
                continue
            if isinstance(made, Measured):
                assert sampler.asking is not None
                sampler.asking.tell(made)
                continue
            try:
                packs = self._checked(made)
            except UserError:
                self._iterator = None  # ends the workers here, not when the error and all it refers to are collected
                raise
            for pack in packs:
                sampler.packs_seen += 1
                yield OpaqueBatch(pack) if self.sealed else pack

    def _checked(self, made: StepPacks | UserError) -> list[Batch]:
        """The packs, once all ranks agree on them; notes the samples that are left out.

        Raises:
            UserError: the step could not be made, or has one bad sample too many.
        """
        if isinstance(made, UserError):
            raise made
        if self.sampler.asking is not None and self.max_bad_samples:
            made = self.sampler.asking.agreed(made)
        if made.bad:
            step = self.sampler.step(made.index)
            for draw in (draw for draw in step.draws if draw in made.bad):
                self._note(step, draw, made.bad[draw])
        return made.packs

    def _note(self, step: Step, draw: int, error: SampleError) -> None:
        samples = self.dataset.encoder.samples
        source, index = samples.place(draw % len(samples))
        self.left_out.append(LeftOut(source, error.sample_id, index, error.reason, step.epoch, step.index))
        count = self.num_bad_samples
        if not self.max_bad_samples:
            raise error
        if count > self.max_bad_samples:
            raise UserError(
                f"{error}; it is bad sample number {count} of this training, more than data.max_bad_samples="
                f"{self.max_bad_samples}; `vlm check-data` finds all of them for data.quarantine"
            ) from error

    @property
    def num_bad_samples(self) -> int:
        """How many different samples have been left out so far."""
        return len({(entry.source, entry.index) for entry in self.left_out})

    def _timed(self, items: Iterator[Any]) -> Iterator[Any]:
        while True:
            start = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - start
            yield item

    def state_dict(self) -> dict[str, Any]:
        """Where training stands; the same on every rank."""
        epoch, packs = self.sampler.epoch, self.sampler.packs_seen
        if self.progress is not None:
            packs = min(packs, self.progress.trained())
        return {
            "epoch": epoch,
            "steps_seen": packs // self.accumulate,
            "mid_step": packs % self.accumulate != 0,
            "left_out": [asdict(e) for e in self.left_out if (e.epoch, e.step) < (epoch, packs // self.accumulate)],
            "identity": dict(self.identity),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the steps of `state_dict`.

        Raises:
            UserError: the checkpoint's steps are not this loader's steps.
        """
        for key, value in self.identity.items():
            if state["identity"].get(key) != value:
                raise UserError(
                    f"the checkpoint was written with {key} = {state['identity'].get(key)}, this run has {value}; "
                    "resume with the settings of the checkpoint or start a new run"
                )
        self.left_out = [LeftOut(**entry) for entry in state.get("left_out", [])]
        self.sampler.epoch = state["epoch"]
        self.sampler.packs_seen = state["steps_seen"] * self.accumulate
        if self.progress is not None:
            self.progress.resume(self.sampler.packs_seen, total=len(self), mid_step=state["mid_step"])
