"""From the draws of an optimizer step to the packs of one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset, get_worker_info

from vlm.batch import Batch
from vlm.codec import Encoded, Sizes
from vlm.data.loading.carried import from_bytes, to_bytes
from vlm.data.loading.shared_memory import SharedTensors, to_shared
from vlm.data.sampling.packs import Packing, Seat, as_filler, deal_seats
from vlm.errors import SampleError, UserError

if TYPE_CHECKING:
    from vlm.data.loading.encoder import Encoder


@dataclass(frozen=True)
class Step:
    """Asks for all packs of a step, of a rank that has nobody to ask how large its samples are."""

    epoch: int
    index: int
    draws: tuple[int, ...]


@dataclass(frozen=True)
class Measure:
    """Asks how large the draws are that a rank encodes for all ranks."""

    epoch: int
    index: int
    draws: tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """The answer.

    Attributes:
        sizes: of the draws; where a bad one ends the training, nothing is known of those behind it.
        bad: {draw: why it cannot be encoded}.
        encoded: {draw: `to_bytes` of it}, of those that can be carried.
        error: what ends the training, whose data it is; None: nothing.
    """

    index: int
    sizes: Sizes
    bad: Mapping[int, SampleError]
    encoded: Mapping[int, bytes] = field(default_factory=dict)
    error: UserError | None = None


@dataclass(frozen=True)
class Deal:
    """Asks for packs.

    Attributes:
        seats: {pack: what is in it} of a rank's packs, or of some of them.
        counts: denominators of the whole step.
        num_packs: of the whole step.
        encoded: {draw: `to_bytes` of it}, of what is in the packs; the rest is encoded anew.
    """

    epoch: int
    index: int
    seats: Mapping[int, Sequence[Seat]]
    counts: Mapping[str, float]
    num_packs: int
    encoded: Mapping[int, bytes] = field(default_factory=dict)

    def only(self, pack: int) -> Deal:
        """One of the packs."""
        seats = self.seats[pack]
        encoded = {seat.draw: self.encoded[seat.draw] for seat in seats if seat.draw in self.encoded}
        return replace(self, seats={pack: seats}, encoded=encoded)


@dataclass(frozen=True)
class StepPacks:
    """A step of one rank, or a part of it.

    Attributes:
        packs: this rank's.
        bad: draws of the step that cannot be trained on, with the error of each, as far as they were found on the way;
            they are in none of the packs. Where they were found too late to be left out, there are no packs.
    """

    epoch: int
    index: int
    packs: list[Batch]
    bad: Mapping[int, SampleError]


Task = Step | Measure | Deal | StepPacks | UserError | None
"""What a worker is asked for; None: nothing. Packs and errors that are there already come back in their turn."""


class StepDataset(Dataset):
    """From a step to this rank's packs of it: at once, or by way of the sizes that the ranks tell each other.

    Args:
        packing: what a pack may hold.
        tolerant: leave out bad samples.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        world: int,
        rank: int,
        accumulate: int,
        packing: Packing,
        tolerant: bool = False,
    ) -> None:
        self.encoder = encoder
        self.world, self.rank, self.accumulate = world, rank, accumulate
        self.packing = packing
        self.tolerant = tolerant

    def __getitem__(self, task: Task) -> StepPacks | Measured | UserError | SharedTensors | None:
        """An error a user can mend is returned: raised in a worker it would arrive as the text of a traceback."""
        if task is None or isinstance(task, (StepPacks, UserError)):
            return task
        try:
            if isinstance(task, Measure):
                return self.measure(task)
            made = self.make_whole(task) if isinstance(task, Step) else self.make(task)
        except UserError as error:
            return (
                Measured(task.index, Sizes.of([None] * len(task.draws)), {}, error=error)
                if isinstance(task, Measure)
                else error
            )
        return to_shared(made) if get_worker_info() is not None else made

    def measure(self, asked: Measure) -> Measured:
        """Encodes a share of a step."""
        items, bad = self._encode(asked, asked.draws)
        carried = {draw: data for draw, item in items.items() if (data := to_bytes(item)) is not None}
        return Measured(asked.index, Sizes.of([items.get(draw) for draw in asked.draws]), bad, carried)

    def make_whole(self, step: Step) -> StepPacks:
        """Encodes all of a step, deals it, and makes this rank's packs without what turns out to be bad."""
        items, bad = self._encode(step, step.draws)
        while self.tolerant or not bad:
            sizes = Sizes.of([None if draw in bad else items[draw] for draw in step.draws])
            made = self.make(self.deal(step, sizes)[0], items)
            if not made.bad:
                return replace(made, bad=bad)
            bad |= made.bad
        return StepPacks(step.epoch, step.index, [], bad)

    def deal(self, step: Step, sizes: Sizes) -> tuple[Deal, np.ndarray]:
        """How a step is dealt, the same on every rank: every rank raises or none.

        Also int64[n], the rank that each draw is dealt to; -1: none.

        Args:
            sizes: of its draws.

        Raises:
            UserError: a pack is over its limit, or there is nothing to deal.
        """
        if (sizes.tokens < 0).all():
            raise UserError(
                f"epoch {step.epoch}, step {step.index}: all of its {len(step.draws)} samples are bad; find them with "
                "`vlm check-data` and leave them out with data.quarantine"
            )
        own, ranks = deal_seats(
            step.draws,
            sizes.tokens,
            self.packing,
            world=self.world,
            rank=self.rank,
            accumulate=self.accumulate,
            training=self.encoder.training,
        )
        return Deal(step.epoch, step.index, own, sizes.totals(), self.world * self.accumulate), ranks

    def make(self, deal: Deal, items: Mapping[int, Encoded] | None = None) -> StepPacks:
        """The packs of a deal; none where some of its draws turn out to be bad here.

        Args:
            items: what is encoded already, besides what the deal carries.
        """
        known = {**(items or {}), **{draw: from_bytes(data) for draw, data in deal.encoded.items()}}
        batches: list[Batch] = []
        failed: dict[int, SampleError] = {}
        for number, seats in deal.seats.items():
            found, bad = self._encode(deal, [seat.draw for seat in seats if seat.draw not in known])
            known |= found
            if not bad:
                pack = [as_filler(known[seat.draw]) if seat.filler else known[seat.draw] for seat in seats]
                try:
                    batch = self.encoder.codec.collate(pack, counts=deal.counts, packs=deal.num_packs)
                except SampleError:
                    bad = self._unreadable(seats, known)
                    assert bad, "a pack cannot be read of which every sample can"
                else:
                    batches.append(self._placed(batch, deal, number))
            failed |= bad
            if failed and not self.tolerant:
                break
        return StepPacks(deal.epoch, deal.index, [] if failed else batches, failed)

    def _encode(
        self, step: Step | Measure | Deal, draws: Sequence[int]
    ) -> tuple[dict[int, Encoded], dict[int, SampleError]]:
        """{draw: item} and {draw: why there is none}; of bad samples that are not left out, the first ends it."""
        items: dict[int, Encoded] = {}
        bad: dict[int, SampleError] = {}
        for draw in draws:
            try:
                items[draw] = self.encoder(draw, epoch=step.epoch, step=step.index)
            except SampleError as error:
                bad[draw] = error
                if not self.tolerant:
                    break
        return items, bad

    def _placed(self, batch: Batch, deal: Deal, pack: int) -> Batch:
        seed = self.encoder.step_seed(deal.epoch, deal.index) if self.encoder.training else None
        judged_by, negatives = self.encoder.judged_by, self.packing.negatives
        return replace(batch, judged_by=judged_by, negatives=negatives, pack=pack, seed=seed)

    def _unreadable(self, seats: Sequence[Seat], items: Mapping[int, Encoded]) -> dict[int, SampleError]:
        failed: dict[int, SampleError] = {}
        for draw in dict.fromkeys(seat.draw for seat in seats):  # a filler is a copy of a draw of any pack
            try:
                self.encoder.codec.collate([items[draw]], counts=items[draw].counts)
            except SampleError as error:
                failed[draw] = error
                if not self.tolerant:
                    break
        return failed
