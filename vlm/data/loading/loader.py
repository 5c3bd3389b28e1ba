"""The loader assembles one optimizer step at a time and hands it out pack by pack.

    draws of the step (seed, epoch, step)  ->  every rank encodes its share of them (text only)
      ->  the ranks tell each other how large the samples are, some steps ahead
      ->  counts of the whole step, its packs (balanced by true token count where samples never meet)
      ->  this rank encodes and decodes the samples of its own packs: pack p is micro-batch p // world of rank p % world

So the samples of a step, their random choices and the denominators of its loss are the same however many devices and
micro-batches share it, and what a rank does for a step does not grow with the number of ranks. A rank that has nobody
to ask encodes all of the step itself; the packs are the same.

Where bad samples may be left out (`max_bad_samples`), an image that cannot be decoded is met by one rank alone. So the
ranks tell each other, step by step, which samples they could not read; if there are any, all of them make the step
again without these. The step is then the one that it would be if these samples were not in the plan.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Sampler

from vlm.batch import Batch
from vlm.codec import Size
from vlm.data.loading.encoder import Encoder
from vlm.data.loading.opaque import OpaqueBatch
from vlm.data.loading.rank_gather import Gather
from vlm.data.loading.shared_memory import SharedTensors, from_shared
from vlm.data.loading.step_dataset import Deal, Measure, Measured, Step, StepDataset, StepPacks, Task
from vlm.data.loading.workers import worker_context
from vlm.data.sampling.packs import Packing
from vlm.data.wrappers.quarantine import LeftOut
from vlm.errors import SampleError, UserError

Plan = Callable[[int], Sequence[Sequence[int]]]
"""The steps of an epoch. A *draw* is an int: the sample's index, plus a multiple of len(samples) that grows each time
the epoch comes back to the sample, so that a sample drawn twice makes its random choices anew."""


class StepSampler(Sampler[Task]):
    """Where the loader stands, and what its workers are asked for the steps that are left of the epoch.

    Args:
        accumulate: packs to a step.
        fixed: every epoch is epoch 0 (validation).
    """

    def __init__(self, plan: Plan, *, accumulate: int = 1, fixed: bool = False) -> None:
        self.plan = plan
        self.accumulate = accumulate
        self.fixed = fixed
        self.epoch = 0
        self.packs_seen = 0
        self.asking: Asking | None = None
        self._cached: tuple[int, Sequence[Sequence[int]]] | None = None

    @property
    def steps(self) -> Sequence[Sequence[int]]:
        """The whole epoch."""
        if self._cached is None or self._cached[0] != self.epoch:
            self._cached = self.epoch, self.plan(self.epoch)
        return self._cached[1]

    def step(self, index: int) -> Step:
        return Step(self.epoch, index, tuple(self.steps[index]))

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it before each epoch. The epoch that was restored goes on where it stood."""
        if not self.fixed and epoch != self.epoch:
            self.epoch = epoch
            self.packs_seen = 0

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Task]:
        asking, indices = self.asking, range(self.packs_seen // self.accumulate, len(self.steps))
        if asking is None:
            yield from (self.step(index) for index in indices)
            return
        first = indices[: asking.ahead]
        yield from map(asking.measure, first)
        yield from [None] * (
            asking.ahead - len(first)
        )  # a short epoch has no more to ask, and has to wait all the same
        for index in indices:
            yield from asking.packs(index)
            if index + asking.ahead < len(self.steps):
                yield asking.measure(index + asking.ahead)


class LoopPosition(Protocol):
    """What the loader asks of, and tells, the loop that trains on its packs."""

    def trained(self) -> int:
        """Packs of this epoch that have been trained on."""

    def begin_epoch(self, packs: int) -> None:
        """The epoch that starts has this many packs."""

    def resume(self, packs: int, *, total: int, mid_step: bool) -> None:
        """The loader continues after `packs` of the epoch's `total`, at the start of a step."""


class Asking:
    """The sizes of the samples of steps to come, told by all ranks, and how each step is dealt.

    Args:
        ahead: steps that are measured before the packs of the first are asked for: more than are on their way through
            the workers at once, so that the answers are there.
    """

    def __init__(self, sampler: StepSampler, dataset: StepDataset, gather: Gather, *, ahead: int) -> None:
        self.sampler = sampler
        self.dataset = dataset
        self.gather = gather
        self.ahead = ahead
        self._known: dict[int, Future[Known]] = {}

    def measure(self, index: int) -> Measure:
        """Asks for this rank's share of a step."""
        step = self.sampler.step(index)
        return Measure(step.epoch, index, step.draws[self.dataset.rank :: self.dataset.world])

    def tell(self, measured: Measured) -> None:
        """Tells the other ranks; on their answers the step is dealt."""
        step = self.sampler.step(measured.index)
        told = hash((step.epoch, step.index, step.draws)), measured.sizes, measured.bad, measured.error
        self._known[step.index] = self.gather.submit(told, lambda everywhere: self._deal(step, everywhere))

    def packs(self, index: int) -> Iterator[Task]:
        """Asks for the packs of a step: one by one, which takes less memory, unless all ranks have to agree on them."""
        known = self._known[index].result()
        if isinstance(known.deal, Deal) and not self.dataset.tolerant:
            del self._known[index]
            for number, seats in known.deal.seats.items():
                yield replace(known.deal, seats={number: seats})
        else:
            yield known.deal

    def agreed(self, made: StepPacks) -> StepPacks:
        """The step without what any rank could not read.

        Raises:
            UserError: nothing is left of it.
        """
        known = self._known.pop(made.index).result()
        step, bad = self.sampler.step(made.index), dict(known.bad)
        while True:
            found = {draw: error for failed in self.gather(dict(made.bad)) for draw, error in failed.items()}
            if not found:
                return replace(made, bad=bad)
            bad |= found
            sizes = {draw: size for draw, size in known.sizes.items() if draw not in bad}
            made = self.dataset.make(self.dataset.deal(step, sizes))

    def clear(self) -> None:
        """Forgets the steps of an iteration that ended early."""
        self._known.clear()

    def _deal(self, step: Step, everywhere: Sequence[tuple]) -> "Known":
        if len({digest for digest, *_ in everywhere}) > 1:
            return Known(
                UserError(
                    "the ranks do not have the same samples in a step: some of them cannot read a file that others "
                    "can; `vlm check-data` on each machine finds it"
                )
            )
        for _, _, _, error in everywhere:
            if error is not None:
                return Known(error)
        sizes = {draw: size for _, found, _, _ in everywhere for draw, size in found.items()}
        bad = {draw: error for _, _, found, _ in everywhere for draw, error in found.items()}
        if bad and not self.dataset.tolerant:
            return Known(StepPacks(step.epoch, step.index, [], bad))
        try:
            return Known(self.dataset.deal(step, sizes), sizes, bad)
        except UserError as error:
            return Known(error)


@dataclass(frozen=True)
class Known:
    """What all ranks know of a step.

    Attributes:
        deal: what the workers are asked for.
        sizes: of the draws that can be encoded.
        bad: {draw: why it cannot be encoded}.
    """

    deal: Deal | StepPacks | UserError
    sizes: Mapping[int, Size] = field(default_factory=dict)
    bad: Mapping[int, SampleError] = field(default_factory=dict)


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
            multiprocessing_context=worker_context(num_workers, encoder.codec),
            generator=torch.Generator(),  # the global one is the model's: its stream must not depend on the loader
        )

        if gather is None and world == 1 and accumulate > 1 and num_workers:
            gather = Gather(lambda value: [value])  # alone too, so that the packs of a step need not travel together
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
        step = self.sampler.step(made.index)
        for draw in step.draws if made.bad else ():
            if draw in made.bad:
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
