"""Encoder-decoders that see an image through the queries of a Q-Former: the question is encoded, the answer decoded."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlm.batch import IGNORE, Batch, Row, TokenSequence
from vlm.codec import Encoded
from vlm.errors import SetupError, UserError
from vlm.language import Decoding
from vlm.language.choosing import WeighedChoices, choices_of
from vlm.language.generation import DecoderPrompt, generate
from vlm.language.label_loss import loss_in_head
from vlm.language.seq2seq import added_to_scores, weigh_outputs
from vlm.prompts.documents import documents_of
from vlm.prompts.instructblip import CUT_ANSWERS
from vlm.sample import Message, Sample, TextPart
from vlm.sample.places import places_named
from vlm.seeding import seed_from
from vlm.systems.queried import QueriedDecoder
from vlm.systems.spliced import SplicedCodec

DECODER = "decoder"
"""The row of what the decoder is told and has to say."""


class EncoderDecoderCodec(SplicedCodec):
    """Encoder row: the prompt of the template, its images in place, and the end token; decoder row: the answer.

    The decoder starts with the pad token, as T5 does. Turns before the last answer stand in the prompt.

    Args:
        prefix: a caption is cut at a point of its first half that belongs to the sample and its epoch, and the encoder
            has what stands before it (prefix language modelling, BLIP-2).
        **arguments: of `SplicedCodec`; `max_tokens` holds for each of the two rows.
    """

    max_answer: int | None = None
    """Most tokens of an answer in training, its end not counted; of a longer one the beginning is kept, and counted."""

    def __init__(self, *, prefix: bool = False, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.prefix = prefix

    def encode(self, sample: Sample, *, seed: int | None = None, generate: bool = False) -> Encoded:
        if len(documents_of(sample)) > 1:
            raise sample.error("several documents, which an encoder-decoder does not take; make them samples")
        places = places_named(sample)
        sample = self.render_regions(sample, seed=seed)
        answer = sample.messages[-1] if sample.messages and sample.messages[-1].role == "assistant" else None
        # with `generate`, a template leaves the last answer out, and keeps one that is only begun
        asked = replace(sample, messages=sample.messages[:-1]) if answer is not None and answer.begun else sample
        try:
            tokens = self.template.tokenize(asked.messages, self.tokenizer, generate=True)
        except SetupError:
            raise
        except UserError as error:
            raise sample.error(str(error), kind=error.kind) from error
        told = [] if answer is None else self.encode_answer(answer)
        given = list(tokens.ids)
        events: dict[str, float] = {}
        if self.max_answer is not None and not generate and len(told) > self.max_answer:
            told, events = told[: self.max_answer], {CUT_ANSWERS: 1.0}
        if self.prefix and seed is not None and not generate and len(told) > 1:
            # a point from the first token to the middle, as the authors say; their public readers do not cut
            point = 1 + seed_from(seed, "prefix") % (len(told) // 2)
            given, told = given + told[:point], told[point:]
        given.append(self.tokenizer.eos_id)
        ids, _, slots = self.reserve(given, [IGNORE] * len(given), self.image_tokens(sample, seed=seed))
        text = self.sequence(sample, ids, torch.full((len(ids),), IGNORE), slots)
        start = self.tokenizer.pad_id
        if generate:
            begun = torch.tensor([start, *(told if answer is not None and answer.begun else [])])
            rows = {DECODER: (TokenSequence(begun, torch.full_like(begun, IGNORE)),)}
            self._check_length(sample, len(ids))
            return Encoded(sample, (text,), rows, seed=seed, places=places)
        if answer is None or not told or not answer.weight:
            raise sample.error("has no answer to train on; add an assistant message", kind="no label")
        targets = torch.tensor([*told, self.tokenizer.eos_id])
        self._check_length(sample, max(len(ids), len(targets)))
        decoder = TokenSequence(torch.tensor([start, *told]), targets, weight=answer.weight)
        counts = {"lm": answer.weight * float(len(targets)), **events}
        return Encoded(sample, (text,), {DECODER: (decoder,)}, counts, seed, places=places)

    def encode_answer(self, answer: Message) -> list[int]:
        """Tokens of an answer, without the end token; marks that it spells are text."""
        text = "".join(part.text for part in answer.content if isinstance(part, TextPart)).strip()
        return self.tokenizer.encode(text, literal=[(0, len(text))])[0]

    def _check_length(self, sample: Sample, length: int) -> None:
        if length > self.max_tokens:
            raise sample.error(
                f"{length} tokens, over the limit of {self.max_tokens}; shorten it or raise max_tokens",
                kind="too long",
            )


class QueriedEncoderDecoder(QueriedDecoder):
    """pixels -> tower -> Q-Former -> connector -> in the encoder's row -> encoder -> decoder -> label positions.

    The rows of encoder and decoder are padded: T5 adds a bias of relative positions to its attention, which packed
    attention does not take.
    """

    codec: EncoderDecoderCodec
    language: Any  # a T5

    def make_codec(self) -> EncoderDecoderCodec:
        return EncoderDecoderCodec(**self.codec_arguments())

    def label_row(self, batch: Batch) -> Row:
        return batch.rows[DECODER]

    def encode_row(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """float[S, n, D] of what the encoder makes of each sequence, and the mask bool[S, n]."""
        row = batch.text
        mask = row.padded(0).mask
        embeds = self.embed_row(batch)  # [N, D]
        padded = embeds.new_zeros(mask.numel(), embeds.shape[1]).index_copy(0, row.padded_index(), embeds)
        padded = padded.unflatten(0, mask.shape)  # [S, n, D]
        return self.language.encoder(inputs_embeds=padded, attention_mask=added_to_scores(mask, padded.dtype))[0], mask

    def label_logits(self, batch: Batch) -> Tensor:
        return self.language.lm_head(self._label_states(batch))

    def _label_states(self, batch: Batch) -> Tensor:
        """float[L, D], what the head is given."""
        row, (encoded, mask) = self.label_row(batch), self.encode_row(batch)
        ids = row.padded(self.codec.tokenizer.pad_id).ids  # [S, m]
        hidden = self.language.decoder(
            input_ids=ids,
            encoder_hidden_states=encoded,
            encoder_attention_mask=added_to_scores(mask, encoded.dtype),
            use_cache=False,
        )[0]  # [S, m, D]
        return self._scaled(hidden.flatten(0, 1)[row.padded_index()[row.label_positions]])

    def _scaled(self, hidden: Tensor) -> Tensor:
        """T5's first version shares the table of tokens with the head and scales what it is compared with."""
        config = self.language.config
        return hidden * config.d_model**-0.5 if config.scale_decoder_outputs else hidden

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        row = self.label_row(batch)
        states = self._label_states(batch)
        return {"lm": loss_in_head(self.language, lambda: self.language.lm_head(states), row)}

    def answers(self, batch: Batch, decoding: Decoding) -> list[str]:
        if decoding.chooses:
            return [weighed.likeliest for weighed in self.weigh(batch, decoding)]
        encoded, mask = self.encode_row(batch)
        tokenizer, row = self.codec.tokenizer, self.label_row(batch)
        starts = row.ids.split(row.cu_seqlens.diff().tolist())
        prompts = [
            DecoderPrompt(features[real], start) for features, real, start in zip(encoded, mask, starts, strict=True)
        ]
        answers = generate(
            self.language,
            prompts,
            decoding=decoding,
            seeds=[seed_from(decoding.seed, sample.id) for sample in batch.samples],
            end_ids=[tokenizer.eos_id],
            pad_id=tokenizer.pad_id,
            synced=self.is_sharded,
        )
        return [self.codec.decode(ids) for ids in answers]

    def weigh(self, batch: Batch, decoding: Decoding) -> list[WeighedChoices]:
        names, texts = choices_of(batch.samples, decoding)
        end, start = self.codec.tokenizer.eos_id, self.codec.tokenizer.pad_id
        groups = [[[*ids, end] for ids in self._option_ids(group)] for group in texts]
        losses = weigh_outputs(self.language, *self.encode_row(batch), groups, start=start, by=decoding.weighed)
        return [WeighedChoices(*pair) for pair in zip(names, losses, strict=True)]
