"""BLIP that writes captions."""

from typing import Any

from torch import Tensor, nn

from vlm.batch import Batch
from vlm.codec import Encoded
from vlm.language import Decoding, Med
from vlm.language.generation import DecoderPrompt
from vlm.prompts.cleaning import clean_caption
from vlm.sample import Sample
from vlm.sample.places import places_named
from vlm.systems.blip_base import DECODER, BLIPCodec, BLIPTuned, predicted, seen, unlabelled

MAX_WORDS = 30
"""Of a caption that is trained; the rest of a longer one is cut off, as published."""


class BLIPCaptionCodec(BLIPCodec):
    """`[DEC]` prompt caption `[SEP]`; the prompt is the user's text, or the system's own where there is none.

    Args:
        prompt: how captions begin; its tokens are not trained.
        **arguments: of `BLIPCodec`.
    """

    def __init__(self, *, prompt: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.prompt = prompt

    def encode_texts(
        self, sample: Sample, asked: str, answered: str | None, weight: float, *, seed: int | None, generate: bool
    ) -> Encoded:
        prompt = asked or self.prompt
        given = self.ids(sample, DECODER, prompt, end=False)
        if generate:
            begun = self.ids(sample, DECODER, f"{prompt} {answered}", end=False) if answered else given
            return Encoded(sample, (unlabelled(begun),), seed=seed, places=places_named(sample))
        if not answered or not weight:
            raise sample.error("has no caption to train on; add an assistant message", kind="no label")
        text = self.ids(sample, DECODER, f"{prompt} {clean_caption(answered, MAX_WORDS)}")
        sequence = predicted(text, given=len(given), weight=weight)
        counts = {"lm": weight * float(len(text) - len(given))}
        return Encoded(sample, (sequence,), counts=counts, seed=seed, places=places_named(sample))

    def continuation(self, given: list[int], ids: list[int]) -> str:
        """What was written behind a prompt: the whole text, cut where the prompt ends, as published."""
        start = self.decode(given)
        return self.decode([*given, *ids])[len(start) + 1 :]


class BLIPCaption(BLIPTuned):
    """BLIP (Li et al., 2022), fine-tuned to describe images.

    ::

        pixels -> vision -> features
                               |
        [DEC] a picture of ... -> language (causal self-attention -> cross-attention -> mlp) -> the caption's tokens

    Args:
        language: a decoder alone.
        prompt: how captions begin, unless the user's text says it.
        label_smoothing: of the loss.
        **arguments: of `BLIPTuned`.
    """

    codec: BLIPCaptionCodec
    language: Any

    def __init__(
        self,
        *,
        language: Med,
        prompt: str = "a picture of",
        label_smoothing: float = 0.1,
        **arguments: Any,
    ) -> None:
        super().__init__(language=language, prompt=prompt, label_smoothing=label_smoothing, **arguments)

    def make_codec(self) -> BLIPCaptionCodec:
        return BLIPCaptionCodec(prompt=self.arguments["prompt"], **self.codec_arguments())

    def build_parts(self) -> dict[str, nn.Module]:
        return {
            "vision": self.arguments["vision"].build(),
            "language": self.build_text("language", self.tower.dim),
        }

    def label_logits(self, batch: Batch) -> Tensor:
        return self.language.logits(self._label_states(batch))  # [L, vocabulary]

    def _label_states(self, batch: Batch) -> Tensor:
        """float[L, D], what the head is given."""
        features, mask = self.image_features(batch)  # [B, m, C]
        row = batch.text
        hidden = self.language.write(row.padded(self.codec.tokenizer.pad_id).ids, features, mask)  # [B, n, D]
        return hidden.flatten(0, 1)[row.padded_index()[row.label_positions]]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        states, smoothing = self._label_states(batch), self.arguments["label_smoothing"]
        return {"lm": self.language.label_loss(states, batch.text, label_smoothing=smoothing)}

    def answers(self, batch: Batch, decoding: Decoding) -> list[str]:
        given = batch.text.ids.split(batch.text.cu_seqlens.diff().tolist())
        prompts = [DecoderPrompt(*pair) for pair in zip(seen(*self.image_features(batch)), given, strict=True)]
        written = self.write(self.language, prompts, batch, decoding)
        return [self.codec.continuation(own.tolist(), ids) for own, ids in zip(given, written, strict=True)]
