"""BLIP that answers questions."""

from typing import Any

import torch
from torch import Tensor, nn

from vlm.batch import Batch, Row
from vlm.codec import Encoded
from vlm.errors import UserError
from vlm.language import Decoding, Med
from vlm.language.generation import DecoderPrompt
from vlm.language.med_ranking import rank_texts
from vlm.prompts.cleaning import clean_question
from vlm.sample import Sample
from vlm.sample.places import places_named
from vlm.systems.blip_base import DECODER, ENCODER, BLIPCodec, BLIPTuned, predicted, seen, unlabelled


class BLIPVQACodec(BLIPCodec):
    """`[ENC]` question `[SEP]`, and a row `answers`: `[DEC]` answer `[SEP]`, each as heavy as `Sample.answers` says."""

    def encode_texts(
        self, sample: Sample, asked: str, answered: str | None, weight: float, *, seed: int | None, generate: bool
    ) -> Encoded:
        if not asked:
            raise sample.error("has no question; this system answers one about the image")
        question = unlabelled(self.ids(sample, ENCODER, clean_question(asked)))
        if generate:
            return Encoded(sample, (question,), seed=seed, places=places_named(sample))
        texts = sample.answers or (((answered, weight),) if answered else ())
        if not any(text.strip() and weight > 0 for text, weight in texts):
            raise sample.error("has no answer to train on; add an assistant message or 'answers'", kind="no label")
        rows = tuple(predicted(self.ids(sample, DECODER, text), weight=weight) for text, weight in texts)
        return Encoded(
            sample, (question,), {"answers": rows}, counts={"lm": 1.0}, seed=seed, places=places_named(sample)
        )


class BLIPVQA(BLIPTuned):
    """BLIP (Li et al., 2022), fine-tuned to answer questions about an image, or about the frames of a video.

    ::

        pixels -> vision -> features
                               |
        [ENC] question ----> encoder ----> states
                                              |
        [DEC] answer --------------------> language -> the answer's tokens

    The loss of an answer is the sum over its tokens, times its weight; that of a step is the mean over its questions.
    With `decoding.candidates` the answer is one of them: of the `num_ranked` with the likeliest first token, that with
    the likeliest tokens, label smoothing included. Encoder and decoder start alike and share nothing.

    Args:
        encoder: reads the question, looking at the image.
        language: a decoder, which looks at the states of the question.
        num_ranked: candidates that are scored whole.
        label_smoothing: of the loss, and of the scores of candidates.
        **arguments: of `BLIPTuned`.
    """

    codec: BLIPVQACodec
    encoder: Any
    language: Any

    def __init__(
        self,
        *,
        encoder: Med,
        language: Med,
        num_ranked: int = 128,
        label_smoothing: float = 0.1,
        **arguments: Any,
    ) -> None:
        super().__init__(
            encoder=encoder, language=language, num_ranked=num_ranked, label_smoothing=label_smoothing, **arguments
        )
        self._candidates: tuple[tuple[str, ...], Row] | None = None

    def make_codec(self) -> BLIPVQACodec:
        return BLIPVQACodec(**self.codec_arguments())

    def build_parts(self) -> dict[str, nn.Module]:
        return {
            "vision": self.arguments["vision"].build(),
            "encoder": self.build_text("encoder", self.tower.dim),
            "language": self.build_text("language", self.arguments["encoder"].dim),
        }

    def question_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """float[B, n, D] of the questions, each token having looked at the image, and bool[B, n] of the real ones."""
        ids, mask = batch.text.padded(self.codec.tokenizer.pad_id)
        return self.encoder.read(ids, mask, *self.image_features(batch)), mask

    def label_row(self, batch: Batch) -> Row:
        return batch.rows["answers"]

    def label_logits(self, batch: Batch) -> Tensor:
        return self.language.logits(self._label_states(batch))  # [L, vocabulary]

    def _label_states(self, batch: Batch) -> Tensor:
        """float[L, D], what the head is given."""
        states, mask = self.question_states(batch)
        row = self.label_row(batch)
        ids = row.padded(self.codec.tokenizer.pad_id).ids
        hidden = self.language.write(ids, states[row.owner], mask[row.owner])  # [A, n, D], of all answers
        return hidden.flatten(0, 1)[row.padded_index()[row.label_positions]]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        states, smoothing = self._label_states(batch), self.arguments["label_smoothing"]
        return {"lm": self.language.label_loss(states, self.label_row(batch), label_smoothing=smoothing)}

    def answers(self, batch: Batch, decoding: Decoding) -> list[str]:
        states, mask = self.question_states(batch)
        if decoding.candidates:
            best = rank_texts(
                self.language,
                states,
                mask,
                self._candidate_row(decoding.candidates),
                num_ranked=self.arguments["num_ranked"],
                label_smoothing=self.arguments["label_smoothing"],
                pad_id=self.codec.tokenizer.pad_id,
            )
            return [decoding.candidates[at] for at in best]
        start = torch.tensor([self.codec.tokenizer.token_id(DECODER)], device=states.device)
        prompts = [DecoderPrompt(own, start) for own in seen(states, mask)]
        return [self.codec.decode(ids) for ids in self.write(self.language, prompts, batch, decoding)]

    def _candidate_row(self, texts: tuple[str, ...]) -> Row:
        """The candidates as a row; they are the same for pack after pack, so they are encoded once."""
        if self._candidates is None or self._candidates[0] is not texts:
            start, tokenizer = self.codec.tokenizer.token_id(DECODER), self.codec.tokenizer
            ids = [[start, *tokenizer.encode(text)[0], self.codec.end_id] for text in texts]
            if empty := [text for text, own in zip(texts, ids, strict=True) if len(own) == 2]:
                raise UserError(f"decoding.candidates: {empty[0]!r} has no token; remove it")
            self._candidates = texts, Row.pack([predicted(own) for own in ids])
        return self._candidates[1]
