"""CogVLM: Visual Expert for Pretrained Language Models (Wang et al., 2023)."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm.batch import TokenSequence
from vlm.codec import Encoded
from vlm.language import VisualExpert
from vlm.prompts.cogvlm import CogTemplate
from vlm.sample import Sample
from vlm.systems.row import STREAM, concat_documents, exchanges
from vlm.systems.spliced import SplicedCodec, SplicedDecoder


def image_blocks(ids: Tensor, slots: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Positions int64[N] and visual tokens int64[K] of a sequence whose images each take a start, patches and an end.

    All patches of an image have one position. Start and patches are visual tokens, the end is text.

    Args:
        ids: int64[N].
        slots: int64[images * width], the places of the images.
        width: tokens of an image.
    """
    blocks = slots.view(-1, width)
    steps = torch.ones_like(ids)
    steps[blocks[:, 2:-1]] = 0  # each patch but the first stays where the one before it is
    return steps.cumsum(0) - 1, blocks[:, :-1].flatten()


class CogVLMCodec(SplicedCodec):
    """Rows that say which tokens show an image, and give all patches of one the same position.

    Under a template of one exchange, a conversation is a sequence for each answer that is trained, behind all images.
    """

    def encode(self, sample: Sample, *, seed: int | None = None, generate: bool = False) -> Encoded:
        if generate or not (isinstance(self.template, CogTemplate) and self.template.is_single):
            return super().encode(sample, seed=seed, generate=generate)
        items = [super(CogVLMCodec, self).encode(asked, seed=seed) for asked in exchanges(sample)]
        return concat_documents(items) if len(items) > 1 else items[0]

    def sequence(self, sample: Sample, ids: np.ndarray, targets: Tensor, slots: np.ndarray) -> TokenSequence:
        sequence = super().sequence(sample, ids, targets, slots)
        positions, visual = image_blocks(sequence.ids, sequence.slots[STREAM], self.tower.num_tokens)
        return replace(sequence, positions=positions, visual=visual)


class CogVLM(SplicedDecoder):
    """Image tokens go through weights of their own in every layer of the language model, which stays as it was.

    ::

        image, squashed to 224 px, later to 490 px
          -> EVA02-CLIP-E, 63 of 64 blocks, patches only          float[V, P, 1792], P = 256 or 1225
          -> `vlm.connectors.GLU` between a learned start and end float[V, 1 + P + 1, D]
          -> behind BOS -> Vicuna with a visual expert (`vlm.language.VisualExpert`): in each layer, start and patches
             take its QKV, output projection and MLP, the end and all text those of Vicuna; they attend to each other,
             causally, and all patches have one position                loss on the answers

    Stages 1 and 2 train connector and expert, on captions and on boxes of phrases; the second half of stage 2 is at
    490 px. Stage 3 trains the tower too, at a tenth of the rate. Where there is no image, it is Vicuna.
    """

    system = "cogvlm"

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_surgery(VisualExpert())

    def make_codec(self) -> CogVLMCodec:
        return CogVLMCodec(**self.codec_arguments())
