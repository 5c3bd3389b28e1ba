"""InstructBLIP over FlanT5 (Dai et al., 2023): the encoder reads visual tokens and instruction, the decoder answers."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from vlm.batch import IGNORE, Batch, TokenSequence
from vlm.language import Decoding
from vlm.language.choosing import options_of
from vlm.language.seq2seq import rank_outputs
from vlm.prompts.instructblip import CUT_ANSWERS, CUT_INSTRUCTIONS, encode_literal
from vlm.sample import ImagePart, Sample
from vlm.systems.encoder_decoder import DECODER, QueriedEncoderDecoder
from vlm.systems.instructblip import InstructCodec, InstructedDecoder


class InstructT5Codec(InstructCodec):
    """Encoder row: the visual tokens of all images, the instruction and `</s>`; decoder row: the output and `</s>`.

    Both keep their end where they are cut: T5's tokenizer writes it behind what is left.
    """

    label_row: ClassVar[str] = DECODER

    def encode_text(self, sample: Sample, *, generate: bool) -> tuple[dict[str, TokenSequence], Mapping[str, float]]:
        instruction, output = self.template.exchange(sample.messages, generate=generate)
        asked, told = encode_literal(self.tokenizer, instruction), encode_literal(self.tokenizer, output)
        events: dict[str, float] = {}
        if not generate and len(asked) > (room := self.template.max_instruction - 1):
            asked, events[CUT_INSTRUCTIONS] = asked[len(asked) - room :], 1.0
        if not generate and len(told) > (room := self.template.max_output - 1):
            told, events[CUT_ANSWERS] = told[:room], 1.0
        widths = self.image_tokens(sample)
        num_images = sum(isinstance(part, ImagePart) for message in sample.messages for part in message.content)
        assert num_images == len(widths)
        slots = list(range(sum(widths)))
        ids = [0] * len(slots) + [*asked, self.tokenizer.eos_id]
        text = self.sequence(sample, ids, torch.full((len(ids),), IGNORE), slots)
        begun = torch.tensor([self.tokenizer.pad_id, *told])
        targets = torch.full_like(begun, IGNORE) if generate else torch.tensor([*told, self.tokenizer.eos_id])
        return {"text": text, DECODER: TokenSequence(begun, targets)}, events


class InstructBLIPT5(InstructedDecoder, QueriedEncoderDecoder):
    """As `InstructBLIP`, with FlanT5 behind the queries.

    ::

        [visual tokens of all images] instruction `</s>` -> encoder of FlanT5 -> decoder -> output `</s>`
    """

    codec: InstructT5Codec  # type: ignore[assignment]

    def make_codec(self) -> InstructT5Codec:  # type: ignore[override]
        return InstructT5Codec(**self.codec_arguments())

    def answers(self, batch: Batch, decoding: Decoding) -> list[str]:
        if decoding.options is None and not decoding.candidates:
            return super().answers(batch, decoding)
        if decoding.options is not None:
            letters, texts = options_of(batch.samples, decoding.options)
        else:
            letters = texts = [list(decoding.candidates)] * len(batch.samples)  # type: ignore[assignment]
        encoded, mask = self.encode_row(batch)
        groups = [self._ended(group) for group in texts]
        chosen = rank_outputs(
            self.language, encoded, mask, groups, start=self.codec.tokenizer.pad_id, by=decoding.weighed
        )
        return [group[at] for group, at in zip(letters, chosen, strict=True)]

    def _ended(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts that are chosen from, with the end that T5's tokenizer writes behind each."""
        return [[*ids, self.codec.tokenizer.eos_id] for ids in self._option_ids(texts)]
