"""The samples that a plan is made of: the user's own, or typical ones for files that are not here."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vlm.batch import IGNORE
from vlm.codec import Codec, Encoded
from vlm.data import VisionLanguageData
from vlm.data.loading.encoder import Encoder
from vlm.errors import SampleError, UserError
from vlm.planning.published import TypicalData, typical_data
from vlm.sample import Sample
from vlm.sample.images import ImageFile
from vlm.sample.parts import ImagePart, Message, TextPart

LOOKED_AT = 64
"""Samples of the user's data that are encoded, evenly spread over an epoch."""
_TYPICAL = 16


@dataclass(frozen=True)
class Samples:
    """What one epoch consists of.

    Attributes:
        items: some of its samples, encoded.
        draws: samples of an epoch; None: not known.
        steps: optimizer steps of an epoch; None: not known.
        origin: where this is from, for people.
        measured: of the user's own data.
        longest: tokens of the longest sample, where it is not among them.
        notes: what was assumed.
    """

    items: Sequence[Encoded]
    draws: int | None
    steps: int | None
    origin: str
    measured: bool
    longest: int = 0
    notes: Sequence[str] = ()

    @property
    def tokens(self) -> list[int]:
        return [item.num_tokens for item in self.items]

    @property
    def labels(self) -> list[int]:
        return [sum(int((s.targets != IGNORE).sum()) for s in item.text) for item in self.items]

    @property
    def image_tokens(self) -> list[int]:
        """Of each sample, in the language model's row."""
        return [sum(sum(len(slots) for slots in s.slots.values()) for s in item.text) for item in self.items]

    @property
    def images(self) -> int:
        return sum(len(item.sample.images) for item in self.items)


def samples_of(
    codec: Codec, data: VisionLanguageData, *, system: str, stage: str, looked_at: int = LOOKED_AT
) -> Samples:
    """Samples of a stage.

    Raises:
        UserError: none of those that were looked at can be encoded.
    """
    try:
        count = len(data.samples)
    except UserError as error:
        return _typical(codec, data, typical_data(system, stage), reason=str(error))
    encoder = Encoder(data.samples, codec, data.seed, data.preparation())
    draws = data.draws(0)
    chosen = [draws[len(draws) * i // looked_at] for i in range(looked_at)] if len(draws) > looked_at else draws
    items, bad = [], []
    for draw in chosen:
        try:
            items.append(encoder(draw, epoch=0))
        except SampleError as error:
            bad.append(error)
    if not items:
        raise UserError(f"none of {len(chosen)} samples can be trained on, such as {bad[0]}")
    notes = [f"{len(bad)} of {len(chosen)} samples that were looked at are bad: {bad[0]}"] if bad else []
    origin = f"your data: {count:,} samples, {len(items)} of them looked at"
    return Samples(items, len(draws), _steps(data, items, len(draws)), origin, measured=True, notes=notes)


def _typical(codec: Codec, data: VisionLanguageData, about: TypicalData, *, reason: str) -> Samples:
    without = round(_TYPICAL * about.without_image)
    texts = [i * without // _TYPICAL != (i + 1) * without // _TYPICAL for i in range(_TYPICAL)]  # evenly spread
    items = [codec.encode(_sample(about, i, codec, has_image=not text)) for i, text in enumerate(texts)]
    origin = f"typical texts of {about.question} and {about.answer} tokens, images of {about.size[0]}x{about.size[1]}"
    origin += f"; number of samples: {about.source}" if about.source else ""
    draws = about.samples
    steps = None if draws is None else _steps(data, items, draws)
    note = f"the data is not here ({reason})"
    return Samples(items, draws, steps, origin, measured=False, longest=about.longest, notes=[note])


def _steps(data: VisionLanguageData, items: Sequence[Encoded], draws: int) -> int:
    """Optimizer steps of so many samples, estimated where steps are counted in tokens."""
    batch, tokens = data.batch, sum(item.num_tokens for item in items) / len(items)
    if batch.unit == "samples":
        return draws // batch.size if data.drop_last else -(-draws // batch.size)
    room = batch.size * (batch.row_tokens or 1)
    return -(-round(draws * tokens) // room)


def _sample(about: TypicalData, number: int, codec: Codec, *, has_image: bool) -> Sample:
    images = about.images if has_image else 0
    file = io.BytesIO()
    Image.new("RGB", about.size, (127, 127, 127)).save(file, "PNG")
    question = TextPart(" is" * max(1, about.question))
    return Sample(
        id=f"typical {number}",
        messages=(
            Message("user", (*[ImagePart()] * images, question)),
            Message("assistant", (TextPart(codec.answers[0] if codec.answers else " is" * about.answer),)),
        ),
        images=tuple(ImageFile(f"typical {at}", data=file.getvalue()) for at in range(images)),
    )


def per_step(data: Any, samples: Samples) -> float:
    """Samples of an optimizer step, estimated where steps are counted in tokens."""
    batch = data.batch
    if batch.unit == "samples":
        return float(batch.size)
    return batch.size * (batch.row_tokens or 1) / (sum(samples.tokens) / len(samples.items))
