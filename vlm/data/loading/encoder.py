"""A draw as token sequences."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from vlm.codec import Codec, Encoded
from vlm.data.sources.base import Source
from vlm.data.wrappers.instructed import put_question
from vlm.sample import Sample
from vlm.seeding import seed_from


class Seeds(NamedTuple):
    """Where the random choices of a draw come from.

    Attributes:
        sample: its own.
        step: the same for all samples of its step; 0 in evaluation, where choices of a step take their fixed form.
    """

    sample: int
    step: int


Prepare = Callable[[Sample, Seeds], Sample]
"""What becomes of a sample before it is encoded."""


@dataclass(frozen=True)
class Encoder:
    """A draw as token sequences: the one place where a sample's seed is made.

    Args:
        prepare: what the kind of training does to a sample before it is encoded.
        training: False in evaluation, where the codec makes no random choices.
        judged_by: who judges what is said of the samples (see `Batch.judged_by`).
        generate: they are encoded up to where an answer has to begin.
    """

    samples: Source
    codec: Codec
    seed: int = 0
    prepare: Prepare | None = None
    training: bool = True
    judged_by: str | None = None
    generate: bool = False

    def seeds(self, draw: int, *, epoch: int, step: int = 0) -> Seeds:
        return Seeds(seed_from(self.seed, epoch, draw), self.step_seed(epoch, step))

    def step_seed(self, epoch: int, step: int) -> int:
        return seed_from(self.seed, epoch, step, "step") if self.training else 0

    def __call__(self, draw: int, *, epoch: int, step: int = 0) -> Encoded:
        """Raises `SampleError` for a sample that cannot be trained on.

        Args:
            step: number of its step in the epoch.
        """
        sample = self.samples[draw % len(self.samples)]
        seeds = self.seeds(draw, epoch=epoch, step=step)
        try:
            sample = put_question(sample, seeds.sample if self.training else None)
            if self.prepare is not None:
                sample = self.prepare(sample, seeds)
            if sample.resolution is not None and sample.resolution not in self.codec.resolutions:
                known = ", ".join(self.codec.resolutions) or "no such words"
                raise sample.error(
                    f"data.resolution {sample.resolution!r}: this system knows {known}; correct or remove it"
                )
            return self.codec.encode(sample, seed=seeds.sample if self.training else None, generate=self.generate)
        except Exception as error:
            error.add_note(f"while encoding sample {sample.id!r} of {sample.source}")
            raise
