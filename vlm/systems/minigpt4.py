"""MiniGPT-4: Enhancing Vision-Language Understanding with Advanced Large Language Models (Zhu et al., 2023)."""

from dataclasses import replace
from functools import cached_property
from typing import Any

from vlm.batch import IGNORE
from vlm.codec import Encoded
from vlm.connectors import QFormer
from vlm.errors import UserError
from vlm.prompts.instructblip import CUT_ANSWERS
from vlm.prompts.minigpt4 import AnswerTemplate
from vlm.sample import Sample
from vlm.systems.queried import QueriedDecoder
from vlm.systems.spliced import SplicedCodec


class MiniGPT4Codec(SplicedCodec):
    """Rows in which an answer has at most as many tokens as its template allows; what is cut is counted."""

    template: AnswerTemplate

    @cached_property
    def _end(self) -> int:
        """The last token of an answer that is whole."""
        return self.tokenizer.encode(f"a{self.template.stop[0]}")[0][-1]

    def encode(self, sample: Sample, *, seed: int | None = None, generate: bool = False) -> Encoded:
        encoded = super().encode(sample, seed=seed, generate=generate)
        if generate or self.template.max_answer is None:
            return encoded
        targets = encoded.text[0].targets
        if targets[targets != IGNORE][-1] == self._end:
            return encoded
        return replace(encoded, counts={**encoded.counts, CUT_ANSWERS: 1.0})


class MiniGPT4(QueriedDecoder):
    """BLIP-2's frozen eyes, one linear layer, and a frozen Vicuna.

    ::

        image, 224 px -> EVA-CLIP-g/14 without its last block                         float[V, 257, 1408]
          -> LayerNorm -> 32 queries of BLIP-2's Q-Former look at it                  float[V, 32, 768]
          -> Linear                                                                    float[V, 32, D]
        stage 1:  [image] caption `\\n`                                             -> Vicuna v0; loss on the caption
        stage 2:  ###Human: <Img>[image]</Img> instruction ###Assistant: answer###    loss on answer and `###`

    The linear layer alone is trained, in both stages. Over Llama-2 there is no Q-Former: four patches in a row are a
    token (`vlm.connectors.JoinedLinear`), 64 of 5,632 numbers.

    Args:
        qformer: the Q-Former; None: the connector takes the tower's features.
        max_answer: longest answer in tokens, its end mark among them; a longer one is cut, as published.
        **kwargs: as in `QueriedDecoder`.
    """

    system = "minigpt4"
    codec: MiniGPT4Codec

    def __init__(
        self,
        *,
        qformer: QFormer | None = None,
        max_answer: int | None = None,
        template: str = "minigpt4",
        **kwargs: Any,
    ) -> None:
        super().__init__(qformer=qformer, max_answer=max_answer, template=template, **kwargs)

    def make_codec(self) -> MiniGPT4Codec:
        return MiniGPT4Codec(**self.codec_arguments())

    def codec_arguments(self) -> dict[str, Any]:
        given, found = self.arguments, super().codec_arguments()
        template = found["template"]
        if not isinstance(template, AnswerTemplate):
            raise UserError(
                f"model.template: {template.name} is not MiniGPT-4's; take minigpt4_caption, minigpt4 or "
                "minigpt4_llama_2"
            )
        return found | {"template": replace(template, max_answer=given["max_answer"])}
