"""Decoders that see an image through the queries of a Q-Former."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlm.batch import Batch
from vlm.connectors import QFormer
from vlm.systems.row import STREAM
from vlm.systems.spliced import SplicedDecoder


class QueriedDecoder(SplicedDecoder):
    """pixels -> tower -> Q-Former -> connector -> features in the place of the image's tokens -> language model.

    Args:
        qformer: the Q-Former; its `feature_norm` is what the papers call `ln_vision`.
        **arguments: as in `SplicedDecoder`.
    """

    qformer: nn.Module

    def __init__(self, *, qformer: QFormer, **arguments: Any) -> None:
        super().__init__(qformer=qformer, **arguments)

    def codec_arguments(self) -> dict[str, Any]:
        num_tokens = self.arguments["connector"].num_tokens(self.arguments["qformer"].num_queries)
        return super().codec_arguments() | {"tower": replace(self.tower, num_tokens=num_tokens)}

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
            features = self.vision(pixels.to(next(self.vision.parameters()).dtype))  # [V, P, C]
        return self.connector(self.look(features, batch))  # [V, Q, D]

    def look(self, features: Tensor, batch: Batch) -> Tensor:
        """float[V, Q, width of the Q-Former]: what its queries find in the features of the images."""
        return self.qformer(features)
