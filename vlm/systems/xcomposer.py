"""InternLM-XComposer: A Vision-Language Large Model for Advanced Text-image Comprehension and Composition (Zhang et
al., 2023)."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlm.batch import Batch
from vlm.connectors import QFormer
from vlm.systems.row import STREAM
from vlm.systems.spliced import SplicedDecoder


class XComposer(SplicedDecoder):
    """A perceive sampler, which is a Q-Former without text, makes 66 tokens of an image.

    ::

        image, squashed to 224 px
          -> EVA-g, class token kept, blocks 0 to 38            float[V, 257, 1408]
          -> ln_vision -> 64 queries look at them (`qformer`)   float[V, 64, 768]
          -> linear, between two flags that are never trained   float[V, 66, D]
          -> behind <|User|>: -> InternLM-7B, which is Llama's class with biases

    Stage 1 trains sampler and language model. From stage 2 on the language model is frozen under an adapter of rank 256
    on q, v, up and down that acts on every token (`callbacks.LoRAInjection`), and is released with it, unmerged; stages
    2 (many tasks) and 3 (instructions and illustrated articles) train the adapter and the sampler.
    """

    system = "xcomposer"
    qformer: nn.Module

    def __init__(self, *, qformer: QFormer, **arguments: Any) -> None:
        super().__init__(qformer=qformer, **arguments)

    def codec_arguments(self) -> dict[str, Any]:
        queries = self.arguments["qformer"].num_queries
        given = super().codec_arguments()
        return given | {"tower": replace(self.tower, num_tokens=self.arguments["connector"].num_tokens(queries))}

    def build_parts(self) -> dict[str, nn.Module]:
        qformer, language = self.arguments["qformer"], self.build_language()
        return {
            "vision": self.arguments["vision"].build(),
            "qformer": qformer.build(self.tower.dim),
            "connector": self.arguments["connector"].build(qformer.dim, language.config.hidden_size),
            "language": language,
        }

    def image_modules(self) -> tuple[nn.Module, ...]:
        return self.vision, self.qformer, self.connector

    def encode_images(self, batch: Batch) -> Tensor:
        pixels = batch.views[STREAM].pixels
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in self.vision.parameters())):
            features = self.vision(pixels.to(next(self.vision.parameters()).dtype))
        return self.connector(self.qformer(features))
