"""InstructBLIP over FlanT5 (Dai et al., 2023): the encoder reads visual tokens and instruction, the decoder answers."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch

from vlm.batch import IGNORE, TokenSequence
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
        slots = np.arange(sum(widths))
        ids = np.array([0] * len(slots) + [*asked, self.tokenizer.eos_id])
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
