"""What the workers of a loader are asked for, step after step, and what the ranks tell each other beforehand."""

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np
from torch.utils.data import Sampler

from vlm.codec import Sizes
from vlm.data.loading.rank_gather import Gather
from vlm.data.loading.step_dataset import Deal, Measure, Measured, Step, StepDataset, StepPacks, Task
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


@dataclass(frozen=True)
class Known:
    """What all ranks know of a step.

    Attributes:
        deal: what the workers are asked for.
        sizes: of its draws, where it can be dealt.
        bad: {draw: why it cannot be encoded}.
    """

    deal: Deal | StepPacks | UserError
    sizes: Sizes | None = None
    bad: Mapping[int, SampleError] = field(default_factory=dict)


class Asking:
    """The sizes of the samples of steps to come, told by all ranks, how each step is dealt, and what is in its packs.

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
        draws = self.sampler.steps[index]
        return Measure(self.sampler.epoch, index, tuple(draws[at] for at in self._share(len(draws), self.dataset.rank)))

    def _share(self, num: int, rank: int) -> np.ndarray:
        return self.dataset.packing.share(num, world=self.dataset.world, rank=rank)

    def tell(self, measured: Measured) -> None:
        """Tells the other ranks; on their answers the step is dealt."""
        step = self.sampler.step(measured.index)
        told = hash((step.epoch, step.index, step.draws)), measured.sizes, measured.bad, measured.error
        carried = measured.encoded
        self._known[step.index] = self.gather.submit(told, lambda everywhere: self._deal(step, carried, everywhere))

    def packs(self, index: int) -> Iterator[Task]:
        """Asks for the packs of a step: one by one, which takes less memory, unless all ranks have to agree on them."""
        known = self._known[index].result()
        if isinstance(known.deal, Deal) and not self.dataset.tolerant:
            del self._known[index]
            yield from map(known.deal.only, known.deal.seats)
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
            assert known.sizes is not None
            sizes = known.sizes.without([at for at, draw in enumerate(step.draws) if draw in bad])
            made = self.dataset.make(self.dataset.deal(step, sizes)[0])

    def clear(self) -> None:
        """Forgets the steps of an iteration that ended early."""
        self._known.clear()

    def _deal(self, step: Step, carried: Mapping[int, bytes], everywhere: Sequence[tuple]) -> Known:
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
        shares = [self._share(len(step.draws), rank) for rank in range(len(everywhere))]
        sizes = Sizes.together([(share, told) for share, (_, told, _, _) in zip(shares, everywhere, strict=True)])
        bad = {draw: error for _, _, found, _ in everywhere for draw, error in found.items()}
        if bad and not self.dataset.tolerant:
            return Known(StepPacks(step.epoch, step.index, [], bad))
        try:
            deal, ranks = self.dataset.deal(step, sizes)
        except UserError as error:
            return Known(error)
        return Known(replace(deal, encoded=self._traded(step, carried, shares, ranks)), sizes, bad)

    def _traded(
        self, step: Step, carried: Mapping[int, bytes], shares: Sequence[np.ndarray], ranks: np.ndarray
    ) -> dict[int, bytes]:
        """What is encoded of this rank's packs: by itself, or by the rank that measured it.

        Args:
            carried: what this rank has encoded.
            shares: of each rank, the places in the step that it measured.
            ranks: int64[n], who is dealt each draw; -1: nobody.
        """
        own = self.dataset.rank
        parcels: list[dict[int, bytes]] = [{} for _ in shares]
        for at in shares[own].tolist():
            draw, rank = step.draws[at], ranks[at]
            if rank >= 0 and draw in carried:
                parcels[rank][draw] = carried[draw]
        found = parcels[own]
        if any(((ranks[share] >= 0) & (ranks[share] != rank)).any() for rank, share in enumerate(shares)):
            # every rank finds the same here, so that all of them trade or none does
            messages = [pickle.dumps(parcel) if parcel and parcel is not found else b"" for parcel in parcels]
            for message in filter(None, self.gather.trade(messages)):
                found |= pickle.loads(message)
        return found
