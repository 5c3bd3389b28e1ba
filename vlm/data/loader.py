"""The loader assembles one optimizer step at a time and hands it out pack by pack.

    draws of the step (seed, epoch, step)  ->  every rank encodes all of them (text only)
      ->  counts of the whole step, packs balanced by true token count
      ->  this rank decodes the pictures of its own packs: pack p is micro-batch p // world of rank p % world

So the samples of a step, their random choices and the denominators of its loss are the same however many devices and
micro-batches share it, and no collective is needed to know them.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from vlm.batch import Batch
from vlm.codec import Codec, Encoded, step_counts
from vlm.data.packing import check_pack, deal, fill
from vlm.data.sealed import Sealed
from vlm.data.sources import Source
from vlm.data.transfer import Parcel, unwrap, wrap
from vlm.data.workers import worker_context
from vlm.errors import UserError
from vlm.sample import Sample
from vlm.seeding import seed_from

Plan = Callable[[int], Sequence[Sequence[int]]]
"""The steps of an epoch. A *draw* is an int: the sample's index, plus a multiple of len(samples) that grows each time
the epoch comes back to the sample, so that a sample drawn twice makes its random choices anew."""


@dataclass(frozen=True)
class Step:
    epoch: int
    index: int
    draws: tuple[int, ...]


@dataclass(frozen=True)
class Encoder:
    """A draw as token sequences: the one place where a sample's seed is made.

    Args:
        prepare: what the kind of training does to a sample before it is encoded, given the sample's seed.
        training: False in evaluation, where the codec makes no random choices.
        judged_by: samples are to be answered, and these metrics judge the answers (see `Batch.judged_by`).
    """

    samples: Source
    codec: Codec
    seed: int = 0
    prepare: Callable[[Sample, int], Sample] | None = None
    training: bool = True
    judged_by: str | None = None

    def __call__(self, draw: int, *, epoch: int) -> Encoded:
        sample = self.samples[draw % len(self.samples)]
        seed = seed_from(self.seed, epoch, draw)
        try:
            if self.prepare is not None:
                sample = self.prepare(sample, seed)
            if sample.resolution is not None and sample.resolution not in self.codec.resolutions:
                known = ", ".join(self.codec.resolutions) or "no such words"
                raise sample.error(
                    f"data.resolution {sample.resolution!r}: this system knows {known}; correct or remove it"
                )
            generate = self.judged_by is not None
            return self.codec.encode(sample, seed=seed if self.training else None, generate=generate)
        except Exception as error:
            error.add_note(f"while encoding sample {sample.id!r} of {sample.source}")
            raise


class StepDataset(Dataset):
    """From a step to this rank's packs of it."""

    def __init__(self, encoder: Encoder, *, world: int, rank: int, accumulate: int, max_tokens: int | None) -> None:
        self.encoder = encoder
        self.world, self.rank, self.accumulate = world, rank, accumulate
        self.max_tokens = max_tokens

    def __getitem__(self, step: Step) -> list[Batch] | UserError | Parcel:
        """An error a user can mend is returned: raised in a worker it would arrive as the text of a traceback."""
        try:
            packs = self.packs(step)
        except UserError as error:
            return error
        return wrap(packs) if get_worker_info() is not None else packs

    def packs(self, step: Step) -> list[Batch]:
        items = [self.encoder(draw, epoch=step.epoch) for draw in step.draws]
        counts = step_counts(items)
        packs = self.world * self.accumulate
        items = fill(items, packs)
        lengths = [item.num_tokens for item in items]
        dealt = deal(lengths, packs)
        for pack in dealt:  # all of them on every rank: either every rank raises or none
            check_pack([lengths[i] for i in pack], self.max_tokens)
        batches = (
            self.encoder.codec.collate([items[i] for i in pack], counts=counts, packs=packs)
            for pack in dealt[self.rank :: self.world]
        )
        return [replace(batch, judged_by=self.encoder.judged_by) for batch in batches]


class StepSampler(Sampler[Step]):
    """Where the loader stands, and the steps that are left of the epoch.

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
        self._cached: tuple[int, Sequence[Sequence[int]]] | None = None

    @property
    def steps(self) -> Sequence[Sequence[int]]:
        """The whole epoch."""
        if self._cached is None or self._cached[0] != self.epoch:
            self._cached = self.epoch, self.plan(self.epoch)
        return self._cached[1]

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it before each epoch. The epoch that was restored goes on where it stood."""
        if not self.fixed and epoch != self.epoch:
            self.epoch = epoch
            self.packs_seen = 0

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        epoch, steps = self.epoch, self.steps
        for index in range(self.packs_seen // self.accumulate, len(steps)):
            yield Step(epoch, index, tuple(steps[index]))


class Progress(Protocol):
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
        max_tokens: limit per pack.
        fixed: every pass is the same, from the start (validation).
        identity: what must not change between a checkpoint and its resume, by the name of the setting.
        progress: the loop to keep in step with; without one, packs count as trained when handed out.
        sealed: packs arrive as `Sealed`, for a Lightning loop.

    Attributes:
        waited: seconds spent until the next step's packs were there, since the loader was made.
    """

    sampler: StepSampler

    def __init__(
        self,
        encoder: Encoder,
        *,
        plan: Plan,
        world: int = 1,
        rank: int = 0,
        accumulate: int = 1,
        max_tokens: int | None = None,
        num_workers: int = 0,
        fixed: bool = False,
        identity: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        sealed: bool = False,
    ) -> None:
        self.accumulate = accumulate
        self.identity = dict(identity or {})
        self.progress = progress
        self.sealed = sealed
        self.waited = 0.0
        super().__init__(
            StepDataset(encoder, world=world, rank=rank, accumulate=accumulate, max_tokens=max_tokens),
            batch_size=None,
            sampler=StepSampler(plan, accumulate=accumulate, fixed=fixed),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            multiprocessing_context=worker_context(num_workers, encoder.codec),
            generator=torch.Generator(),  # the global one is the model's: its stream must not depend on the loader
        )

    def __len__(self) -> int:
        """Packs of this rank in the whole epoch, also when part of it has been seen."""
        return len(self.sampler) * self.accumulate

    def __iter__(self) -> Iterator[Batch | Sealed]:  # type: ignore[override]
        # a generator: Lightning asks for the iterator before it sets the epoch, and nothing runs until the first `next`
        sampler = self.sampler
        if self.progress is not None:
            self.progress.begin_epoch(len(self))
        sampler.packs_seen = 0 if sampler.fixed else sampler.packs_seen // self.accumulate * self.accumulate
        for item in self._timed(super().__iter__()):
            packs = unwrap(item) if isinstance(item, Parcel) else item
            if isinstance(packs, UserError):
                self._iterator = None  # ends the workers here, not when the error and all it refers to are collected
                raise packs
            for pack in packs:
                sampler.packs_seen += 1
                yield Sealed(pack) if self.sealed else pack

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
        packs = self.sampler.packs_seen
        if self.progress is not None:
            packs = min(packs, self.progress.trained())
        return {
            "epoch": self.sampler.epoch,
            "steps_seen": packs // self.accumulate,
            "mid_step": packs % self.accumulate != 0,
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
        self.sampler.epoch = state["epoch"]
        self.sampler.packs_seen = state["steps_seen"] * self.accumulate
        if self.progress is not None:
            self.progress.resume(self.sampler.packs_seen, total=len(self), mid_step=state["mid_step"])
