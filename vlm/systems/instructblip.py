"""InstructBLIP: Towards General-purpose Vision-Language Models with Instruction Tuning (Dai et al., 2023)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from vlm.batch import IGNORE, TokenSequence, next_token_targets
from vlm.codec import Encoded
from vlm.connectors import QFormer
from vlm.errors import SetupError, UserError
from vlm.prompts.instructblip import CUT_INSTRUCTIONS, InstructTemplate, encode_literal
from vlm.prompts.tokenizer import Tokenizer
from vlm.sample import Sample
from vlm.sample.places import places_named
from vlm.systems.queried import READ, QueriedDecoder, read_by
from vlm.systems.row import concat_documents, exchanges
from vlm.systems.spliced import SplicedCodec


class InstructCodec(SplicedCodec):
    """Rows of the visual tokens of all images, an instruction and what is said to it; the Q-Former reads it too.

    A conversation is a sequence for each of its answers, which sees its images again.

    Args:
        reader: tokenizer of the Q-Former.
        max_read: longest instruction that the Q-Former reads, marks included; of a longer one the end is kept.
        max_images: most images of a sample.
    """

    template: InstructTemplate
    needs_image = True
    label_row: ClassVar[str] = "text"

    def __init__(self, *, reader: Tokenizer, max_read: int, max_images: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reader, self.max_read, self.max_images = reader, max_read, max_images

    def encode(self, sample: Sample, *, seed: int | None = None, generate: bool = False) -> Encoded:
        if not 1 <= len(sample.images) <= self.max_images:
            raise sample.error(
                f"has {len(sample.images)} images or frames, this system takes 1 to {self.max_images}; take others, or "
                "set model.max_images",
                kind="image",
            )
        if not generate and len(turns := exchanges(sample)) > 1:
            return concat_documents([self.encode(turn, seed=seed) for turn in turns])
        places = places_named(sample)
        sample = self.render_regions(sample, seed=seed)
        try:
            instruction, _ = self.template.exchange(sample.messages, generate=generate)
            sequences, events = self.encode_text(sample, generate=generate)
        except SetupError:
            raise
        except UserError as error:
            raise sample.error(str(error), kind=error.kind) from error
        if len(sequences["text"].ids) > self.max_tokens:
            raise sample.error(
                f"{len(sequences['text'].ids)} tokens, over the limit of {self.max_tokens}; shorten it or raise "
                "max_tokens",
                kind="too long",
            )
        read, was_cut = self.read_instruction(instruction)
        counts: dict[str, float] = {}
        if not generate:
            weight, targets = sample.messages[-1].weight, sequences[self.label_row].targets
            sequences[self.label_row] = replace(sequences[self.label_row], weight=weight)
            cuts = {**events, **({CUT_INSTRUCTIONS: 1.0} if was_cut else {})}
            counts = {"lm": weight * float((targets != IGNORE).sum()), **cuts}
        rows = {name: (sequence,) for name, sequence in sequences.items()}
        reads = (read,) * len(sample.images)  # one for each image, in their order
        return Encoded(sample, rows.pop("text"), rows | {READ: reads}, counts, seed, places=places)

    def encode_text(self, sample: Sample, *, generate: bool) -> tuple[dict[str, TokenSequence], Mapping[str, float]]:
        """Sequences of the language model by row, and what was cut for them."""
        tokens, events = self.template.cut(sample.messages, self.tokenizer, generate=generate)
        ids, labels, slots = self.reserve(tokens.ids, tokens.labels, self.image_tokens(sample))
        return {"text": self.sequence(sample, ids, next_token_targets(torch.tensor(labels)), slots)}, events

    def read_instruction(self, instruction: str) -> tuple[TokenSequence, bool]:
        """What the Q-Former reads, and whether it had to be cut."""
        ids, room = encode_literal(self.reader, instruction), self.max_read - 2
        return read_by(self.reader, ids[max(0, len(ids) - room) :]), len(ids) > room


class InstructedDecoder(QueriedDecoder):
    """What both kinds of InstructBLIP share: limits on texts, and a Q-Former that reads the instruction.

    Args:
        qformer: as in `QueriedDecoder`, with `text`.
        qformer_tokenizer: what it reads with.
        max_instruction: longest instruction, cut on the left, for the Q-Former and the language model each.
        max_output: longest output, cut on the right.
        max_images: most images of a sample; 4 frames of a video.
        **kwargs: as in `SplicedDecoder`.
    """

    system = "instructblip"
    codec: InstructCodec

    def __init__(
        self,
        *,
        qformer: QFormer,
        qformer_tokenizer: Tokenizer,
        max_instruction: int = 128,
        max_output: int = 256,
        max_images: int = 4,
        template: str = "instructblip",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            qformer=qformer,
            qformer_tokenizer=qformer_tokenizer,
            max_instruction=max_instruction,
            max_output=max_output,
            max_images=max_images,
            template=template,
            **kwargs,
        )

    def codec_arguments(self) -> dict[str, Any]:
        given, found = self.arguments, super().codec_arguments()
        if not isinstance(found["template"], InstructTemplate):
            raise UserError(
                f"model.template: {found['template'].name} is a conversation's; this system's is instructblip"
            )
        if not given["qformer"].text:
            raise UserError("model.qformer.text: false, but the Q-Former of InstructBLIP reads instructions; set it")
        limits = {"max_instruction": given["max_instruction"], "max_output": given["max_output"]}
        return found | {
            "template": replace(found["template"], **limits),
            "reader": given["qformer_tokenizer"],
            "max_read": given["max_instruction"],
            "max_images": given["max_images"],
        }


class InstructBLIP(InstructedDecoder):
    """The Q-Former reads the instruction, so that what it takes from the image depends on what is asked.

    ::

        image or up to four frames, 224 px -> EVA-CLIP-g/14 without its last block     float[V, 257, 1408]
          -> LayerNorm -> Q-Former: [32 queries; instruction] see each other, the queries see the image
          -> the queries alone -> Linear                                               float[V, 32, D]
        [visual tokens of all images] `</s>` instruction output `</s>` -> Vicuna 1.1; loss on the output and its end

    Trained are the Q-Former, its queries and norms, and the projection.
    """

    def make_codec(self) -> InstructCodec:
        return InstructCodec(**self.codec_arguments())
