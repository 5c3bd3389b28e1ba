"""Decoders that see an image through the queries of a Q-Former."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlm.batch import IGNORE, Batch, TokenSequence
from vlm.connectors import QFormer
from vlm.prompts.tokenizer import Tokenizer
from vlm.systems.row import STREAM
from vlm.systems.spliced import SplicedDecoder
from vlm.vision import see

READ = "qformer"
"""The row of what the Q-Former reads: a text for each image, in their order."""


def read_by(reader: Tokenizer, ids: Sequence[int]) -> TokenSequence:
    """What a Q-Former reads of a text, between the marks of a BERT."""
    read = torch.tensor([reader.token_id("[CLS]"), *ids, reader.token_id("[SEP]")])
    return TokenSequence(read, torch.full_like(read, IGNORE))


class QueriedDecoder(SplicedDecoder):
    """pixels -> tower -> Q-Former -> connector -> features in the place of the image's tokens -> language model.

    Args:
        qformer: the Q-Former; its `feature_norm` is what the papers call `ln_vision`. None: the connector takes the
            tower's features (MiniGPT-4 over Llama-2).
        **arguments: as in `SplicedDecoder`. With a `qformer_tokenizer` the Q-Former reads the texts of the row `READ`.
    """

    qformer: nn.Module

    def __init__(self, *, qformer: QFormer | None, **arguments: Any) -> None:
        super().__init__(qformer=qformer, **arguments)

    def codec_arguments(self) -> dict[str, Any]:
        qformer = self.arguments["qformer"]
        seen = self.tower.num_tokens if qformer is None else qformer.num_queries
        num_tokens = self.arguments["connector"].num_tokens(seen)
        return super().codec_arguments() | {"tower": replace(self.tower, num_tokens=num_tokens)}

    def build_parts(self) -> dict[str, nn.Module]:
        language, qformer = self.build_language(), self.arguments["qformer"]
        seen = {} if qformer is None else {"qformer": qformer.build(self.tower.dim)}
        dim = self.tower.dim if qformer is None else qformer.dim
        return {
            "vision": self.arguments["vision"].build(),
            **seen,
            "connector": self.arguments["connector"].build(dim, language.config.hidden_size),
            "language": language,
        }

    def image_modules(self) -> tuple[nn.Module, ...]:
        queries = () if self.arguments["qformer"] is None else (self.qformer,)
        return self.vision, *queries, self.connector

    def encode_images(self, batch: Batch) -> Tensor:
        views = batch.views[STREAM]
        features = see(self.vision, views.pixels, keys=views.keys)  # [V, P, C]
        return self.connector(self.look(features, batch))  # [V, Q, D]

    def look(self, features: Tensor, batch: Batch) -> Tensor:
        """float[V, Q, width of the Q-Former]: what its queries find in the features of the images."""
        if self.arguments["qformer"] is None:
            return features
        reader = self.arguments.get("qformer_tokenizer")
        if reader is None:
            return self.qformer(features)
        read = batch.rows[READ].padded(reader.pad_id)  # [V, n]
        return self.qformer(features, read.ids, read.mask)
