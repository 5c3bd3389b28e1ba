"""BLIP that says whether a sentence is true of two images."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.batch import Batch
from vlm.codec import Encoded
from vlm.errors import UserError
from vlm.language import Decoding
from vlm.language.med_pair import PairMed
from vlm.prompts.cleaning import clean_caption
from vlm.sample import Part, Sample, TextPart
from vlm.sample.places import places_named
from vlm.seeding import seed_from
from vlm.systems.blip_base import ENCODER, BLIPCodec, BLIPTuned, text_of, unlabelled

MAX_WORDS = 40
"""Of a sentence; the rest of a longer one is cut off, as published."""
LABELS = ("False", "True")
"""By class."""
TRUTH = "truth"
"""Entry of `Batch.labels`: int64[B], the class of each sample."""


class BLIPNLVRCodec(BLIPCodec):
    """`[ENC]` sentence `[SEP]`; the assistant's answer is True or False.

    In training, half of the samples show their images in the other order, with left and right exchanged.
    """

    min_images = 2
    answers = LABELS

    def encode(self, sample: Sample, *, seed: int | None = None, generate: bool = False) -> Encoded:
        if seed is not None and len(sample.images) == 2 and seed_from(seed, "swap") % 2:
            sample = swapped(sample)
        return super().encode(sample, seed=seed, generate=generate)

    def encode_texts(
        self, sample: Sample, asked: str, answered: str | None, weight: float, *, seed: int | None, generate: bool
    ) -> Encoded:
        if len(sample.images) != 2:
            raise sample.error(f"{len(sample.images)} images; a sentence is judged about two", kind="image")
        if not asked:
            raise sample.error("has no sentence; this system judges one about two images")
        text = unlabelled(self.ids(sample, ENCODER, clean_caption(asked, MAX_WORDS)))
        if not generate and answered not in LABELS:
            raise sample.error(f"the answer must be True or False, found {answered!r}", kind="no label")
        if not generate and weight != 1:
            raise sample.error(
                f"its answer has weight {weight:g}, but judgements count alike; remove the weight, or the sample"
            )
        counts = {} if generate else {"nlvr": 1.0}
        return Encoded(sample, (text,), counts=counts, seed=seed, places=places_named(sample))

    def labels(self, items: Sequence[Encoded]) -> dict[str, Tensor]:
        answers = [text_of(item.sample.messages[-1]) for item in items]
        return {TRUTH: torch.tensor([int(answer == LABELS[1]) for answer in answers])}


def swapped(sample: Sample) -> Sample:
    """The sample with its images in the other order, and left for right in its sentence."""
    messages = [
        replace(message, content=tuple(_other_side(part) for part in message.content)) for message in sample.messages
    ]
    return replace(sample, images=sample.images[::-1], messages=tuple(messages))


def _other_side(part: Part) -> Part:
    if not isinstance(part, TextPart):
        return part
    return TextPart(re.sub(r"\b(left|right)\b", lambda found: _OTHER[found[0].lower()], part.text, flags=re.IGNORECASE))


_OTHER = {"left": "right", "right": "left"}


class BLIPNLVR(BLIPTuned):
    """BLIP (Li et al., 2022), fine-tuned for NLVR2: is a sentence true of two images?

    ::

        two images -> vision -> features of the first, features of the second
                                        |                      |
        [ENC] sentence -> language (self-attention -> two cross-attentions, joined -> mlp) -> [ENC] -> head -> truth

    The two cross-attentions of a layer start as the one of the pre-trained model. Below layer 6 their mean is taken,
    from it on a linear layer joins them.

    Args:
        language: the text encoder.
        **arguments: of `BLIPTuned`.
    """

    codec: BLIPNLVRCodec
    language: Any
    head: nn.Module

    def __init__(self, *, language: PairMed, **arguments: Any) -> None:
        super().__init__(language=language, **arguments)
        self.copies = {f"language.{copy}": f"language.{origin}" for copy, origin in language.copies.items()}

    def make_codec(self) -> BLIPNLVRCodec:
        return BLIPNLVRCodec(**self.codec_arguments())

    def build_parts(self) -> dict[str, nn.Module]:
        dim = self.arguments["language"].dim
        return {
            "vision": self.arguments["vision"].build(),
            "language": self.build_text("language", self.tower.dim),
            "head": nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 2)),
        }

    def truth_logits(self, batch: Batch) -> Tensor:
        """float[B, 2]: false, true."""
        first, second = self.encode_images(batch).unflatten(0, (-1, 2)).unbind(1)  # [B, P, C] each
        ids, mask = batch.text.padded(self.codec.tokenizer.pad_id)
        return self.head(self.language.read(ids, mask, first, second)[:, 0])

    def probe(self, batch: Batch) -> Tensor:
        return self.truth_logits(batch)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        losses = F.cross_entropy(self.truth_logits(batch).float(), batch.labels[TRUTH], reduction="none")
        return {"nlvr": (losses * batch.real).sum()}

    def answers(self, batch: Batch, decoding: Decoding) -> list[str]:
        if decoding.candidates or decoding.options is not None:
            raise UserError("decoding: the answer is True or False; leave options and candidates out")
        return [LABELS[at] for at in self.truth_logits(batch).argmax(1).tolist()]
