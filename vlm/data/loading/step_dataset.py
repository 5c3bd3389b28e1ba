"""From one optimizer step's draws to the packs of one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch.utils.data import Dataset, get_worker_info

from vlm.batch import Batch
from vlm.codec import Encoded, step_counts
from vlm.data.loading.shared_memory import SharedTensors, to_shared
from vlm.data.sampling.packs import Packing, add_fillers, check_packs, seat
from vlm.errors import SampleError, UserError

if TYPE_CHECKING:
    from vlm.data.loading.encoder import Encoder


@dataclass(frozen=True)
class Step:
    epoch: int
    index: int
    draws: tuple[int, ...]


@dataclass(frozen=True)
class StepPacks:
    """A step of one rank.

    Attributes:
        packs: this rank's.
        bad: the draws of the step that cannot be trained on, with the error of each; they are in none of its packs.
            Where bad samples are not left out, the first one, and there are no packs.
    """

    step: Step
    packs: list[Batch]
    bad: Mapping[int, SampleError]


class StepDataset(Dataset):
    """From a step to this rank's packs of it.

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

    def __getitem__(self, step: Step) -> StepPacks | UserError | SharedTensors:
        """An error a user can mend is returned: raised in a worker it would arrive as the text of a traceback."""
        try:
            made = self.make(step)
        except UserError as error:
            return error
        return to_shared(made) if get_worker_info() is not None else made

    def make(self, step: Step, bad: Mapping[int, SampleError] | None = None) -> StepPacks:
        """The step without the draws in `bad`, and without those that turn out to be bad here."""
        known = dict(bad or {})
        items = self._encode(step, known)
        while self.tolerant or not known:
            good = {draw: item for draw, item in items.items() if draw not in known}
            packs, failed = self._collate(step, good)
            if not failed:
                return StepPacks(step, packs, known)
            known |= failed
        return StepPacks(step, [], known)

    def _encode(self, step: Step, bad: dict[int, SampleError]) -> dict[int, Encoded]:
        """{draw: item} of the step; adds to `bad` what cannot be encoded."""
        items: dict[int, Encoded] = {}
        for draw in step.draws:
            if draw in bad:
                continue
            try:
                items[draw] = self.encoder(draw, epoch=step.epoch, step=step.index)
            except SampleError as error:
                bad[draw] = error
                if not self.tolerant:
                    break
        return items

    def _collate(self, step: Step, good: Mapping[int, Encoded]) -> tuple[list[Batch], dict[int, SampleError]]:
        """This rank's packs; or the draws among them whose images cannot be read."""
        if not good:
            raise UserError(
                f"epoch {step.epoch}, step {step.index}: all of its {len(step.draws)} samples are bad; find them with "
                "`vlm check-data` and leave them out with data.quarantine"
            )
        counts = step_counts(list(good.values()))
        dealt = self._deal(step, good)
        batches: list[Batch] = []
        failed: dict[int, SampleError] = {}
        for pack in range(self.rank, len(dealt), self.world):
            try:
                batch = self.encoder.codec.collate(dealt[pack], counts=counts, packs=len(dealt))
            except SampleError:
                found = self._unreadable(dealt[pack], good)
                assert found, "a pack cannot be read of which every sample can"
                failed |= found
                if not self.tolerant:
                    break
            else:
                batches.append(self._placed(batch, step, pack))
        return batches, failed

    def _deal(self, step: Step, good: Mapping[int, Encoded]) -> list[list[Encoded]]:
        """The items of each pack, the same on every rank: either every rank raises or none."""
        packing, training, packs = self.packing, self.encoder.training, self.world * self.accumulate
        if packing.in_order and training:
            assert packing.max_samples is not None
            items = seat(step.draws, good, packs * packing.max_samples)
        else:
            items = list(good.values())
        lengths = [item.num_tokens for item in items]
        check_packs(lengths, packing, world=self.world, accumulate=self.accumulate, training=training)
        return add_fillers([[items[i] for i in pack] for pack in packing.deal(lengths, packs)])

    def _placed(self, batch: Batch, step: Step, pack: int) -> Batch:
        seed = self.encoder.step_seed(step.epoch, step.index) if self.encoder.training else None
        judged_by, negatives = self.encoder.judged_by, self.packing.negatives
        return replace(batch, judged_by=judged_by, negatives=negatives, pack=pack, seed=seed)

    def _unreadable(self, pack: Sequence[Encoded], good: Mapping[int, Encoded]) -> dict[int, SampleError]:
        failed: dict[int, SampleError] = {}
        for item in pack:
            try:
                self.encoder.codec.collate([item], counts=item.counts)
            except SampleError as error:
                # by the sample: a filler is a copy of an item that may lie in another rank's pack
                failed |= {draw: error for draw, other in good.items() if other.sample is item.sample}
                if not self.tolerant:
                    break
        return failed
