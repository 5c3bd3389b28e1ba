"""BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language Models (Li, 2023)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlm.codec import Encoded
from vlm.errors import UserError
from vlm.prompts.instructblip import CUT_ANSWERS, encode_literal
from vlm.prompts.template import IMAGE, Tokenized
from vlm.prompts.tokenizer import Tokenizer
from vlm.sample import Sample, TextPart
from vlm.systems.encoder_decoder import EncoderDecoderCodec, QueriedEncoderDecoder
from vlm.systems.queried import READ, QueriedDecoder, read_by
from vlm.systems.spliced import SplicedCodec


class _ReadingCodec(SplicedCodec):
    """What both kinds share: the limit on texts, and what the Q-Former reads of a sample.

    Args:
        max_text: most tokens of a text, BOS and end included; what is cut is counted, as the published code cuts it.
        reader: tokenizer of the Q-Former, where it reads all that the user says, for each image.
        **arguments: of the codec behind it.
    """

    def __init__(self, *, max_text: int, reader: Tokenizer | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.max_text, self.reader = max_text, reader
        self.needs_image = reader is not None

    def encode(self, sample: Sample, *, seed: int | None = None, generate: bool = False) -> Encoded:
        if self.reader is not None and not sample.images:
            raise sample.error("has no image for the Q-Former to look at; leave it out", kind="image")
        item = super().encode(sample, seed=seed, generate=generate)
        if self.reader is None:
            return item
        asked = [message for message in item.sample.messages if message.role == "user"]
        text = "".join(part.text for message in asked for part in message.content if isinstance(part, TextPart)).strip()
        kept = encode_literal(self.reader, text)[: self.max_text - 2]
        reads = (read_by(self.reader, kept),) * len(sample.images)
        return replace(item, rows={**item.rows, READ: reads})


class BLIP2Codec(_ReadingCodec):
    """The features of all images, then a text, of which the first `max_text` tokens are kept in training."""

    def tokenize(self, sample: Sample, *, generate: bool) -> tuple[Tokenized, Mapping[str, float]]:
        tokens, events = super().tokenize(sample, generate=generate)
        most = self.max_text + tokens.ids.count(IMAGE)
        if generate or len(tokens.ids) <= most:
            return tokens, events
        return Tokenized(tokens.ids[:most], tokens.labels[:most]), {**events, CUT_ANSWERS: 1.0}


class BLIP2T5Codec(_ReadingCodec, EncoderDecoderCodec):
    """As `BLIP2Codec`, of an encoder-decoder: the answer is cut, with what the encoder has of it."""

    def __init__(self, *, max_text: int, **arguments: Any) -> None:
        super().__init__(max_text=max_text, **arguments)
        self.max_answer = max_text - 1  # its end comes behind


class _Reading(QueriedDecoder):
    """What both kinds share: the limit on texts, and a Q-Former that may read the question.

    Args:
        max_text: most tokens of a text.
        qformer_tokenizer: what the Q-Former reads the question with (needs `qformer.text`); None: it reads nothing.
        **arguments: as in `QueriedDecoder`.
    """

    def __init__(self, *, max_text: int = 32, qformer_tokenizer: Tokenizer | None = None, **arguments: Any) -> None:
        super().__init__(max_text=max_text, qformer_tokenizer=qformer_tokenizer, **arguments)

    def codec_arguments(self) -> dict[str, Any]:
        given = self.arguments
        reader = given["qformer_tokenizer"]
        if (reader is not None) != given["qformer"].text:
            raise UserError(
                "model: qformer.text and qformer_tokenizer belong together: a Q-Former that reads needs both, another "
                "one neither"
            )
        return super().codec_arguments() | {"max_text": given["max_text"], "reader": reader}


class BLIP2(_Reading):
    """A frozen tower speaks to a frozen language model through 32 queries.

    ::

        image, 224 px -> EVA-CLIP-g/14 without its last block and final norm       float[V, 257, 1408]
          -> LayerNorm -> Q-Former: 32 queries that see each other and, in every second layer, the image
          -> Linear                                                                float[V, 32, D]
        [32 queries] `</s>` text newline -> OPT, or Vicuna 1.1; loss on the text, its start and its end

    Stage 2 trains the Q-Former and the linear layer. Fine-tuning trains the tower too; for questions the Q-Former
    reads the question.
    """

    system = "blip2"
    codec: BLIP2Codec

    def make_codec(self) -> BLIP2Codec:
        return BLIP2Codec(**self.codec_arguments())


class BLIP2T5(_Reading, QueriedEncoderDecoder):
    """BLIP-2 before an encoder-decoder: the encoder has the queries and the beginning of the text.

    ::

        image -> tower -> Q-Former -> Linear                                       float[V, 32, D]
        [32 queries] prefix `</s>` -> FlanT5's encoder -> decoder: the rest of the text and `</s>`

    Args:
        prefix: a caption is cut at a point of its first half, of which the encoder has what stands before it (prefix
            language modelling, stage 2).
    """

    system = "blip2"
    codec: BLIP2T5Codec

    def __init__(self, *, prefix: bool = False, **arguments: Any) -> None:
        super().__init__(prefix=prefix, **arguments)

    def make_codec(self) -> BLIP2T5Codec:
        return BLIP2T5Codec(**self.codec_arguments(), prefix=self.arguments["prefix"])
