"""A draw as token sequences."""

from collections.abc import Callable
from dataclasses import dataclass

from vlm.codec import Codec, Encoded
from vlm.data.sources.base import Source
from vlm.sample import Sample
from vlm.seeding import seed_from


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
